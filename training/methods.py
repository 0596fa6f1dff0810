"""What is trained: LoRI's B on a frozen A (arXiv 2504.07448, section 3), or plain LoRA by PEFT as the baseline.

A method wraps the base's layers, prepares each phase, and tells what came out. Shapes: N inputs, D outputs, R rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from lori.adapter import Adapter
from lori.base_model import BaseModel
from lori.basis import Basis, Explicit, Seeded
from lori.errors import LoriError, MaskError
from lori.mask import top_k_mask
from lori.sparse import SparseB
from training.config import FitConfig
from training.parents import entries_of, load_avoided, load_parent
from training.phase import Phase
from training.trainable import DenseB, MaskedB, base_alone, target_layers, values_of, wrap

Trained = tuple[dict[str, SparseB], Basis]
"""B of each module, and the A that they are on."""


class TrainingMethod(Protocol):
    """What a run needs of LoRI and of LoRA alike."""

    @property
    def base(self) -> BaseModel:
        """The base, its layers wrapped."""

    @property
    def is_autocast(self) -> bool:
        """Whether products must be cast to the base's bfloat16."""

    @property
    def parents(self) -> Sequence[str]:
        """The digests of the adapters that it builds on."""

    def begin(self, phase: Phase) -> None:
        """Make the model ready for `phase`, after the one before it."""

    def base_alone(self) -> AbstractContextManager[None]:
        """Inside, the model is the base as it was."""

    def trained(self) -> Trained:
        """Return what the last phase left."""


def method_of(config: FitConfig, base: BaseModel) -> TrainingMethod:
    """Return the method that `config` asks for, `base` wrapped. Raises `LoriError` where that cannot be."""
    return Lora(config, base) if config.method == "lora" else Lori(config, base)


class Lori:
    """LoRI-D, then LoRI-S on the mask of the largest changes; or LoRI-D alone."""

    def __init__(self, config: FitConfig, base: BaseModel) -> None:
        self.config, self.base, self.is_autocast = config, base, False
        self.parents: list[str] = []
        self.basis = Seeded(config.basis_seed, config.stream)
        names = list(target_layers(base.model, config.target_modules))
        self.shapes = {name: (base.identity.shapes[name][0], config.rank) for name in names}
        start = self._parent("--init-from", config.init_from, names) if config.init_from else None
        self.start = start.modules if start else None
        self.calibrated = self._parent("--mask-from", config.mask_from, names).modules if config.mask_from else None
        self.avoided = None
        if config.avoid:
            adapters = load_avoided(config, base.identity, self.shapes, start)
            self.avoided = entries_of(adapters, self.shapes)
            self.parents += [adapter.config.lori.content_digest for adapter in adapters]
        self.layers = wrap(base.model, config.target_modules, self.basis, config.rank, config.alpha, self.start)

    def _parent(self, flag: str, folder: Path, names: Sequence[str]) -> Adapter:
        parent = load_parent(flag, folder, self.config, self.base.identity, names)
        self.parents.append(parent.config.lori.content_digest)
        return parent

    def begin(self, phase: Phase) -> None:
        """Put a mask's entries in the place of all before LoRI-S."""
        if phase.name != "LoRI-S":
            return
        masks = self.masks()
        for name, layer in self.layers.items():
            layer.put(MaskedB(masks[name], self.start[name] if self.start else None))

    def masks(self) -> Mapping[str, torch.Tensor]:
        """Return the mask, (D, R) bool, of each layer after LoRI-D. Raises `MaskError` where there is too little to choose."""
        changes = {name: self._change(name, layer.b) for name, layer in self.layers.items()}
        masks = top_k_mask(changes, self.config.sparsity, self.config.granularity, self.avoided)
        if self.config.sparsity and (num_idle := sum(int((changes[name][mask] == 0).sum()) for name, mask in masks.items())):
            raise MaskError(f"the mask would have to choose among entries that LoRI-D did not change: {num_idle} would be kept")
        return masks

    def _change(self, name: str, b: DenseB | MaskedB) -> torch.Tensor:
        if self.calibrated:
            return self.calibrated[name].dense()
        assert isinstance(b, DenseB)
        return values_of(b.change)

    def base_alone(self) -> AbstractContextManager[None]:
        """Inside, B adds nothing."""
        return base_alone(self.base.model)

    def trained(self) -> Trained:
        """Return B as it is now, and the basis."""
        return {name: layer.b.sparse() for name, layer in self.layers.items()}, self.basis


class Lora:
    """LoRA, all of A and B trained in fp32, by PEFT."""

    def __init__(self, config: FitConfig, base: BaseModel) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415  # an extra
        except ImportError as error:
            raise LoriError("--method lora needs: pip install '.[train]'") from error
        self.base, self.is_autocast = base, base.model.dtype == torch.bfloat16
        self.parents: list[str] = []
        names = list(target_layers(base.model, config.target_modules))
        torch.manual_seed(config.seed)
        inject_adapter_in_model(
            LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=names),  # type: ignore[arg-type]  # may be a float
            base.model,
        )
        self.layers: dict[str, Any] = {name: base.model.get_submodule(name) for name in names}
        for layer in self.layers.values():
            layer.lora_A.float()
            layer.lora_B.float()
        if config.init_from:
            parent = load_parent("--init-from", config.init_from, config, base.identity, names)
            self.parents.append(parent.config.lori.content_digest)
            self._go_on_from(parent)

    @torch.no_grad()
    def _go_on_from(self, parent: Adapter) -> None:
        for name, layer in self.layers.items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            a.copy_(parent.basis.draw(name, *a.shape))
            b.copy_(parent.modules[name].dense())

    def begin(self, phase: Phase) -> None:
        """Do nothing: there is one phase."""

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        """Inside, LoRA adds nothing."""
        for layer in self.layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapters(True)

    def trained(self) -> Trained:
        """Return B, every entry kept, and A as the adapter's own basis."""
        b = {name: values_of(layer.lora_B["default"].weight) for name, layer in self.layers.items()}  # (D, R)
        a = {name: values_of(layer.lora_A["default"].weight) for name, layer in self.layers.items()}  # (R, N)
        return {name: SparseB.from_dense(v, torch.ones_like(v, dtype=torch.bool)) for name, v in b.items()}, Explicit.of(a)
