"""Rows of training data: a prompt with a completion, a conversation, or a prompt with a better and a worse answer."""

from typing import Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from lori.template import Message, Template, Text
from training.data.faults import Kind

Needs = Literal["text", "completion", "prompt", "preference"]
"""What a row must have besides its prompt. text: a completion that is not blank. completion: any completion, since an answer of
the base model may be empty. prompt: nothing. preference: a pair of answers."""


class Row(BaseModel):
    """One row. Fields that training does not read (such as a label or a licence) are kept."""

    model_config = ConfigDict(extra="allow")

    example: ClassVar[str] = ""
    """A sample row of this form as JSON, for error messages. Empty if a row needs nothing besides a prompt."""

    prompt: Text | list[Message] = ""
    completion: Text | None = None
    messages: list[Message] | None = None
    """A conversation instead of `prompt` and `completion`; it is split into them. The last message must be the assistant's."""
    chosen: Text | None = None
    """The better answer of a preference pair."""
    rejected: Text | None = None
    """The worse answer of a preference pair."""
    template: Template | None = None
    """Overrides the run's templates."""
    truncated: bool = False
    """Whether the completion was cut. Then no end-of-text is learned after it."""
    _source: str = PrivateAttr("")
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
        """Place of the row, such as "data.jsonl line 3"."""
        return self._origin

    @property
    def source(self) -> str:
        """The source of the row as it was given; empty if the row was not read from one."""
        return self._source

    def set_origin(self, origin: str, source: str = "") -> "Row":
        """Set the row's place and source, and return the row."""
        self._source, self._origin = source, origin
        return self

    @property
    def answer_text(self) -> str:
        """The completion, or the better answer of a pair; empty without either."""
        return self.completion or self.chosen or ""

    @property
    def prompt_text(self) -> str:
        """The prompt as one string, for sorting and messages."""
        return self.prompt if isinstance(self.prompt, str) else "\n".join(m.content for m in self.prompt)

    @property
    def content(self) -> tuple[object, ...]:
        """The trained content of the row. Rows of equal content are duplicates."""
        prompt = self.prompt if isinstance(self.prompt, str) else tuple((m.role, m.content) for m in self.prompt)
        return prompt, self.completion, self.chosen, self.rejected

    def missing(self, needs: Needs) -> tuple[Kind, str] | None:
        """Return the fault (kind, detail) of a row that does not have what `needs` asks for, or None. A blank answer is none."""
        if needs == "preference":
            if self.chosen is None or self.rejected is None:
                return "missing field", "has no 'chosen' and 'rejected'"
            empty = [name for name in ("chosen", "rejected") if not getattr(self, name).strip()]
            return ("empty completion", f"{' and '.join(empty)} is empty") if empty else None
        if needs != "prompt" and self.completion is None:
            return "no completion", "has 'chosen' and 'rejected', expected 'completion'" if self.chosen is not None else ""
        return ("empty completion", "") if needs == "text" and not (self.completion or "").strip() else None

    def with_completion(self, completion: str, template: Template | None, truncated: bool) -> dict[str, Any]:
        """Return this row as a JSON object with another completion, valid under `template`, or under any template if None."""
        prompt = self.prompt if isinstance(self.prompt, str) else [m.model_dump() for m in self.prompt]
        return {"prompt": prompt, "completion": completion, "template": template, "truncated": truncated}


def _fault(kind: Kind, message: str) -> PydanticCustomError:
    return PydanticCustomError(kind, message)  # pydantic treats braces in the message as placeholders; our messages have none


def fault_of(error: ValidationError) -> tuple[Kind, str]:
    """Return the kind of a row's first fault, and the messages of all of its faults."""
    first, *_ = errors = error.errors()
    kinds: dict[str, Kind] = {kind: kind for kind in get_args(Kind)} | {"missing": "missing field"}
    kind = kinds.get(first["type"]) or ("wrong type" if first["type"].endswith("_type") else "wrong value")
    fields = [".".join(map(str, e["loc"])) for e in errors]
    messages = [e["msg"].removeprefix("Value error, ") for e in errors]
    return kind, "; ".join(f"{name}: {message}" if name else message for name, message in zip(fields, messages, strict=True))
