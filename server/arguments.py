"""Flags from the command line, for all programs of the server."""

from argparse import Action, ArgumentParser, HelpFormatter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from pydantic_settings import BaseSettings, CliSettingsSource

from lori.flags import add_argument, refusing_flags
from server.migration.flags import FLAGS
from server.settings import Settings

Read = TypeVar("Read", bound=BaseSettings)
NUM_COLUMNS = 80
UNSET = (" (default: null)", " (default: False)", " (default: [])")
"""Defaults that say no more than that a flag is absent."""


def read_arguments(settings: type[Read], groups: Mapping[str, Sequence[str]] | None = None) -> Read:
    """Read the command line; end the program with 2, and a line that names the flag, where one is wrong.

    `groups` are the fields under each heading of `--help`, in order.
    """
    # Of programs that serve: what others are told differs too much.
    hints = FLAGS if issubclass(settings, Settings) else None
    with refusing_flags(settings.model_fields, hints=hints):
        flags: CliSettingsSource[ArgumentParser] = CliSettingsSource(
            settings,
            cli_exit_on_error=False,
            cli_hide_none_type=True,
            add_argument_method=partial(_add, _Headings(groups or {})),
            formatter_class=partial(HelpFormatter, width=NUM_COLUMNS),
        )
        if groups:  # all flags by their names alone would fill a page
            flags.root_parser.usage = "%(prog)s [--FLAG VALUE ...]"
        return settings(_cli_settings_source=flags(args=True))


class _Headings:
    """Which heading of `--help` a flag is under."""

    def __init__(self, fields: Mapping[str, Sequence[str]]) -> None:
        self._fields = fields
        self._groups: dict[str, Any] = {}

    def group(self, parser: ArgumentParser, field: str) -> Any:
        """Return the argparse group for `field`, or `parser` itself where no heading names it."""
        if not self._groups:  # in this order, whichever flag comes first
            self._groups = {heading: parser.add_argument_group(heading) for heading in self._fields}
        return next((self._groups[heading] for heading, fields in self._fields.items() if field in fields), parser)


def _add(headings: _Headings, parser: ArgumentParser, *names: str, **kwargs: Any) -> Action:
    for unset in UNSET:
        kwargs["help"] = kwargs["help"].removesuffix(unset)
    return add_argument(headings.group(parser, kwargs.get("dest", "")), *names, **kwargs)
