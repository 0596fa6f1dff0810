"""Engines that a test steps by hand, with tiny models, random adapters and fake runners for them."""

import string
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lori.adapter import Adapter
from lori.base_model import BaseModel, load_base_model
from lori.basis import Seeded
from lori.config import new_config
from lori.format import save_adapter
from lori.identity import BaseIdentity
from lori.named_merge import MergedAdapter, NamedMerge
from lori.packed_adapter import PackedReader
from lori.pool import AdapterPool
from lori.projection import Quantization
from lori.sparse import SparseB
from lori.store.store import AdapterStore
from lori.summary import summarise
from lori.template import Template, encode
from server.engine.adapters.cache import AdapterCache
from server.engine.adapters.loader import Loader
from server.engine.adapters.registry import Registry
from server.engine.adapters.residents import Residents, TierUsage
from server.engine.admission import Admission
from server.engine.engine import Engine
from server.engine.generate_request import GenerateRequest
from server.engine.model.runner import Runner
from server.engine.request import Chunk, DoneEvent, ErrorEvent, Event, Request, SamplingParams, TextEvent, TokenLogprob
from server.engine.request import Sequence as EngineSequence
from server.engine.sampling.grammars import Grammars
from server.engine.scheduling.kv_cache import KvCache
from server.engine.scheduling.scheduler import Scheduler
from server.engine.step import Emit
from server.loading import make_registry
from server.served_model import make_grammars, make_pool
from server.service.service import Service
from tests.server.plans import step_limits
from tests.tiny import save_tiny_model, tiny_llama_config, tiny_tokenizer

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EOS = 256


def save_writer_model(folder: Path) -> Path:
    """Write a tiny Llama with a context of 4096 tokens. Its likeliest token is always printable ASCII, so it never ends."""
    config = tiny_llama_config(EOS + 1, max_position_embeddings=4096, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(folder, config))
    printable = encode(tiny_tokenizer(), string.ascii_letters + string.digits + string.punctuation + " ").ids
    is_muted = torch.ones(EOS + 1, dtype=torch.bool)
    is_muted[printable] = False
    with torch.no_grad():
        model.get_output_embeddings().weight[is_muted] = 0  # One of the 95 others always scores above 0.
    model.save_pretrained(folder)
    return folder


def write_adapter(
    folder: Path,
    base: BaseModel,
    *,
    seed: int,
    rank: int = 4,
    stream: int = 0,
    targets: Sequence[str] = ALL_LINEAR,
    templates: tuple[Template, ...] = ("chat",),
) -> Adapter:
    """Write an adapter for `base` with a random B of density 0.3, large enough to change the model's output."""
    shapes = {name: s for name, s in base.identity.shapes.items() if name.rpartition(".")[2] in targets}
    random = torch.Generator().manual_seed(seed)
    modules = {}
    for name, (num_outputs, _) in shapes.items():
        mask = torch.rand(num_outputs, rank, generator=random) < 0.3
        modules[name] = SparseB.from_dense(torch.randn(num_outputs, rank, generator=random), mask)
    basis = Seeded(stream=stream)
    config = new_config(
        modules,
        basis,
        base.identity,
        alphas=dict.fromkeys(modules, 2.0 * rank),
        target_modules=targets,
        templates=templates,
        training={},
    )
    return save_adapter(Adapter(folder.name, config, modules, basis), folder)


def write_merge(folder: Path, name: str, base_digest: str, adapters: Sequence[MergedAdapter], about: str = "") -> None:
    """Write a named merge to a folder for `--merges`."""
    folder.mkdir(exist_ok=True)
    merge = NamedMerge(base_digest=base_digest, adapters=[*adapters], about=about)
    (folder / f"{name}.json").write_bytes(merge.to_bytes())


def write_adapters(place: Path, base: BaseModel) -> Path:
    """Write the adapters that the server's tests name. They have two ranks, two bases and different targets."""
    write_adapter(place / "math", base, seed=1)
    write_adapter(place / "safety", base, seed=2, templates=("chat", "plain"))
    write_adapter(place / "intent", base, seed=3, rank=6, stream=1, targets=("q_proj", "down_proj"), templates=("plain",))
    return place


def fold(model: PreTrainedModel, terms: Iterable[tuple[Adapter, float]]) -> PreTrainedModel:
    """Add weight * alpha / r * B A of each adapter to the weights of `model`, in their dtype, and return the model."""
    with torch.no_grad():
        for adapter, weight in terms:
            for name, b in adapter.modules.items():
                w = model.get_submodule(name).weight
                assert isinstance(w, torch.Tensor)
                a = adapter.basis.draw(name, adapter.config.r, w.shape[1]).to(w.dtype)
                w += weight * adapter.config.scale * b.dense().to(w.dtype) @ a
    return model


def greedy(model: PreTrainedModel, prompt_ids: Sequence[int], max_tokens: int) -> list[int]:
    """Return the continuation that transformers' own `generate` gives."""
    ids = torch.tensor([list(prompt_ids)])
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=EOS)
    assert isinstance(whole, torch.Tensor)
    return whole[0, len(prompt_ids) :].tolist()


@dataclass(slots=True)
class Heard:
    """The events of one choice of a request, and its sequence."""

    sequence: EngineSequence
    events: list[Event] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.sequence.output_ids

    @property
    def text(self) -> str:
        return "".join(e.text for e in self.events if isinstance(e, TextEvent))

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [one for e in self.events if isinstance(e, TextEvent) for one in e.logprobs]

    @property
    def is_done(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], DoneEvent | ErrorEvent)

    @property
    def done(self) -> DoneEvent:
        last = self.events[-1]
        assert isinstance(last, DoneEvent)
        assert sum(isinstance(e, DoneEvent) for e in self.events) == 1
        return last


@dataclass(slots=True)
class Rig:
    """An engine without a thread and a queue, which a test steps. After `run` all memory is free again."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    admission: Admission
    runner: Runner
    registry: Registry
    adapters: Mapping[str, Adapter]
    arrived: threading.Event = field(default_factory=threading.Event)
    """Set when an adapter has been read."""

    @property
    def scheduler(self) -> Scheduler:
        return self.engine.scheduler

    def decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def submit(self, request: Request) -> Heard:
        """Submit a request of one choice."""
        (heard,) = self.submit_choices(request)
        return heard

    def submit_choices(self, request: Request) -> list[Heard]:
        """Submit a request. Each of its choices gets its own events; all of them get an error."""
        heard: list[Heard] = []

        def emit(event: Event) -> None:
            for one in heard if isinstance(event, ErrorEvent) else [heard[event.choice]]:
                one.events.append(event)

        self.engine.submit(request, emit)
        heard += [Heard(sequence) for sequence in [*self.scheduler.waiting][-request.sampling.num_choices :]]
        return heard

    def ask(self, ask: GenerateRequest) -> Heard:
        return self.submit(self.admission.admit(ask))

    def step(self) -> None:
        """Run a step, and check the integrity of the scheduler and the adapter cache."""
        self.engine.step()
        self.scheduler.check_integrity()
        self.engine.adapter_cache.check_integrity([*self.scheduler.running])

    def step_on(self) -> None:
        """Run a step; if work is left but blocked on loading adapters, wait until one arrives."""
        self.engine.adapter_cache.on_arrival(self.arrived.set)
        self.arrived.clear()
        self.step()
        if self.scheduler.has_work and not self.engine.can_step:
            assert self.arrived.wait(60)
            self.engine.wake()

    def start(self, request: Request) -> Heard:
        """Submit a request and run steps until it runs, that is, until its adapters are pinned."""
        heard = self.submit(request)
        while heard.sequence in self.scheduler.waiting:
            self.step_on()
        return heard

    def finish(self) -> None:
        """Run steps until no sequence waits or runs, waiting for adapters that are being read."""
        while self.scheduler.has_work:
            self.step_on()
        assert self.scheduler.kv_cache.num_available == self.scheduler.kv_cache.num_blocks

    def run(self, asks: Sequence[GenerateRequest], joins: Sequence[int] | None = None) -> list[Heard]:
        """Run `asks` together to their ends. Each joins before the step whose index `joins` gives, by default the first."""
        at = dict(enumerate(joins or [0] * len(asks)))
        heard: dict[int, Heard] = {}
        for step in range(max(at.values()) + 1):
            for place in (p for p, join in at.items() if join == step):
                heard[place] = self.ask(asks[place])
            self.step()
        self.finish()
        return [heard[place] for place in range(len(asks))]


def build(
    folder: Path,
    adapters: Path | None = None,
    *,
    max_batch: int = 8,
    max_step_tokens: int = 16,
    num_blocks: int = 128,
    block_size: int = 16,
    max_stall: float = float("inf"),
    num_slots: int = 16,
    max_resident_bytes: int = 2**30,
    max_loaded_bytes: int = 2**30,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    device: str = "cpu",
    max_replayed: int | None = None,
) -> Rig:
    """Return a rig on the model in `folder`, assembled as `server.loading` does it."""
    base = load_base_model(str(folder), dtype, "eager", torch.device(device))
    entries = AdapterStore(adapters).current() if adapters else {}
    registry = make_registry(entries, summarise(entries, base.identity))
    pool = make_pool(base, registry, num_slots)
    loader = Loader(registry, PackedReader(base.identity, pool.layouts))
    adapter_cache = AdapterCache(pool, Residents(num_slots, max_resident_bytes), loader, max_loaded_bytes)
    runner = Runner(base.model, pool, num_blocks, block_size, max_batch if max_replayed is None else max_replayed, quantization)
    if device != "cpu":
        runner.prepare()
    limits = step_limits(max_batch, max_step_tokens, max_stall)
    scheduler = Scheduler(KvCache(num_blocks, block_size, base.identity.digest), adapter_cache, limits)
    context = min(base.model.config.max_position_embeddings, num_blocks * block_size)
    grammars = make_grammars(base)
    engine = Engine(scheduler, runner, adapter_cache, base.tokenizer.backend_tokenizer, [EOS], grammars=grammars)
    loaded = {name: entry.load(base.identity) for name, entry in entries.items()}
    admission = Admission(base.tokenizer, registry, context, num_slots, grammars=grammars)
    return Rig(engine, base.tokenizer, admission, runner, registry, loaded)


def rig_of(service: Service) -> Rig:
    """Return a rig on the engine of a service that was not started."""
    engine, admission = service.engine._engine, service.admission
    return Rig(engine, admission.tokenizer, admission, engine._executor.runner, service.registry, {})


class WatchedRunner:
    """A runner that counts the tokens it computes, and raises the error that `fault` returns for a chunk.

    The logits of a chunk for which `overflows` returns true are NaN.
    """

    def __init__(
        self,
        rig: Rig,
        fault: Callable[[Chunk], Exception | None] = lambda _: None,
        overflows: Callable[[Chunk], bool] = lambda _: False,
    ) -> None:
        self._runner, self._fault, self._overflows = rig.engine._executor.runner, fault, overflows
        self.num_tokens = 0
        self.broken_by: type[Exception] = SystemError
        """The type of error after which the device can compute nothing more."""
        rig.engine._executor.runner = cast(Runner, self)

    def is_broken(self, error: Exception) -> bool:
        return isinstance(error, self.broken_by)

    def forward(self, chunks: Sequence[Chunk], positions: Sequence[int]) -> torch.Tensor:
        for chunk in chunks:
            if error := self._fault(chunk):
                raise error
        self.num_tokens += sum(c.stop - c.start for c in chunks)
        row_chunks = [chunk for chunk in chunks for _ in range(chunk.start, chunk.stop)]
        logits = self._runner.forward(chunks, positions).clone()
        for row, position in enumerate(positions):
            if self._overflows(row_chunks[position]):
                logits[row] = torch.nan
        return logits


class ScriptedRunner:
    """A fake runner: after any prompt, the likeliest tokens are those of `script`, in order."""

    def __init__(self, script: Sequence[int]) -> None:
        self._script = script

    def is_broken(self, _: Exception) -> bool:
        return False

    def forward(self, chunks: Sequence[Chunk], positions: Sequence[int]) -> torch.Tensor:
        places = [(c.sequence, p) for c in chunks for p in range(c.start, c.stop)]
        logits = torch.zeros(len(positions), EOS + 1)
        for row, position in enumerate(positions):
            sequence, place = places[position]
            output = place + 1 - len(sequence.request.prompt_ids)
            logits[row, self._script[output] if 0 <= output < len(self._script) else 0] = 10.0
        return logits


def scripted(tokenizer: PreTrainedTokenizerBase, script: Sequence[int], *, max_step_tokens: int = 16) -> Rig:
    """Return a rig whose model generates `script`."""
    adapter_cache = empty_adapter_cache()
    limits = step_limits(4, max_step_tokens)
    scheduler = Scheduler(KvCache(256, 4, ""), adapter_cache, limits)
    runner = cast(Runner, ScriptedRunner(script))
    grammars = Grammars(tokenizer.backend_tokenizer, EOS + 1, [EOS])
    engine = Engine(scheduler, runner, adapter_cache, tokenizer.backend_tokenizer, [EOS], grammars=grammars)
    admission = Admission(tokenizer, Registry([]), 1024, grammars=grammars)
    return Rig(engine, tokenizer, admission, runner, Registry([]), {})


def empty_adapter_cache() -> AdapterCache:
    """Return the adapter cache of a server without adapters."""
    pool = AdapterPool({}, [], 0, 1, torch.float32)
    loader = Loader(Registry([]), PackedReader(BaseIdentity("none", "", {}), pool.layouts))
    return AdapterCache(pool, Residents(1, 1), loader, 1)


@dataclass
class FakeAdapterCache:
    """An adapter cache with nothing to load."""

    is_closed: bool = False

    def tier_usage(self) -> dict[str, TierUsage]:
        return {}

    def prefetch(self, request: Request) -> None:
        pass

    def on_arrival(self, notify: Callable[[], None]) -> None:
        self.notify = notify

    def close(self) -> None:
        self.is_closed = True


@dataclass
class FakeEngine:
    """A fake engine that gives each request an "x" in `num_steps` steps of about a millisecond. It dies in step `dies_at`."""

    num_steps: int = 3
    dies_at: int | None = None
    deadline: float | None = None
    """The answer of `time_left`: seconds from now, at every call."""
    adapter_cache: FakeAdapterCache = field(default_factory=FakeAdapterCache)
    emits: dict[str, Emit] = field(default_factory=dict)
    choices: dict[str, int] = field(default_factory=dict)
    num_asked: int = 0
    emitted: dict[str, int] = field(default_factory=dict)
    """The number of texts that each request has got, by request id."""
    aborted: list[str] = field(default_factory=list)
    step_count: int = 0
    threads: set[str] = field(default_factory=set)
    may_step: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.may_step.set()

    @property
    def can_step(self) -> bool:
        """Whether there are requests. Every call counts in `num_asked`."""
        self.num_asked += 1
        return bool(self.emits)

    def time_left(self) -> float | None:
        return self.deadline

    def submit(self, request: Request, emit: Emit) -> None:
        self.emits[request.id] = emit
        self.choices[request.id] = request.sampling.num_choices

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.emits.pop(request_id, None)

    def step(self) -> None:
        assert self.may_step.wait(60)
        self.threads.add(threading.current_thread().name)
        self.step_count += 1
        time.sleep(0.001)
        if self.step_count == self.dies_at:
            raise RuntimeError("out of luck")
        for name, emit in list(self.emits.items()):
            self.emitted[name] = self.emitted.get(name, 0) + 1
            if self.emitted[name] == self.num_steps:
                del self.emits[name]
            for choice in range(self.choices[name]):
                emit(TextEvent("x", choice=choice))
                if self.emitted[name] == self.num_steps:
                    emit(DoneEvent("length", 1, self.num_steps, choice))


def request(
    num_prompt: int = 4,
    max_tokens: int = 4,
    *,
    name: str = "request",
    seed: int = 0,
    temperature: float = 0.0,
    num_choices: int = 1,
) -> Request:
    """Return an admitted request of plain values, for tests that need no more."""
    return Request(
        id=name,
        prompt_text="",
        prompt_ids=tuple(range(num_prompt)),
        prompt_offsets=(0,) * num_prompt,
        max_tokens=max_tokens,
        sampling=SamplingParams(temperature=temperature, seed=seed, num_choices=num_choices),
    )
