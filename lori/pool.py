"""The resident adapters of a served base: which adapter lies in which slot of the kernel operands."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from lori.adapter import Adapter
from lori.errors import AdapterError
from lori.kernels import Operands, Packed
from lori.kernels.layout import MAX_RANK
from lori.layer import ActiveRoute, attach, module_shapes


class AdapterPool:
    """Holds every adapter that a server was started with, in the operands of the model's layers.

    Making one changes `model`: the layers that some adapter targets are replaced. Raises `AdapterError` where the kernels know no
    such rank.
    """

    def __init__(self, model: PreTrainedModel, adapters: Sequence[Adapter]) -> None:
        self.active = ActiveRoute()
        self._bases = list(dict.fromkeys(adapter.basis for adapter in adapters))
        self._slots = {adapter.name: slot for slot, adapter in enumerate(adapters)}
        shapes = module_shapes(model)
        targets = {name: shapes[name] for name in shapes if any(name in a.modules for a in adapters)}
        rank = self._rank(adapters)
        self._operands: Mapping[str, Operands] = attach(model, targets, self._bases, rank, len(adapters), self.active)
        packed = [self._pack(adapter) for adapter in adapters]
        for name, operands in self._operands.items():
            operands.reserve(sum(len(of[name].blocks) for of in packed if name in of))
        for adapter, of in zip(adapters, packed, strict=True):
            for name, b in of.items():
                self._operands[name].put(self._slots[adapter.name], b, self._bases.index(adapter.basis))

    def slot(self, name: str) -> int:
        """Returns the slot of the adapter `name`, which must be resident."""
        return self._slots[name]

    def _rank(self, adapters: Sequence[Adapter]) -> int:
        ranks = {adapter.name: max((b.shape[1] for b in adapter.modules.values()), default=0) for adapter in adapters}
        too_high = [f"the rank of {name!r} is {rank}" for name, rank in ranks.items() if rank > MAX_RANK]
        if too_high:
            raise AdapterError(f"{'; '.join(too_high)}, expected at most {MAX_RANK}")
        return max(ranks.values(), default=0)

    def _pack(self, adapter: Adapter) -> dict[str, Packed]:
        # A term's weight has alpha / r of most modules in it; where a module's own differs, its B makes up for it.
        scale = adapter.config.scale
        return {name: self._operands[name].pack(b, adapter.config.scale_of(name) / scale) for name, b in adapter.modules.items()}

    @property
    def num_bytes(self) -> int:
        """What the operands of all slots hold, in bytes."""
        return sum(operands.num_bytes for operands in self._operands.values())
