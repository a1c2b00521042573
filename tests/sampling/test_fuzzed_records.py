"""Records altered at random: each is refused in one line, or read; nothing ends in a traceback.

    VIDFILL_FUZZED=2000 python -m pytest tests/sampling/test_fuzzed_records.py -m slow -s

tries so many of each format, and prints how many were refused and how many were read.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vidfill.data.encode.plan import PLAN
from vidfill.data.shards.reading import ShardedDataset
from vidfill.data.storage.names import MANIFEST, SKIPPED, index_name
from vidfill.data.verify.defects import is_sound
from vidfill.data.verify.run import verify
from vidfill.data.verify.settings import VerifyConfig
from vidfill.errors import BadInput, describe, printable
from vidfill.jobs import MARK
from vidfill.modeling.autoencoder import SHIPPED_WEIGHTS, load_autoencoder
from vidfill.modeling.denoiser import Denoiser
from vidfill.modeling.run_folder import CHECKPOINTS, STATE, _digest, seal
from vidfill.sampling.pipeline import VideoInpaintPipeline
from vidfill.sampling.report.run import report
from vidfill.sampling.report.settings import ReportConfig

TRIES = int(os.environ.get("VIDFILL_FUZZED", "25"))

VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 2**31, 2**53, 2**63, 2**64, -(2**63) - 1, 10**400),
    *(0.5, -0.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf")),
    *("", "x", "nan", "1e999", "\0", "../x", "/etc/passwd", "\x1b[2J", "a\nb", "\ud800", "é" * 300),
    *([], [None], [0], [[]], {}, {"a": 1}, ["x"] * 50),
]
DEEP = "[" * 2000 + "]" * 2000


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a tree, with each key or index of it."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from places(tree[key])


def alter_tree(source: random.Random, tree: Any) -> Any:
    inner, key = source.choice(list(places(tree)))
    way = source.randrange(6)
    if way == 0:
        del inner[key]
    elif way == 1 and isinstance(inner, dict):
        inner[source.choice(["x", "", "__class__", f"{key} "])] = inner.pop(key)
    elif way == 2 and isinstance(inner, list):
        inner.extend(copy.deepcopy([inner[key]]) * source.choice([1, 50]))
    elif way == 3:
        other, place = source.choice(list(places(tree)))
        inner[key] = json.loads(json.dumps(other[place]))
    else:
        inner[key] = copy.deepcopy(source.choice(VALUES))
    return tree


def alter_bytes(source: random.Random, content: bytes) -> bytes:
    content = content or json.dumps({"source": "a.mp4", "reason": "x"}).encode() + b"\n"
    at, length = source.randrange(len(content)), source.randrange(1, 40)
    changed = bytearray(content)
    match source.randrange(6):
        case 0:
            return content[:at]
        case 1:
            changed[at] ^= 1 << source.randrange(8)
        case 2:
            changed[at:at] = source.randbytes(length)
        case 3:
            del changed[at : at + length]
        case 4:
            changed[at:at] = changed[at : at + length]
        case 5:
            changed[at : at + length] = source.choice([DEEP, "9" * 5000, '"', "\n", ","]).encode()
    return bytes(changed)


def alter_json(source: random.Random, content: bytes) -> bytes:
    if source.random() < 0.2:
        return alter_bytes(source, content)
    tree = json.loads(content)
    for _ in range(source.choice([1, 1, 2, 4])):
        if tree:
            tree = alter_tree(source, tree)
    return json.dumps(tree).encode()


def alter_sealed(source: random.Random, content: bytes) -> bytes:
    """With a digest that fits: a stranger can make it."""
    altered = alter_json(source, content)
    try:
        tree = json.loads(altered)
        tree.pop("digest", None)
    except (ValueError, AttributeError, RecursionError):
        return altered
    return json.dumps(tree | {"digest": _digest(tree)}).encode()


def alter_table(source: random.Random, content: bytes) -> bytes:
    if source.random() < 0.4:
        return alter_bytes(source, content)
    rows = [line.split(",") for line in content.decode().split("\n")]
    row = source.choice(rows[:-1])
    row[source.randrange(len(row))] = str(source.choice(VALUES)).encode(errors="replace").decode()
    return "\n".join(map(",".join, rows)).encode()


Alter = Callable[[random.Random, bytes], bytes]


@dataclasses.dataclass
class Format:
    """A record on the disk, and what reads it."""

    path: Path
    read: Callable[[], object]
    alter: Alter = alter_json
    folder: Path | None = None
    """What reading may write to."""


@pytest.fixture(scope="module")
def formats(jobs: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Format]:
    root = tmp_path_factory.mktemp("fuzzed")
    model = Path(shutil.copytree(SHIPPED_WEIGHTS / "inpaint", root / "model"))
    vae = Path(shutil.copytree(SHIPPED_WEIGHTS / "collisions", root / "vae"))
    checkpoint = root / "run" / CHECKPOINTS / "step-00000004"
    shutil.copytree(jobs.model, checkpoint / "model")
    seal(checkpoint, {"step": 4, "options": {"seed": 0}, "history": []})
    shards, sweep, work = (jobs.root / name for name in ("checked", "sweep", "frames.work"))
    train = shards / "train"
    shown = iter(range(10**9))

    def check() -> None:
        if not is_sound(verify(VerifyConfig(str(shards), samples=0, device="cpu"))):
            raise BadInput("defects were named")

    def read_all() -> None:
        for example in ShardedDataset(shards, "train"):
            assert example.latents.size

    def show() -> None:
        report(ReportConfig(sweep, root / f"report-{next(shown)}"))

    def again(name: str) -> Callable[[], object]:
        return lambda: jobs.again(name)

    def load(kind: Any, folder: Path) -> Callable[[], object]:
        return lambda: kind(str(folder))

    return {
        "a model's index": Format(
            model / "model_index.json", load(VideoInpaintPipeline.from_pretrained, model)
        ),
        "a model's record": Format(jobs.model / "denoiser.json", again("inpaint"), folder=work),
        "a network's configuration": Format(
            model / "unet" / "config.json", lambda: Denoiser.load(model)
        ),
        "an autoencoder's configuration": Format(vae / "config.json", load(load_autoencoder, vae)),
        "a checkpoint's state": Format(
            checkpoint / STATE, lambda: Denoiser.load(root / "run"), alter_sealed
        ),
        "a manifest": Format(train / MANIFEST, check),
        "a manifest, read": Format(train / MANIFEST, read_all),
        "a shard's index": Format(train / index_name(0), read_all),
        "a list of skipped videos": Format(train / SKIPPED, check, alter_bytes),
        "a plan": Format(shards / PLAN, again("encode in checked"), folder=shards),
        "an encode's job": Format(shards / MARK, again("encode in checked"), folder=shards),
        "a sweep's job": Format(sweep / MARK, again("sweep"), folder=sweep),
        "a sweep's run": Format(sweep / "run.json", again("sweep"), folder=sweep),
        "a sweep's clips": Format(sweep / "clips.csv", again("sweep"), alter_table, sweep),
        "a sweep's record": Format(sweep / "sweep.json", show),
        "a table of results": Format(sweep / "results.csv", show, alter_table),
        "a table of comparisons": Format(sweep / "comparison.csv", show, alter_table),
        "an inpainting's job": Format(work / MARK, again("inpaint"), folder=work),
    }


NAMES = [
    "a model's index",
    "a model's record",
    "a network's configuration",
    "an autoencoder's configuration",
    "a checkpoint's state",
    "a manifest",
    "a manifest, read",
    "a shard's index",
    "a list of skipped videos",
    "a plan",
    "an encode's job",
    "a sweep's job",
    "a sweep's run",
    "a sweep's clips",
    "a sweep's record",
    "a table of results",
    "a table of comparisons",
    "an inpainting's job",
]


@contextlib.contextmanager
def restored(format: Format, kept: Path) -> Iterator[None]:
    """What is read, and what reading may write to, is afterwards as it was."""
    content, stat = format.path.read_bytes(), format.path.stat()
    if format.folder:
        shutil.copytree(format.folder, kept)
    try:
        yield
    finally:
        if format.folder:
            shutil.rmtree(format.folder, ignore_errors=True)
            kept.rename(format.folder)
        format.path.write_bytes(content)
        os.utime(format.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
def test_an_altered_record_is_read_or_refused_in_one_line(
    formats: dict[str, Format], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(formats) == NAMES
    format = formats[name]
    counts = {"refused": 0, "read": 0}
    content = format.path.read_bytes()
    with restored(format, tmp_path / "kept"):
        format.read()
    for seed in range(TRIES):
        altered = format.alter(random.Random(f"{name} {seed}"), content)
        with restored(format, tmp_path / "kept"):
            format.path.write_bytes(altered)
            try:
                format.read()
                counts["read"] += 1
            except (BadInput, OSError) as error:
                counts["refused"] += 1
                assert len(printable(describe(error)).splitlines()) == 1
            except BaseException as error:
                (tmp_path / "altered").write_bytes(altered)
                raise AssertionError(f"{name}, seed {seed}: {altered[:3000]!r}") from error
    with capsys.disabled():
        print(f"\n| {name} | {TRIES} | {counts['refused']} | {counts['read']} | 0 |")
