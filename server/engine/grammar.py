"""Grammars as plain values. A file of its own, because the process that tries grammars imports little else."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

GrammarKind = Literal["json_object", "json_schema", "regex", "lark"]
MAX_CHARACTERS = 65_536


class GrammarError(Exception):
    """A grammar that cannot be followed, with the reason."""


class CrowdedError(Exception):
    """A tenant already has the maximum number of grammars waiting to be tried."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """The set of texts that an answer may be, from its first character to its last."""

    kind: GrammarKind
    text: str = ""
    """A JSON schema, a regular expression, or a grammar in llguidance's variant of Lark; empty for `json_object`."""
    field: str = dataclasses.field(default="grammar", compare=False)
    """Name of the client's field, used in error messages."""
