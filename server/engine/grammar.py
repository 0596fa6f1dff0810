"""Grammars as plain values. A file of its own: the process that tries grammars imports this and little else."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

GrammarKind = Literal["json_object", "json_schema", "regex", "lark"]
MAX_CHARACTERS = 65_536


class GrammarError(Exception):
    """A grammar that cannot be followed: says why."""


class CrowdedError(Exception):
    """A tenant has so many grammars that wait to be tried that one more is not taken."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """All that an answer may be, from its first character to its last."""

    kind: GrammarKind
    text: str = ""
    """A JSON schema, a regular expression, or a grammar in llguidance's variant of Lark; nothing for `json_object`."""
    field: str = dataclasses.field(default="grammar", compare=False)
    """What the client called it, and a refusal does."""
