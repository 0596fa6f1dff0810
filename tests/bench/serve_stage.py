"""Setup of the server benchmark: adapters on disk, and targets, each started when it is first needed."""

import importlib.util
import itertools
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from lori.base_identity import identify_files
from lori.embedded import embedded_model
from lori.native import is_limited
from tests.bench.serve_adapters import adapter_name, export_adapters, write_adapters, write_merges
from tests.bench.serve_asks import distinct, make_asks, no_adapter
from tests.bench.serve_cases import LLAMA, MERGE_SIZES, NUM_DISTINCT, OWN, PEFT, TRANSFORMERS, VLLM
from tests.bench.serve_targets import Server, Target, llama_build, start_batches, start_llama_cpp, start_own, start_vllm


@dataclass(frozen=True, slots=True)
class Setting:
    """Settings of the targets. `peers` is the folder that `peers.sh` filled. `model` is the embedded model if None."""

    cores: Sequence[int]
    """Cores of the targets, which have as many threads."""
    scratch: Path
    model: Path | None = None
    peers: Path | None = None
    flags: Sequence[str] = ()
    """Additional flags for this project's server."""
    num_registered: int = NUM_DISTINCT
    num_cold: int = 0
    """Number of additional adapters, each requested once."""


@dataclass(slots=True)
class Stage:
    """The running targets, of which only one at a time may use the CPU."""

    setting: Setting
    adapters: Path
    merges: Path
    cold: Iterator[str]
    targets: dict[tuple[str, str], Target] = field(default_factory=dict)

    @contextmanager
    def on(self, engine: str, name: str) -> Iterator[Target]:
        """Context manager of a target that may use the CPU."""
        if (engine, name) not in self.targets:
            self.targets[engine, name] = self._start(engine, name)
            self._warm(engine, name)
        target = self.targets[engine, name]
        target.program.resume()
        try:
            yield target
        finally:
            target.program.pause()

    @contextmanager
    def own(self) -> Iterator[Server]:
        """Context manager of this project's server with LoRI on, see `on`."""
        with self.on(OWN, "on") as target:
            assert isinstance(target, Server)
            yield target

    def end(self) -> None:
        """End all targets."""
        for target in self.targets.values():
            target.program.end()

    def _start(self, engine: str, name: str) -> Target:
        setting, log = self.setting, self.setting.scratch / f"{engine}-{name}.log"
        compiles = ", which compiles the model: minutes" if engine == VLLM else ""
        tqdm.write(f"starting {engine} ({name}){compiles}; its log is {log}", file=sys.stderr)
        is_on = name == "on"
        if engine == OWN:
            merges = ["--merges", str(self.merges)] if is_on else []
            return start_own(setting.model, self.adapters if is_on else None, setting.cores, log, [*setting.flags, *merges])
        model = setting.model or embedded_model()
        if engine == PEFT:
            return start_batches(model, self._exported() if is_on else [], setting.cores, log)
        if engine == TRANSFORMERS:
            return start_batches(model, [], setting.cores, log, "float32")
        assert setting.peers is not None
        if engine == VLLM:
            return start_vllm(setting.peers, model, self._exported() if is_on else [], setting.cores, log)
        return start_llama_cpp(setting.peers, setting.cores, log)

    def _warm(self, engine: str, name: str) -> None:
        target = self.targets[engine, name]
        choose = distinct([adapter_name(i) for i in range(NUM_DISTINCT)]) if name == "on" else no_adapter
        target.measure(make_asks("warm", NUM_DISTINCT, 10, 2, choose), NUM_DISTINCT)

    def _exported(self) -> list[Path]:
        folder = self.setting.scratch / "peft"
        export_adapters(folder, self.adapters, NUM_DISTINCT)
        return [folder / adapter_name(i) for i in range(NUM_DISTINCT)]


@contextmanager
def staged(setting: Setting) -> Iterator[Stage]:
    """Context manager of a stage with its adapters written. Ends the targets and removes the adapters afterwards."""
    base = identify_files(None if setting.model is None else str(setting.model))
    count = setting.num_registered + setting.num_cold
    adapters = write_adapters(setting.scratch / "adapters", base, count)
    cold = (adapter_name(i) for i in itertools.count(setting.num_registered))
    merges = setting.scratch / "merges"
    for num_terms in MERGE_SIZES:
        write_merges(merges, adapters, base, num_terms, NUM_DISTINCT)
    stage = Stage(setting, adapters, merges, cold)
    try:
        yield stage
    finally:
        stage.end()
        shutil.rmtree(adapters)
        shutil.rmtree(merges)


def missing_peers(peers: Path | None, has_model: bool = False) -> dict[str, str]:
    """Return the reason for each engine that cannot be measured. `has_model`: the model is not the embedded one."""
    missing = {} if _has_peft() else {PEFT: "it is not installed"}
    needed = {VLLM: ["vllm/preload"], LLAMA: [f"llama.cpp/{llama_build()}/bin/llama-server", "llama.cpp/model.gguf"]}
    for engine, files in needed.items():
        if peers is None:
            missing[engine] = "there is no --peers"
        elif absent := [file for file in files if not (peers / file).exists()]:
            missing[engine] = f"tests/bench/peers.sh has not put {absent[0]} into {peers}"
    if has_model:
        missing[LLAMA] = "it has the embedded model alone"
    if is_limited():
        missing[VLLM] = "its kernels take the best instruction set, whatever --isa says"
    return missing


def _has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None
