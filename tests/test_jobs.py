from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vidfill
from vidfill import jobs
from vidfill.errors import BadInput, BadInputEverywhere
from vidfill.files import (
    LOCK,
    PIECE,
    PIECES,
    Fingerprint,
    aside,
    fingerprint,
    hash_file,
    hold,
    is_same,
    locate,
    write_atomically,
    write_new,
)
from vidfill.interrupts import ENDING


@dataclass(frozen=True)
class Config:
    """A job's configuration."""

    out: Path = Path("out")
    source: Path = Path("source")
    steps: int = 1


def begin(out: Path, config: Config, **settings: Any) -> None:
    """A job that ends as soon as it has its folder."""
    with jobs.claim(out, "test", config, **settings):
        assert (out / LOCK).exists()


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
    begin(Path("out"), Config())
    Path("out").rename("moved")
    moved = Config(tmp_path / "moved", tmp_path / "source")
    begin(moved.out, moved)
    with pytest.raises(BadInput, match="source was"):
        begin(moved.out, replace(moved, source=tmp_path / "other"))


def test_a_path_in_another_encoding_is_the_same_again(tmp_path: Path) -> None:
    config = Config(source=Path(os.fsdecode(b"caf\xe9")))
    for _ in range(2):
        begin(tmp_path / "out", config)
    with pytest.raises(BadInput, match="source was"):
        begin(tmp_path / "out", Config())


def test_what_may_change_is_recorded_anew(tmp_path: Path) -> None:
    for steps in (1, 2):
        begin(tmp_path / "out", Config(steps=steps), may_change=("steps",))
        job = json.loads((tmp_path / "out" / "job.json").read_text())
        assert job["config"]["steps"] == steps
    with pytest.raises(BadInput, match="steps was 2, now 3"):
        begin(tmp_path / "out", Config(steps=3))


def test_a_job_that_stands_on_something_else_does_not_continue(tmp_path: Path) -> None:
    weights = {"weights": "a1", "clips": {"a.mp4": [1, 2], "b.mp4": [3, 4]}}
    for _ in range(2):
        begin(tmp_path, Config(), stands_on=weights)
    before = (tmp_path / "job.json").read_bytes()
    for changed, named in [
        ({**weights, "weights": "b2"}, r"\(weights\)"),
        ({**weights, "clips": {"a.mp4": [1, 2]}}, r"\(clips\.b\.mp4\)"),
        ({**weights, "masks": "c3"}, r"\(masks\)"),
    ]:
        with pytest.raises(BadInput, match=named):
            begin(tmp_path, Config(), stands_on=changed)
    assert (tmp_path / "job.json").read_bytes() == before


def test_a_job_of_an_older_version_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = {
        "verb": "test",
        "config": {"out": "out", "source": str(Path("source").resolve()), "speed": 3},
    }
    record = tmp_path / "job.json"
    record.write_text(json.dumps(older))
    with pytest.raises(BadInput, match="steps was 1, now 2"):
        begin(tmp_path, Config(steps=2))
    begin(tmp_path, Config(), stands_on={"weights": "a1"})
    assert "options that are no more: speed" in capsys.readouterr().err
    now = jobs.read_job(tmp_path)
    assert now
    assert (now.version, now.stands_on) == (vidfill.__version__, {"weights": "a1"})


def test_two_jobs_with_other_seeds_never_share_a_folder(tmp_path: Path) -> None:
    refusals = []

    def work(steps: int) -> None:
        try:
            with jobs.claim(tmp_path / "out", "test", Config(steps=steps)):
                time.sleep(0.02)
                held = jobs.read_job(tmp_path / "out")
                assert held
                assert held.config["steps"] == steps
        except BadInput as refusal:
            refusals.append(str(refusal))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(refusals) == 3


@pytest.mark.parametrize(
    "content", [b"", b'{"verb": "te', b"{}", b"[1]", b"\xff", b'{"verb": "a"}']
)
def test_a_job_file_that_is_not_ours_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "job.json").write_bytes(content)
    with pytest.raises(BadInput, match="not written by vidfill: choose another folder"):
        begin(tmp_path, Config())
    assert (tmp_path / "job.json").read_bytes() == content


def test_a_folder_with_only_a_killed_jobs_partial_file_is_empty(tmp_path: Path) -> None:
    (tmp_path / ".partial-job.json").touch()
    begin(tmp_path, Config())
    (tmp_path / "job.json").rename(tmp_path / "mine.json")
    with pytest.raises(BadInput, match="not empty"):
        begin(tmp_path, Config())


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


def test_a_file_system_without_locks_holds_nobody_up_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with hold(tmp_path), hold(tmp_path):
        pass
    assert capsys.readouterr().err.count(f"{tmp_path} lies where files cannot be locked") == 2


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


@pytest.mark.parametrize("allocate", [np.empty, torch.empty], ids=["numpy", "torch"])
def test_the_end_of_memory_is_one_line(
    allocate: Callable[[int], object], capsys: pytest.CaptureFixture[str]
) -> None:
    def job(_: Switches) -> None:
        allocate(2**48)

    assert jobs.main(Switches, job, ["a"], verb="test", examples="") == 2
    said = capsys.readouterr().err
    assert "there is not enough memory" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize("instead", [None, ValueError, ImportError])
def test_a_signal_ends_a_job_and_what_it_left_open(
    number: signal.Signals, instead: type[Exception] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = []

    def job(_: Switches) -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt as interrupt:
            raise (instead or KeyboardInterrupt) from interrupt  # as libraries do
        finally:
            closed.append(True)

    before = signal.getsignal(number)
    assert jobs.main(Switches, job, ["a"], verb="test", examples="") == 128 + number
    assert signal.getsignal(number) == before
    assert closed
    assert "; the same command continues" in capsys.readouterr().err


SECRET = "password: hunter2\n[broken: {"
ALIASES = "inner: &a {deep: false}\n" + "".join(f"x{n}: [*a, *a]\n" for n in range(3))


@pytest.mark.parametrize(
    ("words", "content", "said"),
    [
        (["--config", "c.yaml"], "config: secret", "cannot name another"),
        (["--config=c.yaml"], "config: secret", "cannot name another"),
        (["--config", "c.yaml"], "inner: secret", "inner is no group of options"),
        (["--config", "c.yaml"], "secret", "the file is no group of options"),
        (["--config", "c.yaml"], "[1]", "the file is no group of options"),
        (["--inner", "secret"], "", "--inner is a group of options"),
        (["--inner=secret"], "", "--inner is a group of options"),
        (["--config", "c.yaml"], ALIASES, "has an alias"),
        (["--config", "c.yaml"], "inner: &a {deep: *a}", "has an alias"),
        (["--config", "c.yaml"], "a: b: c", "mapping values are not allowed"),
        (["--config", "c.yaml"], "[" * 10_000, "c.yaml: "),
        (["--config", "c.yaml"], "\udcff", "c.yaml: "),
        (["--config", "none.yaml"], "", "No such file"),
        (["--config", "."], "", "is no file"),
    ],
)
def test_a_configuration_file_leads_to_no_other_and_repeats_nothing(
    words: list[str],
    content: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("secret").write_text(SECRET)
    Path("c.yaml").write_bytes(os.fsencode(content))
    with pytest.raises(SystemExit, match="2"):
        jobs.parse(Switches, ["a", *words], verb="test")
    _, line = capsys.readouterr()
    assert said in line
    assert line.count("\n") == 1
    assert "hunter2" not in line


def test_a_configuration_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("plan: true\ninner: {deep: true}\n")
    config = jobs.parse(Switches, ["a", "--config", str(tmp_path / "c.yaml")], verb="test")
    assert config == Switches(Path("a"), True, Inner(True))


def test_a_file_is_known_again_by_size_and_time_or_else_by_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a"
    file.write_bytes(bytes(3 * PIECES * PIECE))
    for whole in (True, False):
        was = fingerprint({"a": file}, whole=whole)
        with monkeypatch.context() as patch:
            patch.setattr("vidfill.files.hash_file", None)
            patch.setattr("vidfill.files._hash_pieces", None)
            assert fingerprint({"a": file}, known=list(was), whole=whole) == was  # nothing is read
        os.utime(file, (0, 0))
        copied = fingerprint({"a": file}, known=was, whole=whole)
        assert is_same(was, copied)
        assert copied != was
        for place in (0, 3 * PIECES * PIECE - 1):
            content = bytearray(file.read_bytes())
            content[place] ^= 1
            file.write_bytes(content)
            assert not is_same(was, fingerprint({"a": file}, known=was, whole=whole))
        assert not is_same(was, fingerprint({"b": file}, whole=whole))
    assert is_same(Fingerprint(9, "", ""), Fingerprint(9, "t", "c"))  # all that 0.1 knew
    assert not is_same(Fingerprint(9, "s", ""), Fingerprint(9, "t", "c"))


def test_of_several_writers_of_a_new_file_one_writes_it(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda n: write_new(tmp_path / "a", b"%d" % n), range(8)))
    assert written.count(True) == 1
    assert (tmp_path / "a").read_bytes() == b"%d" % written.index(True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_what_came_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool, kind: str
) -> None:
    def link(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr("os.link", link)
    out = tmp_path / "out"
    refused = pytest.raises(BadInput, match="out exists: choose another name or remove it")
    with refused, aside(out, new=True) as partial:
        with pytest.raises(BadInput, match="another job writes into"), aside(out, new=True):
            pass
        if kind == "folder":
            partial.mkdir()
            (partial / "ours").touch()
            (out / "theirs").mkdir(parents=True)
        else:
            partial.write_bytes(b"ours")
            out.write_bytes(b"theirs") if kind == "file" else out.symlink_to("nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out.is_dir(), out.is_file()) == (kind == "folder", kind == "file")


@pytest.mark.parametrize("replaced", [False, True])
def test_a_job_whose_folder_is_lost_says_so(tmp_path: Path, replaced: bool) -> None:
    refused = pytest.raises(BadInput, match="removed or taken by another job while this one ran")
    with refused, jobs.claim(tmp_path / "out", "test", Config()):
        shutil.rmtree(tmp_path / "out")
        if replaced:
            begin(tmp_path / "out", Config(steps=2))
    assert (tmp_path / "out").exists() == replaced


def test_a_temporary_folder_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for _ in range(2):
        (tmp_path / "work").symlink_to("elsewhere")
        begin(tmp_path / "work", Config(), temporary=True)
        assert not list(tmp_path.iterdir())


def test_a_job_that_finds_another_one_begun_without_a_lock_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(BadInput, match="another job has just begun in"):
        begin(tmp_path, Config(steps=2), stands_on=lambda _: begin(tmp_path, Config()) or {})
    with pytest.raises(BadInput, match="steps was 1, now 2"):
        begin(tmp_path, Config(steps=2))


def test_a_record_of_0_1_is_renewed_and_what_it_did_not_know_is_not_compared(
    tmp_path: Path,
) -> None:
    config = {"source": str(Path("source").resolve()), "stairs": 1}
    (tmp_path / "job.json").write_text(json.dumps({"verb": "test", "config": config}))

    def renew(before: jobs.JobRecord) -> jobs.JobRecord:
        steps = {"steps": before.config.pop("stairs")}
        changes = {"config": before.config | steps, "stands_on": {"model.weights": "a"}}
        return before.model_copy(update=changes)

    other = {"model": {"weights": "b", "heads": 2}}
    with pytest.raises(BadInput, match=r"\(model.weights\)"):
        begin(tmp_path, Config(), stands_on=other, renew=renew)
    same = {"model": {"weights": "a", "heads": 2}}
    begin(tmp_path, Config(), stands_on=same, renew=renew)
    with pytest.raises(BadInput, match=r"\(model.heads\)"):
        begin(tmp_path, Config(), stands_on={"model": {"weights": "a", "heads": 3}}, renew=renew)
