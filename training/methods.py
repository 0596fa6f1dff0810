"""Training methods: LoRI's B on a frozen A (arXiv 2504.07448, section 3), or PEFT's plain LoRA as the baseline.

A method wraps the base's layers, prepares them for each phase, and returns the trained weights.

Shapes: N inputs, D outputs, R rank.
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
from training.parents import load_avoided, load_parent, nonzero_entries
from training.phase import Phase
from training.trainable import DenseB, MaskedB, adapter_disabled, target_layers, values_of, wrap

TrainedWeights = tuple[dict[str, SparseB], Basis]
"""B by module name, and the basis (A) of all modules."""


class TrainingMethod(Protocol):
    """The common interface of LoRI and LoRA for a training run."""

    @property
    def base(self) -> BaseModel:
        """The base model with its target layers wrapped."""

    @property
    def is_autocast(self) -> bool:
        """Whether matrix products must be cast to the base's bfloat16."""

    @property
    def parents(self) -> Sequence[str]:
        """Digests of the adapters that this training builds on."""

    def begin_phase(self, phase: Phase) -> None:
        """Prepare the model for `phase`, after the phase before it."""

    def adapter_disabled(self) -> AbstractContextManager[None]:
        """Context manager in which the model computes without the adapter, as the base alone."""

    def trained_weights(self) -> TrainedWeights:
        """Return the weights after the last phase."""


def create_method(config: FitConfig, base: BaseModel) -> TrainingMethod:
    """Wrap the layers of `base` for the method of `config` and return the method. Raises `LoriError` if that is not possible."""
    return Lora(config, base) if config.method == "lora" else Lori(config, base)


class Lori:
    """LoRI-D, then LoRI-S on the mask of the largest entries of LoRI-D; or LoRI-D alone."""

    def __init__(self, config: FitConfig, base: BaseModel) -> None:
        self.config, self.base, self.is_autocast = config, base, False
        self.parents: list[str] = []
        self.basis = Seeded(config.basis_seed, config.stream)
        names = list(target_layers(base.model, config.target_modules))
        self.shapes = {name: (base.identity.shapes[name][0], config.rank) for name in names}
        start = self._load_parent("--init-from", config.init_from, names) if config.init_from else None
        self.start = start.modules if start else None
        self.mask_source = self._load_parent("--mask-from", config.mask_from, names).modules if config.mask_from else None
        self.avoided = None
        if config.avoid:
            adapters = load_avoided(config, base.identity, self.shapes, start)
            self.avoided = nonzero_entries(adapters, self.shapes)
            self.parents += [adapter.config.lori.content_digest for adapter in adapters]
        self.layers = wrap(base.model, config.target_modules, self.basis, config.rank, config.alpha, self.start)

    def _load_parent(self, flag: str, folder: Path, names: Sequence[str]) -> Adapter:
        parent = load_parent(flag, folder, self.config, self.base.identity, names)
        self.parents.append(parent.config.lori.content_digest)
        return parent

    def begin_phase(self, phase: Phase) -> None:
        """Replace each layer's dense B by the entries of its mask, if `phase` is LoRI-S."""
        if phase.name != "LoRI-S":
            return
        masks = self.masks()
        for name, layer in self.layers.items():
            layer.set_b(MaskedB(masks[name], self.start[name] if self.start else None))

    def masks(self) -> Mapping[str, torch.Tensor]:
        """Return the mask, (D, R) bool, of each layer after LoRI-D. Raises `MaskError` if too few entries can be chosen from."""
        changes = {name: self._ranked_change(name, layer.b) for name, layer in self.layers.items()}
        masks = top_k_mask(changes, self.config.sparsity, self.config.granularity, self.avoided)
        if self.config.sparsity and (num_unchanged := sum(int((changes[name][mask] == 0).sum()) for name, mask in masks.items())):
            raise MaskError(
                f"the mask would have to choose among entries that LoRI-D did not change: {num_unchanged} would be kept"
            )
        return masks

    def _ranked_change(self, name: str, b: DenseB | MaskedB) -> torch.Tensor:
        """Return the change of B (D, R) since the start of LoRI-D. The mask keeps the entries with the largest magnitudes.

        With `--mask-from` this is that adapter's B, which LoRI-D trained from zero.
        """
        if self.mask_source:
            return self.mask_source[name].dense()
        assert isinstance(b, DenseB)
        return values_of(b.change)

    def adapter_disabled(self) -> AbstractContextManager[None]:
        """See `TrainingMethod`."""
        return adapter_disabled(self.base.model)

    def trained_weights(self) -> TrainedWeights:
        """Return the current B of each module, and the basis."""
        return {name: layer.b.sparse() for name, layer in self.layers.items()}, self.basis


class Lora:
    """PEFT's LoRA: all of A and B is trained, in fp32."""

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
            self._copy_weights(parent)

    @torch.no_grad()
    def _copy_weights(self, parent: Adapter) -> None:
        for name, layer in self.layers.items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            a.copy_(parent.basis.draw(name, *a.shape))
            b.copy_(parent.modules[name].dense())

    def begin_phase(self, phase: Phase) -> None:
        """Do nothing: LoRA has one phase."""

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """See `TrainingMethod`."""
        for layer in self.layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapters(True)

    def trained_weights(self) -> TrainedWeights:
        """Return all entries of B, and A as the adapter's own explicit basis."""
        b = {name: values_of(layer.lora_B["default"].weight) for name, layer in self.layers.items()}  # (D, R)
        a = {name: values_of(layer.lora_A["default"].weight) for name, layer in self.layers.items()}  # (R, N)
        modules = {name: SparseB.from_dense(v, torch.ones_like(v, dtype=torch.bool)) for name, v in b.items()}
        return modules, Explicit.from_tensors(a)
