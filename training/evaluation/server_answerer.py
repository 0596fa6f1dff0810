"""A running server as an answerer: it sees what a client sees, POST /generate and its log-probabilities. Knows no tensor."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import httpx
from tqdm import tqdm

from lori.template import Message, Template
from training.evaluation.answerer import AnswerError, LogLikelihood, Prompt, Sampling

TIMEOUT_S = 600.0
Form = Literal["prompt", "messages"]
Ask = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]
Asked = TypeVar("Asked")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Served:
    """An adapter as the server has it."""

    version: str
    templates: Sequence[Template]
    """What it was trained on, the preferred one first."""


class ServerAnswerer:
    """Asks the server at `url`, up to `concurrency` requests together, with `api_key` where it has keys.

    `choice` are the fields that choose the adapters, in each request. `form` sends a prompt as it stands, or as a conversation,
    which the server writes in the adapters' own template.
    """

    def __init__(
        self, url: str, choice: Mapping[str, Any], form: Form = "prompt", concurrency: int = 32, api_key: str | None = None
    ) -> None:
        self._url, self._choice, self._form, self._concurrency = url, choice, form, concurrency
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def complete(self, prompts: Sequence[Prompt], how: Sampling) -> list[list[str]]:
        """See `Answerer`. A prompt's own seed is `seed` and its place."""
        fields = {"max_tokens": how.max_tokens, "stop": how.stop, "n": how.num_answers, "temperature": how.temperature}

        async def answer(ask: Ask, place: int) -> list[str]:
            reply = await ask(self._prompt(prompts[place]) | fields | {"seed": how.seed + place})
            return [choice["text"] for choice in reply["choices"]] if how.num_answers > 1 else [reply["text"]]

        return asyncio.run(self._ask_all(answer, range(len(prompts))))

    def log_likelihoods(self, texts: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        """See `Answerer`."""
        return asyncio.run(self._ask_all(_score, texts))

    def adapter(self, name: str) -> Served:
        """Returns what the server says of the adapter called `name`. Raises `AnswerError`."""

        async def asked() -> dict[str, Any]:
            async with self._client() as http:
                return await self._sent(http.get(f"/adapters/{quote(name)}"))

        found = asyncio.run(asked())
        return Served(found["version"], found["templates"])

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=self._concurrency)
        return httpx.AsyncClient(base_url=self._url, headers=self._headers, timeout=TIMEOUT_S, limits=limits)

    def _prompt(self, prompt: Prompt) -> dict[str, Any]:
        if self._form == "messages":
            turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt
            return {"messages": [turn.model_dump() for turn in turns]}
        return {"prompt": prompt if isinstance(prompt, str) else "\n".join(turn.content for turn in prompt)}

    async def _ask_all(self, measure: Callable[[Ask, Asked], Awaitable[Found]], asked: Sequence[Asked]) -> list[Found]:
        """Returns what `measure` finds for each of `asked`. The first that fails ends all others, and its error is told."""
        gate = asyncio.Semaphore(self._concurrency)
        async with self._client() as http:
            with tqdm(total=len(asked), unit="request", disable=None) as bar:

                async def one(item: Asked) -> Found:
                    async with gate:
                        found = await measure(ask, item)
                    bar.update()
                    return found

                async def ask(fields: Mapping[str, Any]) -> dict[str, Any]:
                    return await self._sent(http.post("/generate", json={**fields, **self._choice}))

                try:
                    async with asyncio.TaskGroup() as group:
                        tasks = [group.create_task(one(item)) for item in asked]
                except* AnswerError as errors:
                    raise errors.exceptions[0] from errors
        return [task.result() for task in tasks]

    async def _sent(self, request: Awaitable[httpx.Response]) -> dict[str, Any]:
        try:
            reply = await request
        except httpx.HTTPError as error:
            said = str(error) or type(error).__name__
            raise AnswerError(f"no answer from {self._url} ({said}): is `python -m server` running there?") from error
        if reply.is_error:
            is_ours = "json" in reply.headers.get("content-type", "")
            raise AnswerError(
                f"the server answered {reply.status_code}: {reply.json()['error']['message'] if is_ours else reply.text}"
            )
        answer: dict[str, Any] = reply.json()
        return answer


async def _score(ask: Ask, text: tuple[str, str]) -> LogLikelihood:
    prompt, completion = text
    found = (await ask({"prompt": prompt + completion, "echo": True, "logprobs": 0, "max_tokens": 0}))["logprobs"]
    starts = found["text_offset"]
    ends = [*starts[1:], len(prompt + completion)]  # of a character's many tokens all but the last end where they begin
    places = list(zip(found["token_logprobs"], starts, ends, strict=True))[1:]  # nothing predicts the first token
    values = [value for value, start, end in places if start >= len(prompt) or end > len(prompt)]
    return LogLikelihood(sum(values), len(values))
