"""Settings of `python -m server.plan`. Each default is written once, here."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from lori.cli.inspection import FORMATS
from lori.flags import flag_of
from server.arguments import read_arguments
from server.plan.speed import MEASURED, OVERHEAD_GIB, Ratio, measured_ratio
from server.settings import Settings

BENCH = "python -m tests.bench.serve --cases off"
SIMULATION_FLAGS = ("zipf", "requests", "replicas", "disk_mb_per_s", "seed", "plot")
"""Flags that need --simulate."""


class PlanConfig(BaseSettings):
    """Plan the resources for serving very many adapters: memory, flags, replicas, tokens a second. Loads no weights.

    With --simulate, also simulate requests that are routed by their adapters, and at random.
    """

    model_config = SettingsConfigDict(
        cli_prog_name="python -m server.plan",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        use_attribute_docstrings=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
    )

    model: str | None = None
    """The base model: a local folder or a hub id. The embedded SmolLM2-135M-Instruct if absent. Only its config is read."""
    adapters: int = Field(ge=1, le=10**8)
    """The number of adapters."""
    rank: int = Field(default=32, ge=1, le=2048)
    """The rank of the adapters."""
    sparsity: float = Field(default=0.9, ge=0, lt=1)
    """The share of B's entries that the adapters leave out."""
    targets: list[str] = []
    """The last parts of the names of the modules that the adapters change, such as q_proj. All linear layers if absent."""
    bases: int = Field(default=1, ge=1, le=65536)
    """The number of different bases (A)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """The dtype of the servers' weights and products."""
    quantization: Literal["int8"] | None = None
    """As `python -m server --quantization`."""
    device: Literal["cpu", "cuda"] = "cpu"
    """The device of a replica. This project has no measurements on a GPU yet: --ratio and --overhead-gib give them."""
    rps: float = Field(gt=0, le=1e9)
    """Requests a second, over all replicas."""
    prompt_tokens: int = Field(default=100, ge=1, le=10**9)
    """Tokens of a prompt, on average."""
    completion_tokens: int = Field(default=64, ge=1, le=10**9)
    """Tokens of an answer, on average."""
    terms: int = Field(default=1, ge=1, le=65536)
    """The most adapters that a request names."""
    tokens_per_s: float | None = Field(default=None, ge=1e-3, le=1e12)
    """Tokens a second that one replica generates without adapters, for such requests with --users at once. Absent: this project's
    measurement on one core, for the embedded model on a CPU with default flags for requests."""
    single_tokens_per_s: float | None = Field(default=None, ge=1e-3, le=1e12)
    """The same with one user."""
    users: int = Field(default=32, ge=2, le=4096)
    """Concurrent users in the measurement of --tokens-per-s."""
    server: str | None = Field(default=None, pattern=r"^https?://[^/]")
    """Measures both now, on a server of that base that runs there and has nothing else to do. Its key is in LORI_API_KEY."""
    ratio: float | None = Field(default=None, ge=0.001, le=1.5)
    """The ratio of the tokens a second with adapters to those without. This project's measurement if absent."""
    utilisation: float = Field(default=0.7, ge=0.001, le=1)
    """The share of its tokens a second that a replica should generate. The rest is for peaks."""
    spare: int = Field(default=1, ge=0, le=10**6)
    """Replicas that may fail while the others carry the load."""
    max_batch: int = Field(
        default=Settings.model_fields["max_batch"].default, ge=1, lt=Settings.model_fields["max_step_tokens"].default
    )
    """As `python -m server --max-batch`, which must be less than the tokens of a step."""
    max_resident: int | None = Field(default=None, ge=1, le=65536)
    """The most adapters that a replica can use at once. As many as --memory-gib holds if absent, or the server's default."""
    memory_gib: float | None = Field(default=None, gt=0, le=65536)
    """The memory that one replica may use: RAM, or its GPU's memory."""
    overhead_gib: float | None = Field(default=None, ge=0, le=65536)
    """The memory of a replica's process beside all that is counted. On a CPU, this project's measurement if absent."""
    as_json: bool = Field(default=False, alias="json")
    """Prints one JSON document."""

    simulate: bool = False
    """Simulates the replicas, with adapters that are read from disk when requests name them."""
    zipf: float = Field(default=1.0, ge=0, le=10)
    """The skew of the adapters' popularity: the share of the k-th is proportional to 1 / k to this power. 0: all alike."""
    requests: int = Field(default=200_000, ge=100, le=10**6)
    """The number of simulated requests. The first fifth, while the replicas are cold, is not counted."""
    replicas: list[int] = []
    """The numbers of replicas to simulate. The planned number without the spare ones if absent."""
    disk_mb_per_s: float | None = Field(default=None, gt=0)
    """The speed at which a replica reads adapters from their store, in MB a second."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """The seed of the arrivals and of the requests."""
    plot: Path | None = None
    """Draws the simulation: a .png, .svg or .pdf file. Needs the extra plot."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  # pydantic-settings' signature
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the flags alone: RANK or SEED in the environment means something else, and LORI_ADAPTERS is a folder."""
        return (init_settings,)

    @classmethod
    def from_arguments(cls) -> Self:
        """Read the command line. If a flag is wrong, end the program with exit code 2 and the flag's name."""
        return read_arguments(cls)

    @model_validator(mode="after")
    def _has_required_measurements(self) -> Self:
        faults = [*self._speed_faults(), *self._simulation_faults()]
        if self.device == "cuda" and self.overhead_gib is None:
            faults.append("--overhead-gib is missing: nothing was measured on a GPU; nvidia-smi says what a server takes there")
        if self.device == "cuda" and self.quantization:
            faults.append("--quantization is for a CPU alone")
        if self.dtype != "bfloat16" and self.quantization:
            faults.append(f"--quantization {self.quantization} is of a model in bfloat16, not in {self.dtype}")
        if self.known_ratio is None:
            faults.append(
                "--ratio is missing: nothing like this was measured (up to 4 adapters a request, 3.2 kept entries a row of B, "
                "one A of rank 32, on a CPU); `python -m tests.bench.serve --cases off 32` compares both on a machine"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def known_ratio(self) -> Ratio | None:
        """Tokens a second with adapters to those without, as given or as measured."""
        if self.ratio is not None:
            return Ratio(self.ratio, "--ratio")
        if self.device == "cuda":
            return None
        return measured_ratio(self.adapters, self.terms, self.rank * (1 - self.sparsity), self.bases * self.rank)

    @property
    def is_measured(self) -> bool:
        """Whether the tokens a second are this project's measurement."""
        is_given = self.server or self.tokens_per_s or self.single_tokens_per_s
        return not is_given and all(getattr(self, name) == value for name, value in MEASURED.items())

    @property
    def process_gib(self) -> float:
        """Memory of a replica's process beside all that is counted, in GiB."""
        return OVERHEAD_GIB if self.overhead_gib is None else self.overhead_gib

    def _speed_faults(self) -> list[str]:
        if self.is_measured:
            return []
        if self.server and (self.tokens_per_s or self.single_tokens_per_s):
            return ["--server measures what --tokens-per-s and --single-tokens-per-s say: pass either"]
        if not self.server and self.tokens_per_s is None:
            return [
                f"--tokens-per-s is missing: `{BENCH} --model MODEL` measures it on a machine such as a replica's, or "
                "--server URL on a server that runs there"
            ]
        if not self.server and self.max_batch < self.users and self.single_tokens_per_s is None:
            return [
                f"--max-batch is {self.max_batch}, and --tokens-per-s is what {self.users} users get: say with "
                "--single-tokens-per-s what one gets, or measure with as many --users"
            ]
        return []

    def _simulation_faults(self) -> list[str]:
        if not self.simulate:
            unused = [flag_of(name) for name in SIMULATION_FLAGS if name in self.model_fields_set]
            return [f"{', '.join(unused)}: pass --simulate, too"] if unused else []
        faults = []
        if not self.server and not self.is_measured and self.single_tokens_per_s is None:
            faults.append(f"--single-tokens-per-s is missing: `{BENCH}` measures it, too: its row of one user")
        if self.disk_mb_per_s is None:
            faults.append(
                "--disk-mb-per-s is missing: `dd if=FILE of=/dev/null bs=1M iflag=direct` says it for a large file beside the "
                "adapters"
            )
        if self.terms > 1:
            faults.append("--simulate is of requests for one adapter, and --terms says more")
        if any(number < 1 for number in self.replicas):
            faults.append("--replicas: expected 1 or more")
        if self.plot and self.plot.suffix.lower() not in FORMATS:
            faults.append(f"--plot ends in {self.plot.suffix!r}, expected one of {', '.join(FORMATS)}")
        if self.plot and not self.plot.parent.is_dir():
            faults.append(f"--plot: there is no folder {self.plot.parent}")
        return faults
