"""A row: a prompt with a completion, a conversation, or a prompt with a better and a worse answer."""

from typing import Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from lori.template import Message, Template, Text
from training.data.faults import Kind

Needs = Literal["text", "completion", "prompt", "preference"]
"""What a row must have beside its prompt: a completion with text in it, any completion (the base model may answer nothing), no
completion, or a pair of answers."""


class Row(BaseModel):
    """One row. Fields that training does not read (a label, a licence) are kept for whoever does."""

    model_config = ConfigDict(extra="allow")

    example: ClassVar[str] = ""
    """How a row looks that has what this form needs beside a prompt, as JSON."""

    prompt: Text | list[Message] = ""
    completion: Text | None = None
    messages: list[Message] | None = None
    """Another form of the first two: the last one is the assistant's. It is read into them."""
    chosen: Text | None = None
    """The better answer of a pair."""
    rejected: Text | None = None
    """The worse one."""
    template: Template | None = None
    """Overrides the run's."""
    truncated: bool = False
    """The completion was cut: no end-of-text is learnt after it."""
    _origin: str = PrivateAttr("a row")

    @model_validator(mode="after")
    def _one_form(self) -> "Row":
        if self.messages is not None:
            self._read_messages(self.messages)
        if not self.prompt:
            raise _fault("missing field", "has no 'prompt' and no 'messages'")
        if self.completion is not None and (self.chosen, self.rejected) != (None, None):
            raise _fault("two forms", "has both 'completion' and 'chosen' or 'rejected', expected one form")
        if (self.chosen is None) != (self.rejected is None):
            raise _fault("missing field", "has one of 'chosen' and 'rejected', expected both")
        if self.chosen is not None and self.chosen == self.rejected:
            raise _fault("wrong value", "'chosen' and 'rejected' are the same")
        if self.truncated and not self.completion:
            raise _fault("wrong value", "is 'truncated' and has no completion")
        return self

    def _read_messages(self, messages: list[Message]) -> None:
        if self.prompt or not (self.completion is self.chosen is self.rejected is None):
            raise _fault("two forms", "has both 'messages' and 'prompt' or an answer, expected one form")
        if len(messages) < 2 or messages[-1].role != "assistant":
            raise _fault("wrong value", "'messages' must end with an assistant's message after at least one other")
        self.prompt, self.completion, self.messages = messages[:-1], messages[-1].content, None

    @property
    def origin(self) -> str:
        """Where the row was read, such as "data.jsonl line 3"."""
        return self._origin

    def at(self, origin: str) -> "Row":
        """Note where the row was read, and return it."""
        self._origin = origin
        return self

    @property
    def prompt_text(self) -> str:
        """The prompt as one string, for sorting and messages."""
        return self.prompt if isinstance(self.prompt, str) else "\n".join(m.content for m in self.prompt)

    @property
    def content(self) -> tuple[object, ...]:
        """What is learnt of the row: rows of equal content are duplicates."""
        prompt = self.prompt if isinstance(self.prompt, str) else tuple((m.role, m.content) for m in self.prompt)
        return prompt, self.completion, self.chosen, self.rejected

    def lack(self, needs: Needs) -> tuple[Kind, str] | None:
        """Return which fault the row has where `needs` is asked of it, if any; whitespace alone is no answer."""
        if needs == "preference":
            if self.chosen is None or self.rejected is None:
                return "missing field", "has no 'chosen' and 'rejected'"
            empty = [name for name in ("chosen", "rejected") if not getattr(self, name).strip()]
            return ("empty completion", f"{' and '.join(empty)} is empty") if empty else None
        if needs != "prompt" and self.completion is None:
            return "no completion", "has 'chosen' and 'rejected', expected 'completion'" if self.chosen is not None else ""
        return ("empty completion", "") if needs == "text" and not (self.completion or "").strip() else None

    def answered(self, completion: str, template: Template | None, truncated: bool) -> dict[str, Any]:
        """Return this row as a JSON object with another completion, right under `template`, or under any."""
        prompt = self.prompt if isinstance(self.prompt, str) else [m.model_dump() for m in self.prompt]
        return {"prompt": prompt, "completion": completion, "template": template, "truncated": truncated}


def _fault(kind: Kind, message: str) -> PydanticCustomError:
    return PydanticCustomError(kind, message)  # It would fill in what stands in braces: our messages have none.


def fault_of(error: ValidationError) -> tuple[Kind, str]:
    """Return the kind of a row's first fault, and all of them in words."""
    first, *_ = found = error.errors()
    kinds: dict[str, Kind] = {kind: kind for kind in get_args(Kind)} | {"missing": "missing field"}
    kind = kinds.get(first["type"]) or ("wrong type" if first["type"].endswith("_type") else "wrong value")
    where = [".".join(map(str, e["loc"])) for e in found]
    said = [e["msg"].removeprefix("Value error, ") for e in found]
    return kind, "; ".join(f"{place}: {words}" if place else words for place, words in zip(where, said, strict=True))
