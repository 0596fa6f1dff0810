"""Flags from the command line, for all programs of the server."""

from typing import TypeVar

from pydantic_settings import BaseSettings

from lori.flags import refusing_flags

Read = TypeVar("Read", bound=BaseSettings)


def read_arguments(settings: type[Read]) -> Read:
    """Reads the command line; ends the program with 2, and a line that names the flag, where one is wrong."""
    with refusing_flags(settings.model_fields):
        return settings(_cli_parse_args=True, _cli_exit_on_error=False)
