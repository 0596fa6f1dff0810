"""The resident adapters of a served base: which adapter lies in which slot of the kernel operands."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from lori.adapter import Adapter
from lori.kernels import Operands
from lori.layer import ActiveRoute, attach, module_shapes


class AdapterPool:
    """Holds every adapter that a server was started with, in the operands of the model's layers.

    Making one changes `model`: the layers that some adapter targets are replaced.
    """

    def __init__(self, model: PreTrainedModel, adapters: Sequence[Adapter]) -> None:
        self.active = ActiveRoute()
        self._bases = list(dict.fromkeys(adapter.basis for adapter in adapters))
        self._slots = {adapter.name: slot for slot, adapter in enumerate(adapters)}
        shapes = module_shapes(model)
        targets = {name: shapes[name] for name in shapes if any(name in a.modules for a in adapters)}
        rank = max((b.shape[1] for adapter in adapters for b in adapter.modules.values()), default=0)
        self._operands: Mapping[str, Operands] = attach(model, targets, self._bases, rank, len(adapters), self.active)
        for adapter in adapters:
            self._place(adapter)

    def slot(self, name: str) -> int:
        """Returns the slot of the adapter `name`, which must be resident."""
        return self._slots[name]

    def _place(self, adapter: Adapter) -> None:
        basis = self._bases.index(adapter.basis)
        for name, b in adapter.modules.items():
            # A term's weight has alpha / r of most modules in it; where a module's own differs, its B makes up for it.
            ratio = adapter.config.scale_of(name) / adapter.config.scale
            self._operands[name].put(self._slots[adapter.name], ratio * b.dense(), basis)

    @property
    def num_bytes(self) -> int:
        """What the operands of all slots hold, in bytes."""
        return sum(operands.num_bytes for operands in self._operands.values())
