"""A running server as an answerer, over HTTP like any client: POST /generate, with log-probabilities for scoring."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from tqdm import tqdm

from lori.loopback import direct_mounts
from lori.template import Message, Template, render_completion
from training.evaluation.answerer import Answer, AnswerError, LogLikelihood, Prompt, Sampling

TIMEOUT_S = 600.0
Ask = Callable[[str, Mapping[str, Any]], Awaitable[dict[str, Any]]]
"""Function that posts JSON fields to a path and returns the JSON reply."""
InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter of the server."""

    name: str
    version: str
    templates: Sequence[Template]
    """Templates that the adapter was trained on, the preferred one first."""
    merge_weights: Sequence[float] = ()
    """Its weights in the named merge that it is a part of: one, or one for each block of layers. Empty if it stands alone."""

    @property
    def reference(self) -> str:
        """The adapter as `name@version`."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Server:
    """The server at `url`, with up to `concurrency` requests at a time, and with `api_key` if it uses keys."""

    url: str
    concurrency: int = 32
    api_key: str | None = None

    def adapters(self, name: str) -> list[ServedAdapter]:
        """Return the adapters that `name` means on the server: one, or those of a named merge. Raises `AnswerError`."""
        return asyncio.run(self._adapters(name))

    async def _adapters(self, name: str) -> list[ServedAdapter]:
        async with self._client() as http:
            merge = await self._send(http.get(f"/merges/{quote(name)}"))
            if merge.status_code == HTTPStatus.NOT_FOUND:
                content = self._content(await self._send(http.get(f"/adapters/{quote(name)}")))
                return [ServedAdapter(content["name"], content["version"], content["templates"])]
            adapters = []
            for term in self._content(merge)["adapters"]:
                content = self._content(await self._send(http.get(f"/adapters/{term['name']}@{term['version']}")))
                weights = [term["weight"] * block for block in term.get("block_weights", [1.0])]
                adapters.append(ServedAdapter(content["name"], content["version"], content["templates"], weights))
        return adapters

    def ask_all(self, measure: Callable[[Ask, InputT], Awaitable[OutputT]], items: Sequence[InputT]) -> list[OutputT]:
        """Return the result of `measure` for each of `items`. The first failure cancels the others and raises `AnswerError`."""
        return asyncio.run(self._ask_all(measure, items))

    async def _ask_all(self, measure: Callable[[Ask, InputT], Awaitable[OutputT]], items: Sequence[InputT]) -> list[OutputT]:
        semaphore = asyncio.Semaphore(self.concurrency)
        async with self._client() as http:
            with tqdm(total=len(items), unit="request", disable=None) as bar:

                async def measure_item(item: InputT) -> OutputT:
                    async with semaphore:
                        result = await measure(ask, item)
                    bar.update()
                    return result

                async def ask(path: str, fields: Mapping[str, Any]) -> dict[str, Any]:
                    return self._content(await self._send(http.post(path, json=fields)))

                try:
                    async with asyncio.TaskGroup() as group:
                        tasks = [group.create_task(measure_item(item)) for item in items]
                except* AnswerError as errors:
                    first = errors.exceptions[0]
                    raise first from first.__cause__  # without the group, which has an error of each request
        return [task.result() for task in tasks]

    def _client(self) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=self.concurrency)
        mounts = direct_mounts(self.url)
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=TIMEOUT_S, limits=limits, mounts=mounts)

    async def _send(self, request: Awaitable[httpx.Response]) -> httpx.Response:
        try:
            return await request
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise AnswerError(f"no answer from {self.url} ({reason}): is `python -m server` running there?") from error

    def _content(self, reply: httpx.Response) -> dict[str, Any]:
        if reply.is_error:
            is_json = "json" in reply.headers.get("content-type", "")
            raise AnswerError(
                f"the server answered {reply.status_code}: {reply.json()['error']['message'] if is_json else reply.text}"
            )
        try:
            content: dict[str, Any] = reply.json()
        except ValueError as error:
            raise AnswerError(f"{self.url} answered {reply.url.path} with no JSON: is it a server of adapters?") from error
        return content


@dataclass(frozen=True, slots=True)
class ServerAnswerer:
    """A server as an answerer.

    `selection`: the fields of each request that select the adapters. `versions`: the versions of these adapters in their order;
    in place of a named merge those of its adapters; None if the server selects the adapters. Raises `AnswerError` if other
    adapters answered, because a new version was published or the key's policy adds adapters.

    `is_automatic`: whether weights come from the prompt. Texts are then scored with the weights that the prompt alone gives.

    `template`: prompts are sent as they are (plain), or as a conversation, which the server formats by the base's chat template.
    """

    server: Server
    selection: Mapping[str, Any] = field(default_factory=dict)
    versions: Sequence[str] | None = ()
    template: Template = "plain"
    is_automatic: bool = False

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[str]]:
        """See `Answerer`. The seed of each prompt is `seed` plus the prompt's index."""
        options = {
            "max_tokens": sampling.max_tokens,
            "stop": sampling.stop,
            "n": sampling.num_answers,
            "temperature": sampling.temperature,
        }

        async def answer(ask: Ask, index: int) -> list[str]:
            fields = self._prompt_fields(prompts[index]) | {"seed": sampling.seed + index}
            reply = await self._generate(ask, {**fields, **options})
            return [choice["text"] for choice in reply["choices"]] if sampling.num_answers > 1 else [reply["text"]]

        return self.server.ask_all(answer, range(len(prompts)))

    def answers(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
        """Return one answer to each prompt. Ignores `sampling.num_answers`. The seed of each prompt is `seed` plus its index."""
        options = {"max_tokens": sampling.max_tokens, "stop": sampling.stop, "temperature": sampling.temperature}

        async def answer(ask: Ask, index: int) -> Answer:
            reply = await self._generate(ask, {**self._prompt_fields(prompts[index]), "seed": sampling.seed + index, **options})
            return Answer(reply["text"], reply["finish_reason"] == "stop")

        return self.server.ask_all(answer, range(len(prompts)))

    def have_room(self, prompts: Sequence[Prompt], max_tokens: int) -> list[bool]:
        """Return, for each prompt, whether the prompt and an answer of `max_tokens` fit the server's context."""

        async def has_room(ask: Ask, prompt: Prompt) -> bool:
            fields = {name: value for name, value in self._prompt_fields(prompt).items() if name != "template"}
            reply = await ask("/tokenize", fields)
            return bool(reply["count"] + max_tokens <= reply["max_model_len"])

        return self.server.ask_all(has_room, prompts)

    def log_likelihoods(self, texts: Sequence[tuple[Prompt, str]]) -> list[LogLikelihood]:
        """See `Answerer`."""

        async def score(ask: Ask, text: tuple[Prompt, str]) -> LogLikelihood:
            prompt = await self._render_prompt(ask, text[0])
            completion = render_completion(prompt, text[1], self.template)
            fields = {"prompt": prompt + completion, "echo": True, "logprobs": 0, "max_tokens": 0}
            selection = await self._resolve(ask, text[0]) if self.is_automatic else self.selection
            return _completion_likelihood((await self._generate(ask, fields, selection))["logprobs"], prompt, completion)

        return self.server.ask_all(score, texts)

    async def _generate(self, ask: Ask, fields: Mapping[str, Any], selection: Mapping[str, Any] | None = None) -> dict[str, Any]:
        reply = await ask("/generate", {**fields, **(self.selection if selection is None else selection)})
        used = reply["adapter"]
        if added := [f"{adapter['name']}@{adapter['version']}" for adapter in used if adapter["policy"]]:
            raise AnswerError(f"the key's policy adds {', '.join(added)} to every request: expected a key without a policy")
        if self.versions is not None and [adapter["version"] for adapter in used] != list(self.versions):
            names = [f"{adapter['name']}@{adapter['version']}" for adapter in used]
            expected = ", ".join(self.versions) or "the base"
            raise AnswerError(f"{', '.join(names) or 'the base'} answered, and {expected} is measured")
        return reply

    async def _resolve(self, ask: Ask, prompt: Prompt) -> dict[str, Any]:
        """Return the fields that select the adapters which `prompt` gets, with their weights."""
        adapters = (await self._generate(ask, {**self._prompt_fields(prompt), "max_tokens": 1}))["adapter"]
        names = [f"{adapter['name']}@{adapter['version']}" for adapter in adapters]
        return {"adapter": names, "weights": [adapter["weight"] for adapter in adapters]} if names else {}

    def _prompt_fields(self, prompt: Prompt) -> dict[str, Any]:
        if self.template == "plain":
            return {"prompt": prompt if isinstance(prompt, str) else "\n".join(turn.content for turn in prompt)}
        turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt
        return {"messages": [turn.model_dump() for turn in turns], "template": "chat"}

    async def _render_prompt(self, ask: Ask, prompt: Prompt) -> str:
        fields = self._prompt_fields(prompt)
        if self.template != "plain":
            fields = await ask("/detokenize", {"tokens": (await ask("/tokenize", {"messages": fields["messages"]}))["tokens"]})
        text: str = fields["prompt"]
        return text


def _completion_likelihood(logprobs: Mapping[str, Any], prompt: str, completion: str) -> LogLikelihood:
    starts = logprobs["text_offset"]
    # If several tokens make up one character, all but the last of them end where they begin.
    ends = [*starts[1:], len(prompt + completion)]
    tokens = list(zip(logprobs["token_logprobs"], starts, ends, strict=True))[1:]  # the first token is not predicted
    values = [value for value, start, end in tokens if start >= len(prompt) or end > len(prompt)]
    return LogLikelihood(sum(values), len(values))
