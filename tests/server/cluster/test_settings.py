"""What a cluster can be told."""

import pytest
from pydantic import ValidationError

from lori.flags import flag_faults
from server.cluster.settings import ClusterSettings


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"otlp_traces_endpoint": "http://localhost:4318", "drain_notice_s": 1},
            "--drain-notice-s, --otlp-traces-endpoint: one server hears that",
        ),
        ({"otlp_traces_endpoint": "http://localhost:4318"}, "--otlp-traces-endpoint"),
        ({"replicas": 3, "max_replicas": 2}, "--max-replicas is 2, expected --replicas, 3, or more"),
    ],
)
def test_what_it_would_not_hear_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        ClusterSettings(**options)
    assert said in flag_faults(refused.value)


def test_it_is_refused_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORI_DRAIN_NOTICE_S", "5")
    with pytest.raises(ValidationError, match="--drain-notice-s"):
        ClusterSettings()


def test_a_replica_has_as_many_threads_as_cores_unless_it_is_told() -> None:
    assert ClusterSettings(replica_cpus=4).each.threads == 4
    assert ClusterSettings(replica_cpus=4, threads=2).each.threads == 2
