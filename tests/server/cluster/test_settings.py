"""What a cluster can be told."""

import pytest
from pydantic import ValidationError

from lori.flags import flag_faults
from server.cluster.settings import ClusterSettings


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep_alive_s": 5, "drain_notice_s": 1}, "--keep-alive-s, --drain-notice-s: one server hears that"),
        ({"max_unread_s": 5}, "--max-unread-s"),
        ({"otlp_traces_endpoint": "http://localhost:4318"}, "--otlp-traces-endpoint"),
        ({"replicas": 3, "max_replicas": 2}, "--max-replicas is 2, expected --replicas, 3, or more"),
    ],
)
def test_what_it_would_not_hear_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        ClusterSettings(**options)
    assert said in flag_faults(refused.value)


def test_it_is_refused_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORI_KEEP_ALIVE_S", "5")
    with pytest.raises(ValidationError, match="--keep-alive-s"):
        ClusterSettings()


def test_a_replica_has_as_many_threads_as_cores_unless_it_is_told() -> None:
    assert ClusterSettings(replica_cpus=4).each.threads == 4
    assert ClusterSettings(replica_cpus=4, threads=2).each.threads == 2
