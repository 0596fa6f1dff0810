"""Adapters applied to a loaded base, alone or merged, with no server: the same sum as in a request.

The deltas are added to the outputs of the linear layers, y + B (A x), and not folded into the weights: there is no weight to
restore, and the server does so. A sum in bfloat16 weights would change the demo adapters' deltas by 2 to 3 percent (Frobenius).

Shapes: T tokens, N inputs, D outputs, R rank.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lori.adapter import Adapter
from lori.errors import AdapterError
from lori.format import load_adapter
from lori.identity import BaseIdentity
from lori.merge import merge
from lori.merge_options import DEFAULTS, MergeOptions
from lori.store.store import AdapterStore
from lori.template import Template, common_template


@dataclass(frozen=True, slots=True)
class Choice:
    """Which adapters are applied, and how."""

    adapters: Sequence[Adapter]
    weights: Sequence[float] = ()
    """One for each; none is 1/n each."""
    options: MergeOptions = DEFAULTS

    def template(self) -> Template:
        """Return how their prompts are written: as the first prefers of what all were trained on; `chat` is the base's own.

        Raises `TemplateError` where they were trained on no common template.
        """
        return common_template([(adapter.name, adapter.config.lori.templates) for adapter in self.adapters])

    def merged(self) -> Adapter | None:
        """Return one adapter that adds what all of them do; None where there is none. Raises as `lori.merge.merge`."""
        if not self.adapters:
            return None
        weights = self.weights or [1 / len(self.adapters)] * len(self.adapters)
        options = self.options
        return merge(
            self.adapters,
            weights,
            options.method,
            density=options.density,
            sign=options.sign,
            seed=options.seed,
            templates=("plain",),  # of no consequence: see `template`
        )


def find_adapter(reference: str, store: Path | None, base: BaseIdentity) -> Adapter:
    """Return the adapter of `base` called `reference` in `store`, or without one, in the folder `reference`.

    Raises `AdapterError` where there is none, or it is not sound or of another base.
    """
    if store is not None:
        return AdapterStore(store).find(reference).load(base)
    if not Path(reference).is_dir():
        raise AdapterError(f"there is no folder {reference!r}; a name is found with --adapters FOLDER")
    return load_adapter(Path(reference), base)


@contextmanager
def applied(model: PreTrainedModel, adapter: Adapter | None) -> Iterator[None]:
    """Inside, `model` has the adapter's delta added in every layer that it changes; afterwards it is as before, to the bit."""
    with ExitStack() as stack:
        for name, b in adapter.modules.items() if adapter else ():
            linear = model.get_submodule(name)
            assert adapter
            a = adapter.basis.draw(name, b.shape[1], adapter.shape_of(name)[1]).to(model.device, model.dtype)
            scaled = (adapter.config.scale_of(name) * b.dense()).to(model.device)
            handle = linear.register_forward_hook(_Delta(a, scaled))
            stack.callback(handle.remove)
        yield


@dataclass(frozen=True, slots=True)
class _Delta:
    """Adds B (A x) to a layer's output, summed in fp32 as the server does it."""

    a: torch.Tensor  # (R, N)
    scaled_b: torch.Tensor  # (D, R) fp32

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor:
        s = F.linear(inputs[0], self.a)  # (…, R)
        return (y + F.linear(s.float(), self.scaled_b)).to(y.dtype)
