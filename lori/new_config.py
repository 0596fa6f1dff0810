"""The config of an adapter that was just made, by training, an import or a merge: what follows from its B is worked out here."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lori.basis import Basis
from lori.config import AdapterConfig, LoriSection, basis_config, compact
from lori.identity import BaseIdentity
from lori.sparse import SparseB
from lori.template import Template
from lori.values import ValueType

UNSEALED = "0" * 64
"""Stands where `lori.format.seal` puts a digest."""


def new_config(
    modules: Mapping[str, SparseB],
    basis: Basis,
    base: BaseIdentity,
    *,
    alphas: Mapping[str, float],
    target_modules: Sequence[str],
    values: ValueType = "bfloat16",
    templates: Sequence[Template],
    training: Mapping[str, Any],
) -> AdapterConfig:
    """Returns the config of an adapter with these `modules`, and `alphas`, on `basis`; `lori.format.seal` fills in its digests.

    `modules` must not be empty; `base` needs the shapes of these modules only. Raises pydantic's `ValidationError` where the
    adapter would not be one that can be read.
    """
    rank = Counter(b.shape[1] for b in modules.values()).most_common(1)[0][0]
    alpha = Counter(alphas[module] for module in modules).most_common(1)[0][0]
    shapes = {module: base.shapes[module] for module in modules}
    num_entries = sum(b.num_entries for b in modules.values())
    return AdapterConfig(
        base_model_name_or_path=base.name,
        r=rank,
        lora_alpha=alpha,
        rank_pattern={module: b.shape[1] for module, b in modules.items() if b.shape[1] != rank},
        alpha_pattern={module: alphas[module] for module in modules if alphas[module] != alpha},
        target_modules=tuple(target_modules),
        lori=LoriSection(
            basis=basis_config(basis),
            basis_digest=basis.digest({module: (b.shape[1], shapes[module][1]) for module, b in modules.items()}),
            base_digest=base.digest,
            content_digest=UNSEALED,
            config_digest=UNSEALED,
            shapes=compact(shapes),
            values=values,
            sparsity=1 - sum(b.values.numel() for b in modules.values()) / num_entries,
            templates=tuple(templates),
            training=dict(training),
        ),
    )
