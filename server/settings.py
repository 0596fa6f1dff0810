"""Settings of `python -m server`, by flag or by environment variable. Each default is written once, here."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from lori.merge_options import DefaultMerge
from server.transport.bodies import max_counted_bytes

MIB, GIB = 2**20, 2**30
MAX_RECEIVED = 4
"""Adapters that are received at once, by upload or from the hub. Each is in memory meanwhile."""
LogFormat = Literal["text", "json"]
HostName = Annotated[str, Field(pattern=r"^(\*|(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?)$")]
Origin = Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s,]+)$")]


def _split(value: Any) -> Any:
    # The command line gives a list, an environment variable gives text.
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


class Settings(BaseSettings):
    """Serve one base model and its LoRI adapters over HTTP. Each flag is also an environment variable: LORI_PORT=8000."""

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
    """The address to listen on. 0.0.0.0 lets other machines in."""
    port: int = Field(default=8000, ge=0, le=65535)
    """The port to listen on. 0 takes a free one."""
    keys: Path | None = None
    """A file of tenants and keys, which `python -m server.keys` writes. Requests then need one of its keys. The file may change
    at any time."""
    open: bool = False
    """Lets a server without keys listen on an address that other machines reach. Anyone who reaches the port may then use it."""
    open_metrics: bool = False
    """Answers /metrics without a key, too, for scrapers that cannot send one. The metrics name adapters, but no tenants."""
    cors_origins: Annotated[list[Origin], NoDecode, BeforeValidator(_split)] = []
    """Origins, such as https://chat.example.org, whose pages may send requests from a browser. Separated by commas; * allows
    all."""
    allow_host: Annotated[list[HostName], NoDecode, BeforeValidator(_split)] = []
    """Names by which clients may reach a server without keys, besides localhost and IP addresses. Separated by commas, without
    ports; *.NAME allows all names below NAME, * allows any name. A request for another name is answered 421, because a web page
    may have made that name resolve to this machine."""
    model: str | None = None
    """The base model: a local folder or a hub id. The embedded SmolLM2-135M-Instruct if absent."""
    adapters: Annotated[str | None, BeforeValidator(_as_text)] = None
    """A folder of adapters, or an fsspec address such as s3://bucket/adapters, which needs fsspec's package for it (s3fs, gcsfs,
    …). An adapter in it takes precedence over a demo adapter of the same name."""
    strict: bool = False
    """Refuses to start if an adapter is damaged, and reports every fault. Without it, the other adapters are served, and the log,
    GET /adapters and the metric lori:adapters_faulty show the damaged ones."""
    adapter_cache: Path | None = None
    """With an address: the folder that caches its files; beside the embedded model if absent. Each process uses a subfolder of
    its own."""
    adapter_cache_gib: float = Field(default=10, ge=0, le=65536, allow_inf_nan=False)
    """The most space for cached weights, in GiB, for each process. The least recently used are removed."""
    adapter_timeout_s: float = Field(default=60, gt=0, le=86400)
    """With an address: the longest that a listing or a file may take to arrive, in seconds. Requests that wait for it then
    fail."""
    delete_grace_s: float = Field(default=60, ge=0, le=86400)
    """With an address: the time for which the weights of a deleted adapter stay there, in seconds, for requests under way on
    other servers."""
    max_rank: int | None = Field(default=None, ge=1, le=2048)
    """The highest rank of adapters that come while the server runs. Absent: the highest rank at start, or 32 if --adapters holds
    none. A higher rank costs every adapter a little."""
    hub: bool = False
    """Lets an admin load adapters from the Hugging Face hub."""
    demo_adapters: bool = True
    """Serves the demo adapters, too, on the embedded model."""
    merges: Path | None = None
    """A folder of named merges, NAME.json, as python -m training.tune writes them. Requests use their names like adapters'. An
    admin may change them while the server runs."""
    background: Path | None = None
    """The file of the base's background, with which adapters are compared for automatic weights. python -m training.background
    makes one. The embedded model has one if absent."""
    default_merge: DefaultMerge = "auto"
    """The weights of several adapters that a request names without any. auto: from the prompt, if all of them have statistics.
    linear: 1/n each."""
    auto_max_adapters: int = Field(default=3, ge=1, le=16)
    """The most adapters that the server selects for a request for the adapter, or the model, `auto`."""
    auto_threshold: float = Field(default=0.5, ge=0, le=1)
    """The sum of the weights of selected adapters below which the base answers alone."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """The device of the model and the adapters: cpu, cuda (the first GPU), cuda:N, or auto, which takes a GPU if there is one."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """The dtype of weights and products. auto is bfloat16, or float32 on a CPU without the compiled module and without
    instructions for bfloat16."""
    quantization: Literal["int8"] | None = None
    """int8 stores the layers' weights in 8 bits. Few users get tokens sooner, many users a little later. Only on a CPU, in
    bfloat16 with C++ products."""
    threads: int = Field(default=0, ge=0)
    """CPU threads. 0 takes OMP_NUM_THREADS if it is set, else torch's own choice within the container's CPU limit."""
    resident_gib: float = Field(default=1.0, gt=0, le=65536, allow_inf_nan=False)
    """Memory for resident adapters, which the kernels can use at once, in GiB. The least recently used are evicted. Adapters that
    are read for a merge that is no sum may take as much again."""
    max_resident: int = Field(default=1024, ge=1, le=65536)
    """The most adapters that can be resident."""
    loaded_gib: float = Field(default=1.0, ge=0, le=65536, allow_inf_nan=False)
    """Memory for adapters that were read and are not in use, in GiB. They need not be read again."""
    kv_cache_gib: float = Field(default=1.0, gt=0, le=65536, allow_inf_nan=False)
    """Memory for the keys and values of all running requests, in GiB."""
    block_size: int = Field(default=16, ge=16, multiple_of=16)
    """Tokens in a block of KV memory."""
    max_batch: int = Field(default=64, ge=1)
    """Requests that run together. More requests wait."""
    max_step_tokens: int = Field(default=512, ge=2)
    """Tokens computed in one step. Long prompts are split to fit, so that they do not stall other requests."""
    max_stall: float = Field(default=1.7, ge=1)
    """Maximum time of a step with long prompts, approximately, as a multiple of a step that only decodes. Step times are measured
    at start. Below 2, a long prompt rarely makes other requests wait twice as long for a token; above 2, its own first token
    comes sooner."""
    short_step_ms: float | None = Field(default=None, ge=0, le=60_000)
    """Time of a step with short prompts, in milliseconds, if that is more than --max-stall allows. Prompts are short if they
    would fill at most four such steps. The time is multiplied by 1 + short prompts / requests that decode, at most by 4. A higher
    value brings first tokens sooner; a lower value keeps other requests' tokens more even. Absent: the time of a step of 64
    prompt tokens, measured at start, but at least 35 and at most 100."""
    max_step_s: float = Field(default=300, ge=0, le=86400)
    """Maximum time of a step, in seconds, before the server counts as stuck. It then writes its threads' stacks to standard error
    and ends with exit code 1, to be started again. Loading does not count. 0 is no limit."""
    max_priority_wait_s: float = Field(default=60, ge=0, le=86400)
    """Maximum time that a request waits for requests of a higher priority, in seconds. After that it shares the service with
    requests of the highest priority. 0: it waits as long as there are any."""
    max_requests: int = Field(default=1024, ge=1)
    """Requests under way, from their first check to the last byte of their answers. One more is answered 429."""
    max_request_s: float | None = Field(default=None, gt=0, le=86400)
    """The longest that a request may take, in seconds. A longer timeout_s is refused; a request without timeout_s gets this one.
    Absent: no limit."""
    max_request_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    """The most tokens of one request over all its answers, max_tokens times n. More is refused; without max_tokens, a request
    gets as many as fit. Each prompt of a body is a request. Absent: as many as the context holds."""
    max_connections: int = Field(default=4096, ge=1, le=2**20)
    """Connections that may be open at once, as far as the system has file descriptors for them. One more replaces the connection
    that has waited longest for a request, at least a second. If none waits, it is answered 503 and closed."""
    max_unread_s: float = Field(default=60, gt=0, le=86400)
    """Maximum time in which a client reads nothing of its stream, in seconds. Its connection, which holds a place, is then
    ended."""
    max_body_bytes: int = Field(default=1 << 20, ge=1024)
    """The longest request body, in bytes. A longer one is answered 413."""
    max_bodies_mib: int = Field(default=64, ge=1, le=2**20)
    """The size of all request bodies under way together, in MiB, without the first 16 KiB of each and without uploads. A body
    beyond it is answered 503. One tenant, or without keys one address, may use half of it; its bodies beyond that are answered
    429. Each value in a body of more than 64 KiB counts 48 bytes more, for up to 65536 values. There must be room for the longest
    body with its values, which one client may always have."""
    max_upload_bytes: int = Field(default=1 << 28, ge=1024)
    """The longest adapter that is uploaded, or comes from the hub, in bytes. A longer upload is answered 413."""

    max_body_s: float = Field(default=60, gt=0, le=86400)
    """Maximum time for a request's body to arrive, in seconds, plus a second for each 128 KiB of it; also the longest pause in
    it. A longer wait is answered 408."""
    keep_alive_s: float = Field(default=75, gt=0, le=86400)
    """Maximum time for a connection to send the headers of a request, the first or the next, in seconds. Then the connection is
    closed."""
    drain_notice_s: float = Field(default=2, ge=0, le=3600)
    """After SIGTERM, the time for which the server still takes new connections while /ready answers 503, in seconds, so that load
    balancers notice."""
    drain_s: float = Field(default=30, ge=0, le=86400)
    """After that, the time for running requests to end, in seconds. Requests that are left then fail."""
    log_format: LogFormat = "text"
    """text is for people; json writes a JSON object a line, for machines."""
    log_prompts: bool = False
    """Logs prompts and answers, too. Without it neither is ever logged."""
    otlp_traces_endpoint: str | None = Field(default=None, pattern=r"^https?://[^/]")
    """The address for traces by OTLP over HTTP, such as http://localhost:4318/v1/traces. Needs the extra otel. The environment
    variables OTEL_EXPORTER_OTLP_* count, too."""

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        if self.max_step_tokens <= self.max_batch:
            raise ValueError(f"--max-step-tokens is {self.max_step_tokens}, expected more than --max-batch, {self.max_batch}")
        if self.max_bodies_mib * MIB < (most := max_counted_bytes(self.max_body_bytes)):
            raise ValueError(
                f"--max-bodies-mib is {self.max_bodies_mib}, expected at least {-(-most // MIB)}: room for a body of "
                f"--max-body-bytes, {self.max_body_bytes}, and its values"
            )
        return self
