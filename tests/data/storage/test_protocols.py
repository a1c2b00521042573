"""Transfers by protocols other than HTTP, which fsspec speaks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from vidfill.data.storage.transfer import Remote, WrongFile, is_remote
from vidfill.errors import BadInput

SIZE = 1_000_000
NAME = "shard-000000.tar"
CONTENT = np.random.default_rng(0).bytes(SIZE)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def connect(url: str) -> Remote:
    remote = Remote(url)
    remote.chunk, remote.stall, remote.attempts, remote.first_pause = 1 << 18, 10.0, 4, 0.01
    return remote


def test_a_protocol_that_is_not_installed_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fsspec.registry import known_implementations

    known = {"class": "filesystem_of_nobody.Files", "err": ""}
    monkeypatch.setitem(known_implementations, "nobody", known)
    with pytest.raises(BadInput, match=r"nobody:// needs .*pip install filesystem_of_nobody"):
        Remote("nobody://bucket/shards")
    with pytest.raises(BadInput, match="nonsense:// is no protocol"):
        Remote("nonsense://bucket/shards")


def test_only_urls_are_remote() -> None:
    assert is_remote("s3://bucket/shards")
    assert is_remote("https://host/shards")
    assert not is_remote("/data/shards")
    assert not is_remote("file:///data/shards")
    assert not is_remote("shards")


def test_a_protocol_without_asynchronous_requests_works_too(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"/shards/train/{NAME}", CONTENT)
    remote = connect("memory://shards/train")
    remote.fetch(NAME, tmp_path / "a", SIZE, SHA256)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert Remote("memory://shards").folders_with(NAME) == ["train"]
    assert not Remote("memory://shards").folders_with("manifest.json")
    with pytest.raises(FileNotFoundError):
        remote.read("manifest.json")
    memory.pipe_file(f"/shards/train/{NAME}", CONTENT[:-5])
    with pytest.raises(WrongFile):
        remote.fetch(NAME, tmp_path / "b", SIZE, SHA256)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a server that speaks S3, with the file in it."""
    server_of = pytest.importorskip("moto.server", reason="needs moto")
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs")
    monkeypatch.setattr("werkzeug.serving.WSGIRequestHandler.log_request", lambda *_: None)
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    for name, value in {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    files.mkdir("bucket")
    files.pipe_file(f"bucket/shards/train/{NAME}", CONTENT)
    yield "s3://bucket/shards"
    server.stop()


@pytest.mark.slow
def test_s3_gives_the_same_bytes_and_the_same_errors(bucket: str, tmp_path: Path) -> None:
    remote = connect(f"{bucket}/train")
    remote.fetch(NAME, tmp_path / "a", SIZE, SHA256)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert remote.read(NAME) == CONTENT
    with pytest.raises(FileNotFoundError):
        remote.read("manifest.json")
    with pytest.raises(WrongFile, match="is not there"):
        connect(f"{bucket}/test").fetch(NAME, tmp_path / "b", SIZE, SHA256)
    with pytest.raises(WrongFile, match="than its manifest says"):
        remote.fetch(NAME, tmp_path / "b", SIZE + 1, SHA256)
    assert connect(bucket).folders_with(NAME) == ["train"]
