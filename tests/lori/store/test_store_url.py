"""Addresses of stores: their recognition, and their form in messages, without secrets."""

import pytest

from lori.store.remote_folder import is_url, redacted


@pytest.mark.parametrize("place", ["s3://bucket/a", "file:///srv/a", "memory://a", "dir::file:///a", "simplecache::s3://b/a"])
def test_an_address_is_recognized(place: str) -> None:
    assert is_url(place)
    assert not is_url(place.replace(":", "/"))


@pytest.mark.parametrize("place", ["adapters", "/srv/adapters", "./s3:/x", "", "C:/adapters"])
def test_a_path_is_no_address(place: str) -> None:
    assert not is_url(place)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("sftp://me:secret@host/a", "sftp://…@host/a"),
        ("sftp://me:s@cr@et@host/a", "sftp://…@host/a"),
        ("s3://key:sec/ret@bucket/a", "s3://…@bucket/a"),
        ("sftp://host:22/math@123, ftp://[::1]:21/a@1", "sftp://host:22/math@123, ftp://[::1]:21/a@1"),
        ("https://host/a?sig=secret&x=1", "https://host/a?…"),
        ("cannot reach https://token@host/a?k=secret now", "cannot reach https://…@host/a?… now"),
        ("s3://bucket/math@123", "s3://bucket/math@123"),
        ("is it there?", "is it there?"),
    ],
)
def test_secrets_are_left_out(text: str, shown: str) -> None:
    assert redacted(text) == shown
