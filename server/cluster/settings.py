"""Settings of `python -m server.cluster`, besides those of one server."""

from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from server.affinity import LoadBound
from server.settings import Settings

DEFAULT_BOUND = LoadBound()
HOSTS = ("127.0.0.1", "localhost", "0.0.0.0")
"""Ray makes the ingresses listen at the same address as HAProxy, which connects to those on its machine at localhost, by IPv4."""


class ClusterSettings(Settings):
    """Serve one base model and its LoRI adapters by several replicas on Ray Serve. The other flags are those of each replica.

    Each flag is also an environment variable: LORI_REPLICAS=2.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m server.cluster")

    replicas: int = Field(default=1, ge=1)
    """Replicas, each with the base model and an engine of its own. With --max-replicas, the least number of them."""
    max_replicas: int | None = Field(default=None, ge=1)
    """The number of replicas follows the load, up to this one. Absent: it stays as it is."""
    target_requests: int = Field(default=16, ge=1)
    """With --max-replicas: there is one replica for each so many requests under way in all of them together."""
    upscale_delay_s: float = Field(default=30, ge=0, allow_inf_nan=False)
    """Seconds for which more requests must be under way before more replicas are started."""
    downscale_delay_s: float = Field(default=600, ge=0, allow_inf_nan=False)
    """Seconds for which fewer requests must be under way before replicas are ended, whose requests may end within --drain-s."""
    replica_cpus: int = Field(default=1, ge=1)
    """CPU cores that Ray reserves for each replica, which has as many threads unless --threads says otherwise."""
    replica_gpus: float = Field(default=0, ge=0, allow_inf_nan=False)
    """GPUs that Ray reserves for each replica. Less than 1 shares a GPU."""
    ingresses: int = Field(default=1, ge=1)
    """Processes that accept requests and relay them. One is enough for some hundreds of requests a second. Each allows its share
    of a tenant's requests per minute, rounded up."""
    affinity_share: float = Field(default=DEFAULT_BOUND.share, ge=1, allow_inf_nan=False)
    """A replica with more than this multiple of the mean number of requests under way leaves new ones to the next in rank."""
    affinity_floor: int = Field(default=DEFAULT_BOUND.floor, ge=1)
    """This many requests under way, however, are never too many for a replica."""
    ray_address: str | None = None
    """The Ray cluster to serve on, auto or its head's address. No Ray Serve may run there yet. Absent: one is started on this
    machine, and ends with this program."""

    host: str = Settings.model_fields["host"].default
    """The address to listen on: 127.0.0.1 or localhost; 0.0.0.0 lets other machines in. No other works with Ray."""
    port: int = Field(default=Settings.model_fields["port"].default, ge=1, le=65535)
    """The port to listen on."""

    @model_validator(mode="after")
    def _is_sound_as_a_cluster(self) -> Self:
        if self.host not in HOSTS:
            raise ValueError(f"--host is {self.host!r}, expected {', '.join(HOSTS[:-1])} or {HOSTS[-1]}: Ray serves at no other")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"--max-replicas is {self.max_replicas}, expected --replicas, {self.replicas}, or more")
        return self

    @property
    def replica_settings(self) -> Settings:
        """The settings of each replica."""
        values = {name: getattr(self, name) for name in Settings.model_fields}
        return Settings.model_construct(**values | {"threads": self.threads or self.replica_cpus})
