"""What the programs of this package share: their flags come from the command line, and a wrong one is said in a line.

A program with a `recipe` among its flags takes from that what the command line does not say.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, CliSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from lori.flags import add_argument, refusing_flags
from training.recipe import RecipeError, files_of, read_recipe


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
        """Returns what was given in code, and the recipe; pydantic-settings puts the command line before them where asked to."""
        return init_settings, _Recipe(settings_cls)

    @classmethod
    def overruled(cls, given: Mapping[str, Any], told: Mapping[str, Any]) -> set[str]:  # noqa: ARG003  # for those with recipes
        """Returns which of the options that a recipe has `told` mean nothing beside those `given` as flags."""
        return set()

    @classmethod
    def from_arguments(cls) -> Self:
        """Reads the command line; ends the program with 2 and the flag's name where one is wrong."""
        try:
            with refusing_flags(cls.model_fields, lambda: cls._files(flags())):
                flags = _Flags(cls, cli_parse_args=True, add_argument_method=add_argument)
                return cls(_cli_settings_source=flags)
        except RecipeError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error

    @classmethod
    def _files(cls, given: Mapping[str, Any]) -> dict[str, Path]:
        """Returns the recipe's file of each option that was not `given` as a flag."""
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
        """Decodes a list's items, which were joined as JSON."""
        # pydantic-settings doubles every backslash of an item, for Windows' paths: a prompt's "\n" would be a backslash and an n,
        # and a quote in a string would end it.
        if isinstance(value, str):
            value = value.replace("\\\\", "\\") if "{" in value else value.replace('\\\\"', '\\"')
        return super().decode_complex_value(field_name, field, value)
