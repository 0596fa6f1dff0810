"""A recipe: a YAML file of a program's options, by the names of its fields. Knows nothing of what they mean.

`extends` names recipes whose keys it starts from, the later ones winning: shipped ones by name, others by a path from its folder.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from lori.errors import LoriError

SHIPPED = Path(__file__).parent / "recipes"


class RecipeError(LoriError):
    """A recipe cannot be read: says which file, and what was found in it."""


def read_recipe(name: str, known: Collection[str], folder: Path | None = None) -> dict[str, Any]:
    """Returns the options of a shipped recipe, or of a file where `name` ends in .yaml, from the working directory or `folder`.

    Raises `RecipeError` where it is not there, is no YAML mapping, extends itself, or has keys that are not `known`.
    """
    return {option: value for option, (_, value) in _read(_find(name, folder or Path()), known, ()).items()}


def files_of(name: str, known: Collection[str]) -> dict[str, Path]:
    """Returns the file that says each option of a recipe. Raises as `read_recipe`."""
    return {option: path for option, (path, _) in _read(_find(name, Path()), known, ()).items()}


def _read(path: Path, known: Collection[str], before: tuple[Path, ...]) -> dict[str, tuple[Path, Any]]:
    if path in before:
        raise RecipeError(f"{path} extends itself: " + " -> ".join(file.name for file in (*before, path)))
    found = _load(path)
    extends = found.pop("extends", [])
    if unknown := [key for key in found if key not in known]:
        raise RecipeError(f"{path} has unknown keys: {', '.join(map(repr, unknown))}")
    options: dict[str, tuple[Path, Any]] = {}
    for name in [extends] if isinstance(extends, str) else extends:
        options |= _read(_find(str(name), path.parent), known, (*before, path))
    return options | {option: (path, value) for option, value in found.items()}


def _find(name: str, folder: Path) -> Path:
    if name.endswith((".yaml", ".yml")):
        return (folder / name).resolve()
    path = SHIPPED / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        raise RecipeError(f"there is no recipe {name!r}: known are {shipped}; a file's name ends in .yaml")
    return path


def _load(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is no YAML: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise RecipeError(f"{path} is no recipe: expected options by name")
    if not isinstance(found.get("extends", []), str | list):
        raise RecipeError(f"{path} has an 'extends' that is neither a recipe's name nor a list of them")
    return found
