"""What is known of adapters before their weights are read: a server with thousands reads their configs at start, no more."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lori.config import AdapterConfig, ExplicitConfig, SeededConfig
from lori.errors import AdapterFormatError
from lori.format import base_faults, read_config
from lori.identity import BaseIdentity
from lori.names import NUM_VERSION_DIGITS
from lori.store.entry import Entry
from lori.template import Template


@dataclass(frozen=True, slots=True)
class Summary:
    """One adapter's config, cut down to what requests are admitted by and clients are told."""

    name: str
    digest: str
    """Of its content: what it does."""
    basis: SeededConfig | ExplicitConfig
    rank: int
    """Of most modules."""
    max_rank: int
    """Of any module."""
    alpha: float
    scale: float
    """alpha / r of most modules."""
    targets: tuple[str, ...]
    """As `AdapterConfig.target_modules`."""
    sparsity: float
    num_kept: int
    """Entries of B that are kept, over all modules, by what the config says of its sparsity."""
    templates: tuple[Template, ...]
    merge_weights: Mapping[str, tuple[float, float]] = field(hash=False)
    metrics: Mapping[str, float] = field(hash=False)
    num_bytes: int = field(compare=False)
    """What its files hold."""

    @classmethod
    def of(cls, name: str, config: AdapterConfig, num_entries: int, num_bytes: int) -> "Summary":
        """Return the summary of the adapter called `name`, whose B has `num_entries`, zeros too, and whose files `num_bytes`."""
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
            num_kept=round((1 - section.sparsity) * num_entries),
            templates=section.templates,
            merge_weights=section.merge_weights,
            metrics=section.metrics,
            num_bytes=num_bytes,
        )

    @property
    def version(self) -> str:
        """As `Adapter.version`."""
        return self.digest[:NUM_VERSION_DIGITS]


def summarise(entries: Mapping[str, Entry], base: BaseIdentity) -> dict[str, Summary]:
    """Return the summary of every entry, by the names that they are given under. Raises the faults of all as one error.

    Raises `AdapterFormatError`; see `summarise_sound`.
    """
    found, faulty = summarise_sound(entries, base)
    if faults := [f"{error.source}: {fault}" for error in faulty.values() for fault in error.placed]:
        raise AdapterFormatError("what is to be served", faults)
    return found


def summarise_sound(entries: Mapping[str, Entry], base: BaseIdentity) -> tuple[dict[str, Summary], dict[str, AdapterFormatError]]:
    """Return the summaries of the sound entries, and what is wrong with the others, by the names that they are given under.

    Reads configs alone, and the headers of weights. Not sound is an adapter that cannot be read, is damaged, has files that are
    links, is not of the version that the folder's name says, or not of `base`.
    """
    reader = SummaryReader(base)
    found: dict[str, Summary] = {}
    faulty: dict[str, AdapterFormatError] = {}
    for name, entry in entries.items():
        try:
            found[name] = reader.read(entry)
        except AdapterFormatError as error:
            faulty[name] = error
    return found, faulty


class SummaryReader:
    """Reads the summaries of adapters of `base`; what many configs say of their base is checked once."""

    def __init__(self, base: BaseIdentity) -> None:
        self._base = base
        self._base_faults: dict[object, list[str]] = {}
        self._entries: dict[object, int] = {}

    def read(self, entry: Entry) -> Summary:
        """Return the summary of one adapter. Raises `AdapterFormatError` where it is not sound, see `summarise_sound`."""
        faults = entry.file_faults()
        try:
            config = read_config(entry.folder)
        except AdapterFormatError as error:
            raise AdapterFormatError(error.source, [*dict.fromkeys([*error.faults, *faults])]) from error
        entry.check_version(config.lori.content_digest[:NUM_VERSION_DIGITS])
        if faults := [*self._faults(config), *faults]:
            raise AdapterFormatError(str(entry.folder), faults)
        return Summary.of(entry.name, config, self._num_entries(config), entry.num_bytes)

    def _num_entries(self, config: AdapterConfig) -> int:
        recipe = (config.r, tuple(config.rank_pattern.items()), config.target_modules)
        if recipe not in self._entries:
            shapes = {name: shape for name, shape in self._base.shapes.items() if config.is_target(name)}
            self._entries[recipe] = sum(num_outputs * config.rank_of(name) for name, (num_outputs, _) in shapes.items())
        return self._entries[recipe]

    def _faults(self, config: AdapterConfig) -> list[str]:
        recipe = (config.base_name, config.lori.base_digest, config.target_modules, tuple(config.lori.shapes.items()))
        if recipe not in self._base_faults:
            self._base_faults[recipe] = base_faults(config, self._base)
        return self._base_faults[recipe]
