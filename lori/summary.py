"""Summaries of adapters, read from configs without weights. A server with thousands of adapters reads only these at start."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lori.config import AdapterConfig, ExplicitConfig, SeededConfig
from lori.errors import AdapterFormatError
from lori.format import base_faults, read_config
from lori.identity import BaseIdentity
from lori.names import NUM_VERSION_DIGITS
from lori.prompt_statistics import PromptStatistics
from lori.store.entry import Entry
from lori.template import Template


@dataclass(frozen=True, slots=True)
class Summary:
    """The fields of one adapter's config that admission checks and the adapter list need."""

    name: str
    digest: str
    """Content digest."""
    basis: SeededConfig | ExplicitConfig
    rank: int
    """Rank of most modules."""
    max_rank: int
    """Largest rank of any module."""
    alpha: float
    scale: float
    """alpha / r of most modules."""
    targets: tuple[str, ...]
    """Target modules, as `AdapterConfig.target_modules`."""
    sparsity: float
    nnz: int
    """Number of nonzero entries of B, over all modules, computed from the config's sparsity."""
    templates: tuple[Template, ...]
    merge_weights: Mapping[str, tuple[float, float]] = field(hash=False)
    metrics: Mapping[str, float] = field(hash=False)
    num_bytes: int = field(compare=False)
    """Size of the adapter's files."""
    prompt_statistics: PromptStatistics | None = field(default=None, compare=False)
    """Statistics of the adapter's prompts, if its folder has them."""

    @classmethod
    def from_config(
        cls,
        name: str,
        config: AdapterConfig,
        num_entries: int,
        num_bytes: int,
        prompt_statistics: PromptStatistics | None = None,
    ) -> "Summary":
        """Return the summary of the adapter `name`, whose dense B has `num_entries` entries and whose files have `num_bytes`."""
        section = config.lori
        return cls(
            name=name,
            digest=section.content_digest,
            basis=section.basis,
            rank=config.r,
            max_rank=max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r,
            alpha=config.lora_alpha,
            scale=config.scale,
            targets=config.target_modules,
            sparsity=section.sparsity,
            nnz=round((1 - section.sparsity) * num_entries),
            templates=section.templates,
            merge_weights=section.merge_weights,
            metrics=section.metrics,
            num_bytes=num_bytes,
            prompt_statistics=prompt_statistics,
        )

    @property
    def version(self) -> str:
        """The version, as `Adapter.version`."""
        return self.digest[:NUM_VERSION_DIGITS]


def summarise(entries: Mapping[str, Entry], base: BaseIdentity) -> dict[str, Summary]:
    """Return the summary of every entry, by the keys of `entries`.

    Raises `AdapterFormatError` with the faults of all entries; see `summarise_sound`.
    """
    summaries, faulty = summarise_sound(entries, base)
    if faults := [f"{error.source}: {fault}" for error in faulty.values() for fault in error.faults_with_path]:
        raise AdapterFormatError("what is to be served", faults)
    return summaries


def summarise_sound(entries: Mapping[str, Entry], base: BaseIdentity) -> tuple[dict[str, Summary], dict[str, AdapterFormatError]]:
    """Return the summaries of the sound entries, and the errors of the others, by the keys of `entries`.

    Reads only configs and the headers of weights. An adapter is not sound if it cannot be read, is damaged, has links for files,
    has another version than its folder's name, or belongs to another base.
    """
    reader = SummaryReader(base)
    summaries: dict[str, Summary] = {}
    faulty: dict[str, AdapterFormatError] = {}
    for name, entry in entries.items():
        try:
            summaries[name] = reader.read(entry)
        except AdapterFormatError as error:
            faulty[name] = error
    return summaries, faulty


class SummaryReader:
    """Reader of summaries of adapters of `base`. Caches the checks against the base that many configs share."""

    def __init__(self, base: BaseIdentity) -> None:
        self._base = base
        self._base_faults: dict[object, list[str]] = {}
        self._entries: dict[object, int] = {}

    def read(self, entry: Entry) -> Summary:
        """Return the summary of one adapter. Raises `AdapterFormatError` if it is not sound, see `summarise_sound`."""
        faults = entry.file_faults()
        try:
            config = read_config(entry.folder)
        except AdapterFormatError as error:
            raise AdapterFormatError(error.source, [*dict.fromkeys([*error.faults, *faults])]) from error
        entry.check_version(config.lori.content_digest[:NUM_VERSION_DIGITS])
        statistics = None
        try:
            statistics = entry.prompt_statistics(config.lori.content_digest)
        except AdapterFormatError as error:
            faults += error.faults
        if faults := [*self._faults(config), *faults]:
            raise AdapterFormatError(str(entry.folder), faults)
        return Summary.from_config(entry.name, config, self._num_entries(config), entry.num_bytes, statistics)

    def _num_entries(self, config: AdapterConfig) -> int:
        key = (config.r, tuple(config.rank_pattern.items()), config.target_modules)
        if key not in self._entries:
            shapes = {name: shape for name, shape in self._base.shapes.items() if config.is_target(name)}
            self._entries[key] = sum(num_outputs * config.rank_of(name) for name, (num_outputs, _) in shapes.items())
        return self._entries[key]

    def _faults(self, config: AdapterConfig) -> list[str]:
        key = (config.base_name, config.lori.base_digest, config.target_modules, tuple(config.lori.shapes.items()))
        if key not in self._base_faults:
            self._base_faults[key] = base_faults(config, self._base)
        return self._base_faults[key]
