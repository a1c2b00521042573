"""Jobs that continue after something that they stand on has changed, or only looks as if it had."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vidfill.data.encode.run import encode
from vidfill.data.verify.run import verify
from vidfill.data.verify.settings import VerifyConfig
from vidfill.errors import BadInput
from vidfill.sampling.inpaint.run import inpaint
from vidfill.sampling.sweep.run import sweep

Jobs = Any  # of the fixture `jobs`
Edit = Callable[[Path], None]


def flip(path: Path) -> None:
    """Other content of the same size."""
    content = bytearray(path.read_bytes())
    content[-1] = 255 - content[-1]
    path.write_bytes(content)


def touch(path: Path) -> None:
    """Another time, as of a copy."""
    os.utime(path, (1e9, 1e9))


def change(*keys: str | int, to: object) -> Edit:
    """Another value of one field of a JSON file."""

    def edit(path: Path) -> None:
        tree = json.loads(path.read_text())
        inner = tree
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to
        path.write_text(json.dumps(tree))

    return edit


@contextlib.contextmanager
def changed(path: Path, edit: Edit) -> Iterator[None]:
    content, stat = path.read_bytes(), path.stat()
    edit(path)
    try:
        yield
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


WEIGHTS = "diffusion_pytorch_model.safetensors"
VAE, UNET, RECORD = "kept/autoencoder", "kept/model/unet", "kept/model/denoiser.json"
CHANGES: list[tuple[str, str, Edit, str]] = [
    ("encode without a manifest", f"{VAE}/{WEIGHTS}", flip, r"\(autoencoder.weights\)"),
    (
        "encode without a manifest",
        f"{VAE}/config.json",
        change("scaling_factor", to=2.0),
        r"\(autoencoder.config.scaling_factor\)",
    ),
    *(
        (job, path, edit, said)
        for job in ("encode", "verify")
        for path, edit, said in (
            (f"{VAE}/{WEIGHTS}", flip, "autoencoder.weights|whose sha256"),
            (f"{VAE}/config.json", change("scaling_factor", to=2.0), "scaling_factor"),
            (f"{VAE}/config.json", change("shift_factor", to=0.5), "shift_factor"),
            ("videos/a.y4m", flip, "1 written anew .*a.y4m"),
            ("videos/b/3.bmp", flip, "1 written anew .*b"),
            ("masks/a.bmp", flip, "1 written anew .*a.y4m"),
            ("masks/c/5.bmp", flip, "1 written anew .*c"),
        )
    ),
    *(
        (job, path, edit, said)
        for job in ("sweep", "inpaint")
        for path, edit, said in (
            (f"{UNET}/{WEIGHTS}", flip, "model.weights"),
            (f"{UNET}/config.json", change("head_channels", to=4), "model.config.head_channels"),
            (RECORD, change("diffusion", "target", to="noise"), "model.diffusion.target"),
            (RECORD, change("latents", "std", to=[1.0, 1.0, 1.0, 9.0]), "model.latents.std"),
            (f"{VAE}/{WEIGHTS}", flip, "whose sha256 is .*give that one with --autoencoder"),
            (f"{VAE}/config.json", change("scaling_factor", to=2.0), "whose scaling_factor is 2.0"),
            (f"{VAE}/config.json", change("shift_factor", to=0.5), "whose shift_factor is 0.5"),
        )
    ),
    ("sweep", "shards/train/manifest.json", change("fill", to="[1, 2, 3]"), "shards.manifest"),
    ("inpaint", "videos/b/5.bmp", flip, r"\(video\)"),
    ("inpaint", "masks/b/5.bmp", flip, r"\(mask\)"),
    ("inpaint a file", "videos/a.y4m", flip, r"\(video\)"),
    ("inpaint a file", "masks/a.bmp", flip, r"\(mask\)"),
    ("train.autoencoder", "videos/a.y4m", flip, r"\(videos\)"),
    ("train.autoencoder", "videos/c/1.bmp", flip, r"\(videos\)"),
]


@pytest.mark.parametrize(
    ("job", "path", "edit", "said"), CHANGES, ids=[f"{c[0]}-{c[1]}-{c[3]}" for c in CHANGES]
)
def test_a_job_does_not_go_on_after_what_it_stands_on_has_changed(
    jobs: Jobs, job: str, path: str, edit: Edit, said: str
) -> None:
    with changed(jobs.root / path, edit), pytest.raises(BadInput, match=said):
        jobs.again(job)


@pytest.mark.parametrize("job", ["encode", "sweep", "inpaint", "inpaint a file", "verify"])
def test_a_job_goes_on_where_files_were_only_copied(jobs: Jobs, job: str) -> None:
    with contextlib.ExitStack() as stack:
        for _, path, *_ in CHANGES:
            stack.enter_context(changed(jobs.root / path, touch))
        jobs.again(job)


# Where things are, how shards were encoded, and what diffusers' AutoencoderTiny never reads.
NOT_ITS_FUNCTION = {"latents.autoencoder.name", "latents.autoencoder.precision", "force_upcast"}


@pytest.mark.parametrize("path", ["videos/a.y4m", "masks/a.bmp"])
def test_a_job_ends_where_a_source_changes_while_it_runs(
    jobs: Jobs, path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with changed(jobs.root / path, lambda _: None):
        for step, job in (
            ("encode.run._write_shards", lambda: encode(jobs.encoding)),
            ("inpaint.run.choose", lambda: inpaint(jobs.filling)),
        ):
            module = f"vidfill.{'data' if 'encode' in step else 'sampling'}.{step}"
            own = pkgutil.resolve_name(module)
            after = lambda *a, own=own: (own(*a), flip(jobs.root / path))[0]  # noqa: E731
            monkeypatch.setattr(module, after)
            with pytest.raises(BadInput, match=r"written anew while|have changed"):
                job()
            flip(jobs.root / path)
    assert not jobs.filling.out.exists()


def leaves(tree: dict[str, Any], *keys: str) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, *keys, key)
        elif not key.startswith("_") and ".".join((*keys, key)) not in NOT_ITS_FUNCTION:
            yield (*keys, key)


def another(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value * 2 + 1
        case list() if value:
            return [another(value[0]), *value[1:]]
    return f"{value}?" if isinstance(value, str) else 2


@pytest.mark.slow
@pytest.mark.parametrize("record", [RECORD, f"{UNET}/config.json", f"{VAE}/config.json"])
def test_no_field_of_a_networks_record_may_change(jobs: Jobs, record: str) -> None:
    tree = json.loads((jobs.root / record).read_text())
    fields = list(leaves(tree))
    assert len(fields) > 10
    for field in fields:
        value = tree
        for key in field:
            value = value[key]
        edited = changed(jobs.root / record, change(*field, to=another(value)))
        with edited, pytest.raises(BadInput):
            jobs.again("inpaint")
            pytest.fail(f"{'.'.join(field)} may change")


@pytest.mark.parametrize(
    ("part", "value"),
    [("scaling_factor", 2.0), ("shift_factor", 0.5), ("sha256", "f" * 64), ("kind", "Another")],
)
def test_shards_of_other_latents_fit_no_model_and_no_autoencoder(
    jobs: Jobs, part: str, value: object
) -> None:
    manifest = jobs.root / "checked" / "train" / "manifest.json"
    sweeping = dataclasses.replace(
        jobs.sweeping, shards=str(jobs.root / "checked"), out=jobs.root / "other"
    )
    checking = VerifyConfig(str(jobs.root / "checked"), samples=1, device="cpu")
    with changed(manifest, change("autoencoder", part, to=value)):
        for job in (
            lambda: sweep(sweeping),
            lambda: verify(dataclasses.replace(checking, autoencoder=str(jobs.root / VAE))),
            lambda: jobs.again("encode in checked"),
        ):
            with pytest.raises(BadInput, match=f"whose {part} is .*, whose {part} is "):
                job()
    assert not sweeping.out.exists()
