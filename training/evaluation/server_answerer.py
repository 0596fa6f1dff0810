"""A running server as an answerer, asked over HTTP as any client asks it: POST /generate and its log-probabilities."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from tqdm import tqdm

from lori.loopback import direct_mounts
from lori.template import Message, Template, render_completion
from training.evaluation.answerer import Answer, AnswerError, LogLikelihood, Prompt, Sampling

TIMEOUT_S = 600.0
Ask = Callable[[str, Mapping[str, Any]], Awaitable[dict[str, Any]]]
"""Posts fields to a path, and returns the reply."""
Asked = TypeVar("Asked")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Served:
    """An adapter as the server has it."""

    version: str
    templates: Sequence[Template]
    """What it was trained on, the preferred one first."""


@dataclass(frozen=True, slots=True)
class Server:
    """The server at `url`, asked up to `concurrency` things together, with `api_key` where it has keys."""

    url: str
    concurrency: int = 32
    api_key: str | None = None

    def adapter(self, name: str) -> Served:
        """Return what the server says of the adapter called `name`. Raises `AnswerError`."""

        async def asked() -> dict[str, Any]:
            async with self._client() as http:
                return await self._sent(http.get(f"/adapters/{quote(name)}"))

        found = asyncio.run(asked())
        return Served(found["version"], found["templates"])

    def ask_all(self, measure: Callable[[Ask, Asked], Awaitable[Found]], asked: Sequence[Asked]) -> list[Found]:
        """Return what `measure` finds for each of `asked`. The first that fails ends all others: raises its `AnswerError`."""
        return asyncio.run(self._ask_all(measure, asked))

    async def _ask_all(self, measure: Callable[[Ask, Asked], Awaitable[Found]], asked: Sequence[Asked]) -> list[Found]:
        gate = asyncio.Semaphore(self.concurrency)
        async with self._client() as http:
            with tqdm(total=len(asked), unit="request", disable=None) as bar:

                async def one(item: Asked) -> Found:
                    async with gate:
                        found = await measure(ask, item)
                    bar.update()
                    return found

                async def ask(path: str, fields: Mapping[str, Any]) -> dict[str, Any]:
                    return await self._sent(http.post(path, json=fields))

                try:
                    async with asyncio.TaskGroup() as group:
                        tasks = [group.create_task(one(item)) for item in asked]
                except* AnswerError as errors:
                    raise errors.exceptions[0] from errors
        return [task.result() for task in tasks]

    def _client(self) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=self.concurrency)
        mounts = direct_mounts(self.url)
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=TIMEOUT_S, limits=limits, mounts=mounts)

    async def _sent(self, request: Awaitable[httpx.Response]) -> dict[str, Any]:
        try:
            reply = await request
        except httpx.HTTPError as error:
            said = str(error) or type(error).__name__
            raise AnswerError(f"no answer from {self.url} ({said}): is `python -m server` running there?") from error
        if reply.is_error:
            is_ours = "json" in reply.headers.get("content-type", "")
            raise AnswerError(
                f"the server answered {reply.status_code}: {reply.json()['error']['message'] if is_ours else reply.text}"
            )
        answer: dict[str, Any] = reply.json()
        return answer


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
