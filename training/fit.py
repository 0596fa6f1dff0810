"""`python -m training.fit`: trains a LoRI adapter as published (arXiv 2504.07448, section 3), and saves it.

Freeze the base; draw A from its seed; train all of B (LoRI-D); keep the largest tenth of |B| over all modules; set B to zero and
train only those entries on the same A (LoRI-S).
"""

import logging
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from lori.adapter import Adapter
from lori.base_model import BaseModel, load_base_model, resolve_dtype
from lori.basis import Seeded
from lori.config import AdapterConfig
from lori.errors import LoriError
from lori.format import check_replaceable, save_adapter, write_record
from lori.mask import top_k_mask
from lori.new_config import new_config
from lori.sparse import SparseB
from training.batches import plan_batches
from training.card import render_card
from training.config import FitConfig
from training.data import DataError, Example, Row, read_rows, tokenize
from training.loop import Phase, State, read_checkpoint, write_checkpoint
from training.packing import ATTENTION
from training.trainable import MaskedDelta, TrainableLinear, wrap

logger = logging.getLogger(__name__)


def read_all(config: FitConfig) -> tuple[list[Row], list[Row]]:
    """Returns the rows to learn and the rows to mix in."""
    data = [row for source in config.data for row in read_rows(source)]
    return data, [row for source in config.mix for row in read_rows(source, needs="completion")]


def load_examples(config: FitConfig, base: BaseModel) -> tuple[list[Example], list[Example]]:
    """Returns the examples to learn and the examples to mix in."""
    learnt, kept = read_all(config)
    data = tokenize(base.tokenizer, learnt, config.template, config.max_length)
    mix = tokenize(base.tokenizer, kept, config.template, config.max_length, keeps_base=True) if kept else []
    return data, mix


class Run:
    """A training run: two phases on one set of wrapped layers, and a checkpoint beside the output."""

    def __init__(self, config: FitConfig, base: BaseModel, data: list[Example], mix: list[Example]) -> None:
        self.config, self.base = config, base
        self.basis = Seeded(config.basis_seed, config.stream)
        self.layers: dict[str, TrainableLinear] = wrap(base.model, config.target_modules, self.basis, config.rank, config.alpha)
        self.batches = {
            "LoRI-D": self._plan(data, mix, config.calibration_steps or config.steps, config.seed),
            "LoRI-S": self._plan(data, mix, config.steps, config.seed + 1),
        }
        self.checkpoint = config.output.with_name(config.output.name + ".checkpoint")
        self.losses: dict[str, list[float]] = {}

    def _plan(self, data: list[Example], mix: list[Example], steps: int, seed: int) -> list[list[Example]]:
        num_examples = None if steps else max(1, round(self.config.epochs * len(data)))
        fraction, tokens = self.config.mix_fraction, self.config.batch_tokens
        return plan_batches(data, mix, fraction, tokens, num_examples, steps or None, seed)

    def train(self) -> None:
        """Runs both phases, from the checkpoint where one is to be resumed."""
        state = read_checkpoint(self.checkpoint) if self.config.resume and self.checkpoint.exists() else None
        if self.config.resume and state is None:
            logger.warning("%s is not there: starting from the beginning", self.checkpoint)
        if state and state["config"] != self._identity():
            raise DataError(f"{self.checkpoint} is of a run with other options; resume with those, or remove it")
        if state is None or state["name"] == "LoRI-D":
            self._run_phase("LoRI-D", self.config.calibration_lr, state)
            state = None
            masks = top_k_mask({n: layer.delta.dense() for n, layer in self.layers.items()}, self.config.sparsity)
        else:
            masks, self.losses = state["masks"], state["previous"]
        for name, layer in self.layers.items():
            layer.delta = MaskedDelta(masks[name])
        self._run_phase("LoRI-S", self.config.lr, state, masks)

    def _run_phase(self, name: str, lr: float, state: State | None, masks: dict[str, torch.Tensor] | None = None) -> None:
        phase = Phase(name, self.base.model, self.batches[name], lr, self.config.warmup, self.config.max_grad_norm)
        if state:
            phase.restore(state)
        more = {"config": self._identity(), "masks": masks, "previous": dict(self.losses)}
        phase.run(self.config.save_every, lambda found: write_checkpoint(self.checkpoint, found | more))
        self.losses[name] = phase.losses

    def _identity(self) -> str:
        return self.config.model_dump_json(exclude={"resume", "save_every", "output"})

    def adapter_config(self, modules: dict[str, SparseB], seconds: float, command: str) -> AdapterConfig:
        """Returns the config of the trained adapter; `save_adapter` fills in its digests."""
        config = self.config
        record = config.model_dump(mode="json", exclude={"output", "resume", "save_every"})
        phases = {
            name: {"steps": len(batches), "tokens": sum(len(e) for b in batches for e in b), "loss": _tail(self.losses[name])}
            for name, batches in self.batches.items()
        }
        return new_config(
            modules,
            self.basis,
            self.base.identity,
            alphas=dict.fromkeys(modules, config.alpha),
            target_modules=config.target_modules,
            values=config.values,
            templates=config.template,
            training=record
            | {"command": command, "threads": torch.get_num_threads()}
            | {"seconds": round(seconds), "phases": phases, "versions": _versions()},
        )


def _tail(losses: list[float]) -> float:
    last = losses[-20:]
    return round(sum(last) / len(last), 4)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("lori-server", "torch", "transformers")}


def fit(config: FitConfig, command: str) -> Path:
    """Trains and saves; returns the adapter's folder. Raises `DataError` or `LoriError`."""
    started = time.monotonic()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    check_replaceable(config.output)
    read_all(config)  # What is wrong with the data is said before the model is loaded.
    base = load_base_model(config.model, resolve_dtype(config.dtype), attention=ATTENTION)
    data, mix = load_examples(config, base)
    run = Run(config, base, data, mix)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    run.train()
    modules = {}
    for name, layer in run.layers.items():
        assert isinstance(layer.delta, MaskedDelta)
        modules[name] = layer.delta.sparse()
    trained = run.adapter_config(modules, time.monotonic() - started, command)
    adapter = save_adapter(Adapter(config.output.name, trained, modules, run.basis), config.output)
    write_record(config.output, adapter.config, render_card(adapter.name, adapter.config))
    run.checkpoint.unlink(missing_ok=True)
    return config.output


def main() -> int:
    """Runs the program and returns its exit code."""
    config = FitConfig.from_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        words = [word for word in sys.argv[1:] if word != "--resume"]
        folder = fit(config, shlex.join(["python", "-m", "training.fit", *words]))
    except LoriError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: the same command with --resume goes on from the last {config.save_every} steps", file=sys.stderr)
        return 130
    print(f"saved {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
