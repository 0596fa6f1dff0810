"""The resident adapters of a served base: which adapter lies in which slot of the kernel operands."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lori.adapter import Adapter
from lori.format import module_shapes
from lori.kernels import Operands
from lori.layer import ActiveRoute, attach


@dataclass(frozen=True, slots=True)
class Resident:
    """An adapter in a slot."""

    adapter: Adapter
    slot: int


class AdapterPool:
    """Holds every adapter that a server was started with, in the operands of the model's layers.

    Making one changes `model`: the layers that some adapter targets are replaced.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter]) -> None:
        self.active = ActiveRoute()
        self._bases = list(dict.fromkeys(adapter.basis for adapter in adapters))
        shapes = module_shapes(model)
        targets = {name: shapes[name] for name in shapes if any(name in a.modules for a in adapters)}
        rank = max((adapter.config.r for adapter in adapters), default=0)
        self._operands: Mapping[str, Operands] = attach(model, targets, self._bases, rank, len(adapters), self.active)
        self.residents = {a.name: self._place(a, slot) for slot, a in enumerate(adapters)}

    def _place(self, adapter: Adapter, slot: int) -> Resident:
        basis = self._bases.index(adapter.basis)
        for name, b in adapter.modules.items():
            self._operands[name].put(slot, b.dense(), basis)
        return Resident(adapter, slot)

    @property
    def num_bytes(self) -> int:
        """What the operands of all slots hold, in bytes."""
        return sum(operands.num_bytes for operands in self._operands.values())
