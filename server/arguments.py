"""Flags from the command line, for all programs of the server."""

from typing import TypeVar

from pydantic_settings import BaseSettings

from lori.flags import refusing_flags
from server.migration.flags import FLAGS
from server.settings import Settings

Read = TypeVar("Read", bound=BaseSettings)


def read_arguments(settings: type[Read]) -> Read:
    """Reads the command line; ends the program with 2, and a line that names the flag, where one is wrong."""
    # Of programs that serve: what others are told differs too much.
    hints = FLAGS if issubclass(settings, Settings) else None
    with refusing_flags(settings.model_fields, hints=hints):
        return settings(_cli_parse_args=True, _cli_exit_on_error=False)
