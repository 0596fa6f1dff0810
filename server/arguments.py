"""Flags from the command line, for all programs of the server."""

import sys
from typing import TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsError

from lori.flags import flag_faults, refused_arguments

Read = TypeVar("Read", bound=BaseSettings)


def read_arguments(settings: type[Read]) -> Read:
    """Reads the command line; ends the program with 2, and a line that names the flag, where one is wrong."""
    try:
        return settings(_cli_parse_args=True, _cli_exit_on_error=False)
    except ValidationError as error:
        print(f"error: {flag_faults(error)}", file=sys.stderr)
        raise SystemExit(2) from error
    except SettingsError as error:
        print(f"error: {refused_arguments(error, settings.model_fields)}", file=sys.stderr)
        raise SystemExit(2) from error
