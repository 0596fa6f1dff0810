"""A store in S3, over the real protocol, served by moto."""

from collections.abc import Iterator
from pathlib import Path

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from lori.errors import AdapterError, UnreachableError
from lori.store.remote import RemoteStore
from lori.store.remote_folder import RemoteFolder
from tests.lori.adapters import make_adapter
from tests.lori.remotes import LIMIT_S


@pytest.fixture(autouse=True)
def _new_file_system() -> None:
    """Clear the file systems of earlier tests. fsspec caches them by address, together with their credentials."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the address of an empty bucket."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield "s3://bucket/adapters"
    server.stop()


@pytest.mark.slow
def test_publishing_reading_and_removing_in_s3(bucket: str, tmp_path: Path) -> None:
    ours, theirs = (RemoteStore(RemoteFolder(bucket, LIMIT_S), tmp_path, 1 << 20) for _ in range(2))
    assert ours.list() == []
    first, second = make_adapter("math", seed=1), make_adapter("math", seed=2)
    for adapter in (first, second):
        ours.add(adapter)
    theirs.pull("math")
    assert theirs.find("math").load().version == second.version
    theirs.alias("math", f"math@{first.version}")
    third = RemoteStore(RemoteFolder(bucket, LIMIT_S), tmp_path, 1 << 20)
    assert third.current()["math"].load().version == first.version
    assert third.find("math").num_bytes == ours.find(f"math@{first.version}").num_bytes > 500
    third.withdraw("math")
    assert ours.find(f"math@{first.version}").load().version == first.version
    third.remove("math")
    assert RemoteFolder(bucket, LIMIT_S).files() == {}
    with pytest.raises(AdapterError, match="there is no such folder"):
        RemoteFolder("s3://another-bucket/adapters", LIMIT_S).files()


@pytest.mark.slow
def test_an_unreachable_s3_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UnreachableError, match="listing failed in the store of the adapters"):
        RemoteFolder("s3://bucket/adapters", LIMIT_S).files()
