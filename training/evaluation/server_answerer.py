"""A running server as an answerer: it sees what a client sees, POST /generate and its log-probabilities. Knows no tensor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lori.template import Message, Template, render_completion
from training.evaluation.answerer import Answer, AnswerError, LogLikelihood, Prompt, Sampling
from training.evaluation.server import Ask, Server


@dataclass(frozen=True, slots=True)
class ServerAnswerer:
    """Asks `server`. `choice` are the fields that choose the adapters, in each request, and `versions` what they mean.

    Raises `AnswerError` where others answered: one was published anew meanwhile, or a key's policy adds some.

    `template` sends a prompt as it stands (plain), or as a conversation, which the server writes by the base's own template.
    """

    server: Server
    choice: Mapping[str, Any] = field(default_factory=dict)
    versions: Sequence[str] = ()
    template: Template = "plain"

    def complete(self, prompts: Sequence[Prompt], how: Sampling) -> list[list[str]]:
        """See `Answerer`. A prompt's own seed is `seed` and its place."""
        same = {"max_tokens": how.max_tokens, "stop": how.stop, "n": how.num_answers, "temperature": how.temperature}

        async def answer(ask: Ask, place: int) -> list[str]:
            own = self._prompt(prompts[place]) | {"seed": how.seed + place}
            reply = await self._generated(ask, {**own, **same})
            return [choice["text"] for choice in reply["choices"]] if how.num_answers > 1 else [reply["text"]]

        return self.server.ask_all(answer, range(len(prompts)))

    def answers(self, prompts: Sequence[Prompt], how: Sampling) -> list[Answer]:
        """Return one answer to each prompt, whatever `how.num_answers` is. A prompt's own seed is `seed` and its place."""
        same = {"max_tokens": how.max_tokens, "stop": how.stop, "temperature": how.temperature}

        async def answer(ask: Ask, place: int) -> Answer:
            reply = await self._generated(ask, {**self._prompt(prompts[place]), "seed": how.seed + place, **same})
            return Answer(reply["text"], reply["finish_reason"] == "stop")

        return self.server.ask_all(answer, range(len(prompts)))

    def have_room(self, prompts: Sequence[Prompt], max_tokens: int) -> list[bool]:
        """Say of each prompt whether the server's context holds it with an answer of so many tokens."""

        async def has_room(ask: Ask, prompt: Prompt) -> bool:
            fields = {name: value for name, value in self._prompt(prompt).items() if name != "template"}
            reply = await ask("/tokenize", fields)
            return bool(reply["count"] + max_tokens <= reply["max_model_len"])

        return self.server.ask_all(has_room, prompts)

    def log_likelihoods(self, texts: Sequence[tuple[Prompt, str]]) -> list[LogLikelihood]:
        """See `Answerer`."""

        async def score(ask: Ask, text: tuple[Prompt, str]) -> LogLikelihood:
            prompt = await self._written(ask, text[0])
            completion = render_completion(prompt, text[1], self.template)
            asked = {"prompt": prompt + completion, "echo": True, "logprobs": 0, "max_tokens": 0}
            return _sum((await self._generated(ask, asked))["logprobs"], prompt, completion)

        return self.server.ask_all(score, texts)

    async def _generated(self, ask: Ask, fields: Mapping[str, Any]) -> dict[str, Any]:
        reply = await ask("/generate", {**fields, **self.choice})
        if [adapter["version"] for adapter in reply["adapter"]] != list(self.versions):
            added = {True: " (the key's policy)", False: ""}
            found = [f"{adapter['name']}@{adapter['version']}{added[adapter['policy']]}" for adapter in reply["adapter"]]
            expected = ", ".join(self.versions) or "the base"
            raise AnswerError(f"{', '.join(found) or 'the base'} answered, and {expected} is measured")
        return reply

    def _prompt(self, prompt: Prompt) -> dict[str, Any]:
        if self.template == "plain":
            return {"prompt": prompt if isinstance(prompt, str) else "\n".join(turn.content for turn in prompt)}
        turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt
        return {"messages": [turn.model_dump() for turn in turns], "template": "chat"}

    async def _written(self, ask: Ask, prompt: Prompt) -> str:
        fields = self._prompt(prompt)
        if self.template != "plain":
            fields = await ask("/detokenize", {"tokens": (await ask("/tokenize", {"messages": fields["messages"]}))["tokens"]})
        written: str = fields["prompt"]
        return written


def _sum(found: Mapping[str, Any], prompt: str, completion: str) -> LogLikelihood:
    starts = found["text_offset"]
    ends = [*starts[1:], len(prompt + completion)]  # of a character's many tokens all but the last end where they begin
    places = list(zip(found["token_logprobs"], starts, ends, strict=True))[1:]  # nothing predicts the first token
    values = [value for value, start, end in places if start >= len(prompt) or end > len(prompt)]
    return LogLikelihood(sum(values), len(values))
