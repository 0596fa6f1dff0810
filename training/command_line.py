"""The command line of this package's programs: flags, recipes, and one-line errors.

A recipe is a YAML file with options of a program, by field name. A flag on the command line overrides the recipe's option.
`extends` lists recipes to start from; later ones override earlier ones. A shipped recipe is given by name, any other by its path
relative to the recipe's folder.
"""

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, CliSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from safetensors import SafetensorError

from lori.errors import LoriError
from lori.flags import Headings, help_formatter, refusing_flags

SHIPPED_RECIPES = Path(__file__).parent / "recipes"


class RecipeError(LoriError):
    """A recipe that cannot be read. The message names the file and its content that is wrong."""


def read_recipe(name: str, option_names: Collection[str], folder: Path | None = None) -> dict[str, Any]:
    """Return the options of a recipe: a shipped one by name, or a file if `name` ends in .yaml.

    A file's path is relative to `folder`, or to the working directory without one. Raises `RecipeError` if the recipe does not
    exist, is not a YAML mapping, extends itself, or has keys that are not in `option_names`.
    """
    return {option: value for option, (_, value) in _read(_find(name, folder or Path()), option_names, ()).items()}


def recipe_files(name: str, option_names: Collection[str]) -> dict[str, Path]:
    """Return the file that sets each option of a recipe. Raises as `read_recipe`."""
    return {option: path for option, (path, _) in _read(_find(name, Path()), option_names, ()).items()}


def _read(path: Path, option_names: Collection[str], ancestors: tuple[Path, ...]) -> dict[str, tuple[Path, Any]]:
    if path in ancestors:
        raise RecipeError(f"{path} extends itself: " + " -> ".join(file.name for file in (*ancestors, path)))
    content = _load(path)
    extends = content.pop("extends", [])
    if unknown := [key for key in content if key not in option_names]:
        raise RecipeError(f"{path} has unknown keys: {', '.join(map(repr, unknown))}")
    options: dict[str, tuple[Path, Any]] = {}
    for name in [extends] if isinstance(extends, str) else extends:
        options |= _read(_find(str(name), path.parent), option_names, (*ancestors, path))
    return options | {option: (path, value) for option, value in content.items()}


def _find(name: str, folder: Path) -> Path:
    if name.endswith((".yaml", ".yml")):
        return (folder / name).resolve()
    path = SHIPPED_RECIPES / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in SHIPPED_RECIPES.glob("*.yaml")))
        raise RecipeError(f"there is no recipe {name!r}: known are {shipped}; a file's name ends in .yaml")
    return path


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RecipeError(f"{path} is no recipe: expected options by name")
    if not isinstance(content.get("extends", []), str | list):
        raise RecipeError(f"{path} has an 'extends' that is neither a recipe's name nor a list of them")
    return content


def run_program(program: Callable[[], str], interrupted: str = "interrupted") -> int:
    """Run `program`, print the message it returns, and return the exit code.

    If Ctrl+C ends it, print `interrupted`, or the message of the `KeyboardInterrupt` if it has one.
    Under `torchrun` only the process of rank 0 prints the message. Any other process prints its errors, with its rank, since an
    error may occur in that process alone.
    """
    process = os.environ.get("RANK", "0")
    is_first = process == "0"
    try:
        message = program()
    except (LoriError, OSError, SafetensorError) as error:
        print("error:" if is_first else f"error of process {process}:", error, file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        if is_first:
            print(str(error) or interrupted, file=sys.stderr)
        return 130
    if is_first:
        print(message)
    return 0


class CommandLine(BaseSettings):
    """The flags of a program. Environment variables are not read: RANK and SEED, for example, have other meanings there."""

    model_config = SettingsConfigDict(
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_exit_on_error=False,
        use_attribute_docstrings=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
    )
    GROUPS: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Fields under each heading of `--help`; without any, all flags are in one list."""
    USAGE: ClassVar[str] = "[--FLAG VALUE ...]"  # all flags would fill a page

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003  # pydantic-settings' signature
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources: arguments of the constructor, then the recipe. pydantic-settings puts the command line first."""
        return init_settings, _RecipeSource(settings_cls)

    @classmethod
    def overridden_options(cls, flags: Mapping[str, Any], recipe: Mapping[str, Any]) -> set[str]:  # noqa: ARG003  # an override's
        """Return the options of `recipe` that lose their meaning because of the options given as `flags`."""
        return set()

    @classmethod
    def from_arguments(cls) -> Self:
        """Parse the command line. A wrong flag is named on stderr and ends the program with exit code 2."""
        try:
            with refusing_flags(cls.model_fields, lambda: cls._recipe_files(flags())):
                flags = _FlagSource(
                    cls,
                    cli_prog_name=_program_name(),
                    cli_hide_none_type=True,
                    add_argument_method=Headings(cls.GROUPS).add_argument,
                    formatter_class=help_formatter,
                )
                flags.root_parser.usage = f"%(prog)s {cls.USAGE}"
                return cls(_cli_settings_source=flags(args=True))
        except RecipeError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error

    @classmethod
    def _recipe_files(cls, given: Mapping[str, Any]) -> dict[str, Path]:
        """Return, for each option of the recipe that was not `given` as a flag, the file that sets it."""
        if not (name := given.get("recipe")):
            return {}
        return {option: file for option, file in recipe_files(name, cls.model_fields).items() if option not in given}


def _program_name() -> str:
    """Return the command that started this program, such as `python -m training.fit`."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


class _RecipeSource(PydanticBaseSettingsSource):
    """The options of the recipe that an earlier source names, if any."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Raise `NotImplementedError`: a recipe is read as a whole."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        given = self.current_state
        if not (name := given.get("recipe")):
            return {}
        assert issubclass(self.settings_cls, CommandLine)
        recipe = read_recipe(name, self.settings_cls.model_fields.keys() - {"recipe"})
        dropped = self.settings_cls.overridden_options(given, recipe)
        return {option: value for option, value in recipe.items() if option not in dropped}


class _FlagSource(CliSettingsSource[Any]):
    """The command line, with backslashes in JSON objects left as they were typed."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Decode the items of a list, which pydantic-settings joined as JSON."""
        # pydantic-settings doubles every backslash of an item, for the sake of Windows paths. The "\n" of a prompt would become a
        # backslash and an n, and an escaped quote would end its string.
        if isinstance(value, str):
            value = value.replace("\\\\", "\\") if "{" in value else value.replace('\\\\"', '\\"')
        return super().decode_complex_value(field_name, field, value)
