"""Everything that `python -m server.cluster` can be told beside what one server can."""

from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from server.cluster.affinity import LoadBound
from server.settings import Settings

DEFAULT_BOUND = LoadBound()
HOSTS = ("127.0.0.1", "localhost", "0.0.0.0")
"""Ray has the ingresses listen at the same address as HAProxy, which asks those on its machine at localhost, by IPv4."""


class ClusterSettings(Settings):
    """Serves one base model and its LoRI adapters by several replicas on Ray Serve. The other flags are those of each replica.

    Each flag is also an environment variable: LORI_REPLICAS=2.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m server.cluster")

    replicas: int = Field(default=1, ge=1)
    """Replicas, each with the base model and an engine of its own; with --max-replicas those that there are at least."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Replicas come and go with the load, up to so many; absent: their number stays as it is."""
    target_requests: int = Field(default=16, ge=1)
    """With --max-replicas: there is a replica for each so many requests that are under way in all of them together."""
    upscale_delay_s: float = Field(default=30, ge=0, allow_inf_nan=False)
    """For so long there must be more under way before the replicas that are missing are started."""
    downscale_delay_s: float = Field(default=600, ge=0, allow_inf_nan=False)
    """For so long there must be less before those too many go, whose requests may end within --drain-s."""
    replica_cpus: int = Field(default=1, ge=1)
    """CPU cores that Ray sets aside for each replica, which has as many threads unless --threads says otherwise."""
    replica_gpus: float = Field(default=0, ge=0, allow_inf_nan=False)
    """The same of GPUs; less than 1 shares one."""
    ingresses: int = Field(default=1, ge=1)
    """Processes that take requests and send them on: one does for some hundreds of requests a second. Each allows its share of
    what a tenant may send in a minute, rounded up."""
    affinity_share: float = Field(default=DEFAULT_BOUND.share, ge=1, allow_inf_nan=False)
    """A replica with more than so many times the mean of requests under way leaves new ones to the next in rank."""
    affinity_floor: int = Field(default=DEFAULT_BOUND.floor, ge=1)
    """So many requests under way, however, are never too many for a replica."""
    ray_address: str | None = None
    """The Ray cluster to serve on, auto or its head's address, where no Ray Serve may run yet; absent: one is started on this
    machine, and ends with it."""

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
    def each(self) -> Settings:
        """What each replica is told."""
        own = {name: getattr(self, name) for name in Settings.model_fields}
        return Settings.model_construct(**own | {"threads": self.threads or self.replica_cpus})
