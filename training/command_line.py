"""What the programs of this package share: their flags come from the command line alone, and a wrong one is said in a line."""

import sys
from typing import Self

from pydantic import ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from lori.flags import flag_faults


class CommandLine(BaseSettings):
    """A program's flags. RANK or SEED in the environment means something else, so nothing is read from there."""

    model_config = SettingsConfigDict(
        cli_kebab_case=True, cli_implicit_flags=True, use_attribute_docstrings=True, frozen=True, extra="forbid"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  # pydantic-settings' signature
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Returns what was given in code; pydantic-settings puts the command line before it where that is asked for."""
        return (init_settings,)

    @classmethod
    def from_arguments(cls) -> Self:
        """Reads the command line; ends the program with 2 and the flag's name where one is wrong."""
        try:
            return cls(_cli_parse_args=True)
        except ValidationError as error:
            print(f"error: {flag_faults(error)}", file=sys.stderr)
            raise SystemExit(2) from error
