"""Adapters applied to a loaded base, alone or merged, without a server: the same sum as in a request.

The deltas are added to the outputs of the linear layers, y + B (A x), as the server does it. They are not folded into the
weights, so no weight must be restored. Folding into bfloat16 weights would change the demo adapters' deltas by 2 to 3 percent
(Frobenius norm).

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
class AdapterSelection:
    """The adapters to apply, and how they are merged."""

    adapters: Sequence[Adapter]
    weights: Sequence[float] = ()
    """The weight of each adapter; 1/n each if empty."""
    options: MergeOptions = DEFAULTS
    block_weights: Sequence[Sequence[float]] = ()
    """Of each adapter, see `lori.merge.merge`; none if empty."""

    def template(self) -> Template:
        """Return the template for prompts: of those that all adapters were trained on, the one that the first adapter prefers.

        Without adapters it is `chat`, the base's own. Raises `TemplateError` if the adapters have no common template.
        """
        return common_template([(adapter.name, adapter.config.lori.templates) for adapter in self.adapters])

    def merged(self) -> Adapter | None:
        """Return the merge of all adapters as one adapter; None without adapters. Raises as `lori.merge.merge`."""
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
            templates=("plain",),  # not used, see `template`
            block_weights=self.block_weights,
        )


def find_adapter(reference: str, store: Path | None, base: BaseIdentity) -> Adapter:
    """Return the adapter `reference` of the folder `store`, or without a store, the adapter in the folder `reference`.

    Raises `AdapterError` if it does not exist, is unsound, or is of another base than `base`.
    """
    if store is not None:
        return AdapterStore(store).find(reference).load(base)
    if not Path(reference).is_dir():
        raise AdapterError(f"there is no folder {reference!r}; a name is found with --adapters FOLDER")
    return load_adapter(Path(reference), base)


@contextmanager
def apply_adapter(model: PreTrainedModel, adapter: Adapter | None) -> Iterator[None]:
    """Context manager: `model` computes with the adapter's delta in every layer that the adapter changes.

    Afterwards the model is as before, bit for bit.
    """
    with ExitStack() as stack:
        for name, b in adapter.modules.items() if adapter else ():
            linear = model.get_submodule(name)
            assert adapter
            a = adapter.basis.draw(name, b.shape[1], adapter.shape_of(name)[1]).to(model.device, model.dtype)
            scaled = (adapter.config.scale_of(name) * b.dense()).to(model.device)
            handle = linear.register_forward_hook(_DeltaHook(a, scaled))
            stack.callback(handle.remove)
        yield


@dataclass(frozen=True, slots=True)
class _DeltaHook:
    """Forward hook that adds B (A x) to a layer's output, with the sum in fp32, as the server does it."""

    a: torch.Tensor  # (R, N)
    scaled_b: torch.Tensor  # (D, R) fp32

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor:
        s = F.linear(inputs[0], self.a)  # (…, R)
        return (y + F.linear(s.float(), self.scaled_b)).to(y.dtype)
