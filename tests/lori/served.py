"""Models of transformers whose linear layers are replaced by the products that serve adapters."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from lori.adapter import Adapter
from lori.base_identity import module_shapes
from lori.kernels import Route, Term
from lori.packed_adapter import pack_adapter
from lori.pool import AdapterPool
from lori.projection import Projection, project

Terms = Sequence[tuple[str, int, int, float]]
"""Adapter, first token, last, weight."""


class Served:
    """Slots filled with `adapters`, and products with these adapters in every linear layer of `model`. Modifies `model`."""

    def __init__(self, model: PreTrainedModel, adapters: Sequence[Adapter]) -> None:
        self.model = model
        self.route: Route | None = None
        rank = max((b.shape[1] for adapter in adapters for b in adapter.modules.values()), default=0)
        bases = list(dict.fromkeys(adapter.basis for adapter in adapters))
        self.pool = AdapterPool(module_shapes(model), bases, rank, len(adapters), model.dtype)
        self.slots = {adapter.name: slot for slot, adapter in enumerate(adapters)}
        self.scales = {adapter.name: adapter.config.scale for adapter in adapters}
        for slot, adapter in enumerate(adapters):
            self.pool.put(slot, pack_adapter(adapter, self.pool.layouts))
        for name in module_shapes(model):
            parent, _, child = name.rpartition(".")
            product = project([model.get_submodule(name)], self.pool.blocks([name]), self.pool.operands_of([name]))
            setattr(model.get_submodule(parent), child, _Product(self, product))

    def apply(self, terms: Terms, num_tokens: int) -> None:
        """Apply the adapters of `terms` from now on."""
        self.route = Route.from_terms(
            [Term(i, j, self.slots[name], w * self.scales[name]) for name, i, j, w in terms], num_tokens
        )

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the model's current logits."""
        with torch.inference_mode():
            values: torch.Tensor = self.model(ids).logits
        return values


class _Product(nn.Module):
    def __init__(self, served: Served, product: Projection) -> None:
        super().__init__()
        self._served, self._product = [served], product  # in a list, so that it is no child module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x.flatten(0, -2), self._served[0].route).unflatten(0, x.shape[:-1])
