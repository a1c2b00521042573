from __future__ import annotations

import errno
import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from vidfill import jobs
from vidfill.errors import BadInput, BadInputEverywhere
from vidfill.files import hash_file, hold, locate, write_atomically


@dataclass(frozen=True)
class Config:
    """A job's configuration."""

    out: Path = Path("out")
    source: Path = Path("source")
    steps: int = 1


def run(error: BaseException) -> int:
    def job(config: Config) -> None:
        raise error

    return jobs.main(Config, job, [], verb="test", examples="")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "a/b: Permission denied"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a"), "a: Not a directory"),
        (OSError("a library's own\nwords"), "a library's own"),
        (ConnectionError(), "ConnectionError"),
        (BadInput("steps is 0: give more"), "steps is 0: give more"),
    ],
)
def test_what_the_system_or_the_input_refuses_is_said_in_one_line(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(error) == 2
    assert capsys.readouterr().err == f"vidfill test: error: {said}\n"


@pytest.mark.parametrize(
    ("error", "rank", "said"),
    [
        (BadInput("wrong"), "0", "vidfill test: error: wrong\n"),
        (BadInput("wrong"), "1", "[rank 1] vidfill test: error: wrong\n"),
        (BadInputEverywhere("wrong"), "0", "vidfill test: error: wrong\n"),
        (BadInputEverywhere("wrong"), "1", ""),
    ],
)
def test_an_error_is_said_by_whoever_has_it_and_a_common_one_once(
    error: Exception,
    rank: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert run(error) == 2
    assert capsys.readouterr().err == said


def test_a_moved_job_continues_and_a_path_is_the_same_however_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    jobs.claim(Path("out"), "test", Config())
    Path("out").rename("moved")
    moved = Config(tmp_path / "moved", tmp_path / "source")
    jobs.claim(moved.out, "test", moved)
    with pytest.raises(BadInput, match="source was"):
        jobs.claim(moved.out, "test", replace(moved, source=tmp_path / "other"))


def test_what_may_change_is_recorded_anew(tmp_path: Path) -> None:
    for steps in (1, 2):
        jobs.claim(tmp_path / "out", "test", Config(steps=steps), may_change=("steps",))
        job = json.loads((tmp_path / "out" / "job.json").read_text())
        assert job["config"]["steps"] == steps
    with pytest.raises(BadInput, match="steps was 2, now 3"):
        jobs.claim(tmp_path / "out", "test", Config(steps=3))


@pytest.mark.parametrize(
    "content", [b"", b'{"verb": "te', b"{}", b"[1]", b"\xff", b'{"verb": "a"}']
)
def test_a_job_file_that_is_not_ours_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "job.json").write_bytes(content)
    with pytest.raises(BadInput, match="not written by vidfill: choose another folder"):
        jobs.claim(tmp_path, "test", Config())
    assert (tmp_path / "job.json").read_bytes() == content


def test_a_folder_with_only_a_killed_jobs_partial_file_is_empty(tmp_path: Path) -> None:
    (tmp_path / ".partial-job.json").touch()
    jobs.claim(tmp_path, "test", Config())
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]
    (tmp_path / "job.json").rename(tmp_path / "mine.json")
    with pytest.raises(BadInput, match="not empty"):
        jobs.claim(tmp_path, "test", Config())


def test_a_file_that_cannot_take_its_place_leaves_no_partial(tmp_path: Path) -> None:
    (tmp_path / "taken" / "by").mkdir(parents=True)
    with pytest.raises(OSError, match="taken"):
        write_atomically(tmp_path / "taken", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_one_job_at_a_time_holds_a_folder(tmp_path: Path) -> None:
    refused = pytest.raises(BadInput, match="another job writes into")
    with hold(tmp_path), refused, hold(tmp_path):
        pass
    with hold(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with hold(tmp_path), hold(tmp_path):
        pass


def test_a_record_of_a_url_has_no_secrets() -> None:
    assert locate("https://me:word@host/shards?signature=x") == "https://host/shards"


def test_a_files_hash_is_that_of_its_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


@dataclass(frozen=True)
class Inner:
    """A part of a configuration."""

    deep: bool = False
    """A switch."""


@dataclass(frozen=True)
class Switches:
    """A configuration with switches."""

    source: Path
    """Required."""
    plan: bool = False
    """A switch."""
    inner: Inner = field(default_factory=Inner)
    """A part."""


@pytest.mark.parametrize(
    ("words", "plan", "deep"),
    [
        (["a"], False, False),
        (["--plan", "a"], True, False),
        (["a", "--plan"], True, False),
        (["a", "--plan", "true", "--inner.deep"], True, True),
        (["--plan", "false", "--inner.deep", "a"], False, True),
        (["a", "--plan=false"], False, False),
    ],
)
def test_a_switch_needs_no_value(words: list[str], plan: bool, deep: bool) -> None:
    config = jobs.parse(Switches, words, verb="test")
    assert config == Switches(Path("a"), plan, Inner(deep))
