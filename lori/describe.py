"""The config of an adapter that was just made, by training, an import or a merge: what follows from its B is worked out here."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lori.basis import Basis, Explicit
from lori.config import AdapterConfig, ExplicitConfig, LoriSection, SeededConfig, compact
from lori.sparse import SparseB
from lori.template import Template
from lori.values import ValueType


def describe(
    modules: Mapping[str, SparseB],
    basis: Basis,
    *,
    base_name: str,
    base_digest: str,
    shapes: Mapping[str, tuple[int, int]],
    target_modules: Sequence[str],
    alpha: float,
    alpha_pattern: Mapping[str, float] | None = None,
    values: ValueType = "bfloat16",
    templates: Sequence[Template],
    training: Mapping[str, Any],
) -> AdapterConfig:
    """Returns the config of an adapter with these `modules` on `basis`; `save_adapter` fills in the digests of its content.

    `shapes` are (outputs, inputs) by full name, of these modules and maybe others. Raises pydantic's `ValidationError` where the
    adapter would not be one that can be read.
    """
    rank = Counter(b.shape[1] for b in modules.values()).most_common(1)[0][0]
    num_entries = sum(b.num_entries for b in modules.values())
    return AdapterConfig(
        base_model_name_or_path=base_name,
        r=rank,
        lora_alpha=alpha,
        rank_pattern={name: b.shape[1] for name, b in modules.items() if b.shape[1] != rank},
        alpha_pattern={name: own for name, own in (alpha_pattern or {}).items() if own != alpha},
        target_modules=tuple(target_modules),
        lori=LoriSection(
            basis=ExplicitConfig(digest=basis.content_digest) if isinstance(basis, Explicit) else SeededConfig.of(basis),
            basis_digest=basis.digest({name: (b.shape[1], shapes[name][1]) for name, b in modules.items()}),
            base_digest=base_digest,
            shapes=compact({name: shapes[name] for name in modules}),
            values=values,
            sparsity=1 - sum(b.values.numel() for b in modules.values()) / num_entries,
            templates=tuple(templates),
            training=dict(training),
        ),
    )
