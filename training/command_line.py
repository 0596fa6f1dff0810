"""The command line of this package's programs: flags, recipes, and errors in one line.

A recipe is a YAML file of a program's options, by the names of its fields. It is used where the command line names no value.
`extends` names recipes to start from, the later ones winning: shipped ones by name, others by a path from the recipe's folder.
"""

import os
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, CliSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from safetensors import SafetensorError

from lori.errors import LoriError
from lori.flags import add_argument, refusing_flags

SHIPPED = Path(__file__).parent / "recipes"


class RecipeError(LoriError):
    """A recipe cannot be read: says which file, and what was found in it."""


def read_recipe(name: str, known: Collection[str], folder: Path | None = None) -> dict[str, Any]:
    """Return the options of a shipped recipe, or of a file where `name` ends in .yaml, from the working directory or `folder`.

    Raises `RecipeError` where it is not there, is no YAML mapping, extends itself, or has keys that are not `known`.
    """
    return {option: value for option, (_, value) in _read(_find(name, folder or Path()), known, ()).items()}


def files_of(name: str, known: Collection[str]) -> dict[str, Path]:
    """Return the file that says each option of a recipe. Raises as `read_recipe`."""
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


def ended(program: Callable[[], str], interrupted: str = "interrupted") -> int:
    """Run `program`, prints what it returns, and return the exit code.

    Of processes of `torchrun` the first one speaks; the others say errors alone, which may be theirs alone, and which they are.
    """
    process = os.environ.get("RANK", "0")
    speaks = process == "0"
    try:
        said = program()
    except (LoriError, OSError, SafetensorError) as error:
        print("error:" if speaks else f"error of process {process}:", error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if speaks:
            print(interrupted, file=sys.stderr)
        return 130
    if speaks:
        print(said)
    return 0


class CommandLine(BaseSettings):
    """A program's flags. RANK or SEED in the environment means something else, so nothing is read from there."""

    model_config = SettingsConfigDict(
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_exit_on_error=False,
        use_attribute_docstrings=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003  # pydantic-settings' signature
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return what was given in code, and the recipe; pydantic-settings puts the command line before them where asked to."""
        return init_settings, _Recipe(settings_cls)

    @classmethod
    def overruled(cls, given: Mapping[str, Any], told: Mapping[str, Any]) -> set[str]:  # noqa: ARG003  # for those with recipes
        """Return which of the options that a recipe has `told` mean nothing beside those `given` as flags."""
        return set()

    @classmethod
    def from_arguments(cls) -> Self:
        """Read the command line; ends the program with 2 and the flag's name where one is wrong."""
        try:
            with refusing_flags(cls.model_fields, lambda: cls._files(flags())):
                flags = _Flags(cls, cli_parse_args=True, add_argument_method=add_argument)
                return cls(_cli_settings_source=flags)
        except RecipeError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error

    @classmethod
    def _files(cls, given: Mapping[str, Any]) -> dict[str, Path]:
        """Return the recipe's file of each option that was not `given` as a flag."""
        if not (name := given.get("recipe")):
            return {}
        return {option: file for option, file in files_of(name, cls.model_fields).items() if option not in given}


class _Recipe(PydanticBaseSettingsSource):
    """The options of the recipe that the sources before this one name, if any."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Unused: a recipe is read as a whole."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        given = self.current_state
        if not (name := given.get("recipe")):
            return {}
        assert issubclass(self.settings_cls, CommandLine)
        found = read_recipe(name, self.settings_cls.model_fields.keys() - {"recipe"})
        dropped = self.settings_cls.overruled(given, found)
        return {option: value for option, value in found.items() if option not in dropped}


class _Flags(CliSettingsSource[Any]):
    """The command line, whose JSON objects mean what they say."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Decode a list's items, which were joined as JSON."""
        # pydantic-settings doubles every backslash of an item, for Windows' paths: a prompt's "\n" would be a backslash and an n,
        # and a quote in a string would end it.
        if isinstance(value, str):
            value = value.replace("\\\\", "\\") if "{" in value else value.replace('\\\\"', '\\"')
        return super().decode_complex_value(field_name, field, value)
