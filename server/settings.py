"""Everything that `python -m server` can be told, by flag or by environment variable, each default written once."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from server.telemetry.logs import LogFormat
from server.transport.bodies import most_held

MIB = 2**20
MAX_RECEIVED = 4
"""Adapters that are received at once: each is in memory meanwhile."""
HostName = Annotated[str, Field(pattern=r"^(\*|(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?)$")]
Origin = Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s,]+)$")]


def _split(value: Any) -> Any:
    # The command line gives a list, the environment text.
    return [one.strip() for one in value.split(",")] if isinstance(value, str) else value


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


class Settings(BaseSettings):
    """Serves one base model and its LoRI adapters over HTTP. Each flag is also an environment variable: LORI_PORT=8000."""

    model_config = SettingsConfigDict(
        cli_prog_name="python -m server",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        use_attribute_docstrings=True,
        env_prefix="LORI_",
        env_ignore_empty=True,
        frozen=True,
    )

    host: str = "127.0.0.1"
    """The address to listen on; 0.0.0.0 lets other machines in."""
    port: int = Field(default=8000, ge=0, le=65535)
    """The port to listen on; 0 takes a free one."""
    keys: Path | None = None
    """A file of tenants and keys, which `python -m server.keys` writes: requests need a key of it. It may change any time."""
    open: bool = False
    """Lets a server without keys listen on an address that other machines reach: whoever reaches the port may use it."""
    open_metrics: bool = False
    """Answers /metrics without a key, too, for what scrapes it and can send none: it names adapters, not tenants."""
    cors_origins: Annotated[list[Origin], NoDecode, BeforeValidator(_split)] = []
    """Pages of these origins, such as https://chat.example.org, may send requests from a browser, * is all: with commas between
    them."""
    allow_host: Annotated[list[HostName], NoDecode, BeforeValidator(_split)] = []
    """Names by which a server without keys is reached, beside localhost and IP addresses, with commas between them and without
    ports: *.NAME is all below one, * all there are. A request for another name, which a web page may have made mean this machine,
    is answered 421."""
    model: str | None = None
    """The base model: a local folder or a hub id; the embedded SmolLM2-135M-Instruct if absent."""
    adapters: Annotated[str | None, BeforeValidator(_as_text)] = None
    """A folder of adapters, or an address such as s3://bucket/adapters, which fsspec knows with its package (s3fs, gcsfs, …). An
    adapter in it comes before a demo adapter of the same name."""
    strict: bool = False
    """Ends the start where an adapter is damaged, with all that is wrong. Without it the others are served, and the log, GET
    /adapters and the metric lori:adapters_faulty say which are not."""
    adapter_cache: Path | None = None
    """With an address: a folder for what comes from there; absent: beside the embedded model. Each process takes one of its own
    in it."""
    adapter_cache_gib: float = Field(default=10, ge=0, le=65536, allow_inf_nan=False)
    """What the weights in it may take, in GiB, for each process; those used longest ago make room."""
    adapter_timeout_s: float = Field(default=60, gt=0, le=86400)
    """With an address: how long a listing or a file may take to come, in seconds; then those who wait for it hear an error."""
    delete_grace_s: float = Field(default=60, ge=0, le=86400)
    """With an address: how long the weights of a deleted adapter stay there, in seconds, for requests under way on other
    servers."""
    max_rank: int | None = Field(default=None, ge=1, le=2048)
    """The greatest rank of adapters that come while the server runs; absent: that of the adapters at start, or 32 where
    --adapters holds none. A higher rank costs every adapter a little."""
    hub: bool = False
    """Lets an admin load adapters from the Hugging Face hub."""
    demo_adapters: bool = True
    """Serves the demo adapters too, on the embedded model."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Where all of it is: cpu, cuda (the first GPU), cuda:N, or auto, a GPU where there is one."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Weights and products: auto is bfloat16 where the device has instructions for it."""
    quantization: Literal["int8"] | None = None
    """int8 keeps the layers' weights in 8 bits: few users hear tokens sooner, many a little later. On a CPU with AVX-512 for
    bfloat16 alone."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 is OMP_NUM_THREADS where that is set, else torch's own choice within the container's CPU limit."""
    resident_gib: float = Field(default=1.0, gt=0, le=65536, allow_inf_nan=False)
    """Memory for the adapters that the kernels can use at once, in GiB; those unused longest make room. As much may take what is
    read for a merge that is no sum, before it is one."""
    max_resident: int = Field(default=1024, ge=1, le=65536)
    """Adapters that the kernels can use at once, at most."""
    loaded_gib: float = Field(default=1.0, ge=0, le=65536, allow_inf_nan=False)
    """Memory for adapters that were read and are not in use, in GiB: they need not be read again."""
    kv_cache_gib: float = Field(default=1.0, gt=0, le=65536, allow_inf_nan=False)
    """Memory for the keys and values of all running requests, in GiB."""
    block_size: int = Field(default=16, ge=16, multiple_of=16)
    """Tokens that a block of KV memory holds."""
    max_batch: int = Field(default=64, ge=1)
    """Requests that run together; more of them wait."""
    max_step_tokens: int = Field(default=512, ge=2)
    """Tokens computed in one step; long prompts are cut to fit, so that they do not stall the others."""
    max_stall: float = Field(default=1.7, ge=1)
    """How many times as long as decoding alone a step may take, about, for the sake of long prompts beside it. What steps take is
    measured at start; below 2 a long prompt rarely lets others wait twice as long for a token, above it its own comes sooner."""
    short_step_ms: float = Field(default=35, ge=0, le=60_000)
    """How long a step may take for the sake of short prompts, in milliseconds, where that is more: prompts that would fill four
    such steps at most. With more, their first tokens come sooner; with less, others' tokens come more evenly."""
    max_step_s: float = Field(default=300, ge=0, le=86400)
    """How long a step may take, in seconds, before the server takes it for stuck: it writes the stacks of its threads to standard
    error, and ends with exit code 1, to be started again. Loading does not count; 0 is no limit."""
    max_priority_wait_s: float = Field(default=60, ge=0, le=86400)
    """How long a request may wait for those of a higher priority, in seconds; from then on it shares the service with those of
    the highest that is present. 0: it waits as long as there are any."""
    max_requests: int = Field(default=1024, ge=1)
    """Requests under way, from their first check to the last that is sent; one more is answered 429."""
    max_request_s: float | None = Field(default=None, gt=0, le=86400)
    """The longest that a request may take, in seconds: a longer timeout_s is refused, and a request that names none has this.
    Absent: as long as it takes."""
    max_request_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    """The most tokens of one request's answers together, max_tokens times n: more is refused, and where max_tokens is absent it
    is as many as fit. Each prompt of a body is a request. Absent: as many as its context holds."""
    max_connections: int = Field(default=4096, ge=1, le=2**20)
    """Connections that may be open at once, as far as the system has files for them. One more takes the place of the one that has
    waited longest for a request, at least a second; where none waits, it is answered 503 and closed."""
    max_unread_s: float = Field(default=60, gt=0, le=86400)
    """How long a client may take nothing of its stream, in seconds; then its connection is ended, for it holds a place."""
    max_body_bytes: int = Field(default=1 << 20, ge=1024)
    """The longest request body; a longer one is answered 413."""
    max_bodies_mib: int = Field(default=64, ge=1, le=2**20)
    """What all request bodies under way may have together, in MiB, without the first 16 KiB of each and without uploads; a body
    beyond is answered 503. Half of it is one tenant's, or without keys one address's, whose bodies beyond are answered 429. For
    each value in a body of more than 64 KiB, 48 bytes count beside its own, for up to 65536 values. There must be room for the
    longest body with these, which one client may always have."""
    max_upload_bytes: int = Field(default=1 << 28, ge=1024)
    """The same for an adapter that is uploaded, or comes from the hub."""

    max_body_s: float = Field(default=60, gt=0, le=86400)
    """How long a request's body may take to come, in seconds, beside a second for each 128 KiB of it; and how long nothing of it
    may come. A longer wait is answered 408."""
    keep_alive_s: float = Field(default=75, gt=0, le=86400)
    """How long a connection may take to send the head of a request, the first or the next, in seconds; then it is closed."""
    drain_notice_s: float = Field(default=2, ge=0, le=3600)
    """After SIGTERM, how long the server takes new connections while /ready says 503, in seconds: until who sends requests has
    noticed."""
    drain_s: float = Field(default=30, ge=0, le=86400)
    """After that, how long running requests may take to end, in seconds; what is left then hears an error."""
    log_format: LogFormat = "text"
    """text is for people; json is a JSON object a line, for machines."""
    log_prompts: bool = False
    """Logs prompts and answers, too. Without it neither is ever logged."""
    otlp_traces_endpoint: str | None = Field(default=None, pattern=r"^https?://[^/]")
    """Where to send traces by OpenTelemetry's protocol over HTTP, such as http://localhost:4318/v1/traces. Needs the extra otel.
    The variables OTEL_EXPORTER_OTLP_* are heard, too."""

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        if self.max_step_tokens <= self.max_batch:
            raise ValueError(f"--max-step-tokens is {self.max_step_tokens}, expected more than --max-batch, {self.max_batch}")
        if self.max_bodies_mib * MIB < (most := most_held(self.max_body_bytes)):
            raise ValueError(
                f"--max-bodies-mib is {self.max_bodies_mib}, expected at least {-(-most // MIB)}: room for a body of "
                f"--max-body-bytes, {self.max_body_bytes}, and its values"
            )
        return self
