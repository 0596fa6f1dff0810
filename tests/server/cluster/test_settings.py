"""Settings of a cluster."""

import pytest
from pydantic import ValidationError

from lori.flags import flag_faults
from server.cluster.settings import ClusterSettings


def test_more_replicas_than_the_most_are_refused() -> None:
    with pytest.raises(ValidationError) as refused:
        ClusterSettings(replicas=3, max_replicas=2)
    assert "--max-replicas is 2, expected --replicas, 3, or more" in flag_faults(refused.value)


@pytest.mark.parametrize("host", ["10.0.0.5", "127.0.0.2", "::1", "::", ""])
def test_an_address_at_which_no_ingress_would_answer_is_refused(host: str) -> None:
    """Regression: HAProxy listened at such an address, and asked ingresses at one where they did not listen."""
    with pytest.raises(ValidationError) as refused:
        ClusterSettings(host=host)
    assert f"--host is {host!r}, expected 127.0.0.1, localhost or 0.0.0.0" in flag_faults(refused.value)


def test_a_replica_has_as_many_threads_as_cores_by_default() -> None:
    assert ClusterSettings(replica_cpus=4).replica_settings.threads == 4
    assert ClusterSettings(replica_cpus=4, threads=2).replica_settings.threads == 2
