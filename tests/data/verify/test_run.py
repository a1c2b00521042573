from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import xxhash
from diffusers import AutoencoderTiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vidfill.data.encode.run import encode
from vidfill.data.encode.settings import EncodeConfig
from vidfill.data.shards.format import Example, Manifest, ShardTable
from vidfill.data.shards.reading import ExampleLayout, Shard, ShardedDataset
from vidfill.data.shards.writing import latent_moments, read_index, write_shard
from vidfill.data.storage.names import MANIFEST, shard_name
from vidfill.data.synth.run import SynthConfig, synth
from vidfill.data.verify.findings import SHOWN, Look, is_sound
from vidfill.data.verify.latents import Evidence
from vidfill.data.verify.run import VerifyConfig, main, verify
from vidfill.errors import BadInput
from vidfill.modeling.autoencoder import to_pixels

FACTOR = 0.18215  # Stable Diffusion's
TAR, INDEX = "shard-000000.tar", "shard-000000.index.json"


def _make_autoencoder(folder: Path, frames: np.ndarray) -> None:
    """A random autoencoder whose factor is one over its latents' standard deviation."""
    torch.manual_seed(0)
    network = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        scaling_factor=FACTOR,
    )
    with torch.no_grad():
        latents = network.encode(to_pixels(frames)).latents
        last = network.encoder.layers[-1]
        last.weight.mul_(1 / FACTOR / latents.std())
        last.bias.mul_(1 / FACTOR / latents.std())
    network.save_pretrained(folder)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two splits, several shards and kinds of masks, beside its videos."""
    from vidfill.data.videos import read_video

    root = tmp_path_factory.mktemp("pristine")
    synth(SynthConfig(root / "videos", clips=5, validation=2, size=32, frames=12))
    frames, _ = read_video(next((root / "videos").rglob("*.mp4")))
    _make_autoencoder(root / "autoencoder", frames)
    encode(
        EncodeConfig(
            root / "videos",
            root / "shards",
            autoencoder=str(root / "autoencoder"),
            frames=6,
            masks="stationary variable border prediction",
            masks_per_clip=2,
            fill="255,0,0",  # far from all that the videos show
            shard_megabytes=0.12,
            device="cpu",
        )
    )
    assert len(list((root / "shards" / "train").glob("*.tar"))) > 2
    return root / "shards"


@pytest.fixture
def dataset(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(pristine, tmp_path / "shards")


def look(root: Path, **options: Any) -> tuple[dict[str, int], str]:
    """What is wrong, by check, and the reasons in one text; only with `repair` is any written."""
    before = hash_tree(root)
    looks = verify(VerifyConfig(str(root), **{"samples": 0, "device": "cpu", **options}))
    if not options.get("repair"):
        assert hash_tree(root) == before
    return count(looks), "\n".join(" ".join(finding) for look in looks for finding in look.findings)


def count(looks: list[Look]) -> dict[str, int]:
    return {check: bad for look in looks for check, bad in look.bad.items() if bad}


def hash_tree(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def rewrite(
    root: Path, change: Callable[[Example], Example], numbers: set[int] | None = None
) -> None:
    """Write a split's shards anew, with all that is said of them made consistent."""
    folder = root / "train"
    manifest = Manifest.from_json((folder / MANIFEST).read_bytes(), "manifest")
    indexes = []
    for number in range(len(manifest.shards.bytes)):
        shard = Shard(folder / shard_name(number), number, manifest)
        if numbers is None or number in numbers:
            examples = [change(shard.read(row)) for row in range(len(shard.keys))]
            indexes.append(write_shard(folder, number, shard.index.sources, examples))
        else:
            indexes.append(shard.index)
    mean, std = latent_moments(indexes)
    manifest = dataclasses.replace(
        manifest,
        shards=ShardTable.of(indexes),
        latents_mean=tuple(mean),
        latents_std=tuple(std),
    )
    (folder / MANIFEST).write_text(manifest.to_json())


def plant(root: Path, at: int, content: bytes, member: str = "") -> None:
    """Overwrite bytes of the first shard, with all checksums made consistent."""
    path = root / "train" / TAR
    manifest = Manifest.from_json((root / "train" / MANIFEST).read_bytes(), "manifest")
    span = ExampleLayout.of(manifest).bytes
    tar = bytearray(path.read_bytes())
    tar[at : at + len(content)] = content
    path.write_bytes(tar)
    sha256 = hashlib.sha256(tar).hexdigest()

    def mend_index(index: dict) -> None:
        index["sha256"] = sha256
        if member:
            column = index["members"][member]
            first, size = column["offsets"][0], column["sizes"][0]
            column["checksums"][0] = xxhash.xxh3_64_hexdigest(bytes(tar[first : first + size]))
        first = index["members"]["latents.npy"]["offsets"][0]
        index["spans"][0] = xxhash.xxh3_64_hexdigest(bytes(tar[first : first + span]))

    change_json(root / "train" / INDEX, mend_index)
    change_json(
        root / "train" / MANIFEST,
        lambda manifest: manifest["shards"]["sha256"].__setitem__(0, sha256),
    )


def place_of(root: Path, member: str) -> tuple[int, int]:
    index = read_index(root / "train", 0)
    assert index is not None
    return index.members[member].offsets[0], index.members[member].sizes[0]


def test_what_encode_wrote_is_sound(pristine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(pristine), "--samples", "3", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.count("│ ok") == 26
    assert said.count("PSNR") == 2
    assert "BAD" not in said


def test_moments_and_pixels_are_sound_too(pristine: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        layers_per_block=1,
    ).save_pretrained(tmp_path / "autoencoder")
    encode(
        EncodeConfig(
            pristine.parent / "videos",
            tmp_path / "shards",
            autoencoder=str(tmp_path / "autoencoder"),
            frames=6,
            masks="strokes box infilling",
            posterior="moments",
            pixels="all",
            device="cpu",
        )
    )
    looks = verify(VerifyConfig(str(tmp_path / "shards"), samples=2, device="cpu"))
    assert is_sound(looks)
    assert [look.seen["encoded again"] for look in looks] == [2, 2]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_a_tar_is_found(dataset: Path, place: float, bit: int) -> None:
    path = dataset / "train" / TAR
    whole = path.read_bytes()
    tar = bytearray(whole)
    tar[int(place * len(tar))] ^= 1 << bit
    path.write_bytes(tar)
    wrong, said = look(dataset, split="train")
    path.write_bytes(whole)
    assert wrong["SHA-256"] == 1
    assert f"train/{TAR}" in said


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1024])


FILE_DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("shards", lambda f: cut(f / TAR), "bytes where its manifest says"),
    ("shards", lambda f: (f / TAR).unlink(), "it is missing"),
    ("shards", lambda f: (f / INDEX).unlink(), "its index is missing"),
    ("shards", lambda f: (f / INDEX).write_bytes(b"{"), "its index is damaged"),
    (
        "shards",
        lambda f: shutil.copy(f / "shard-000001.index.json", f / INDEX),
        "of another shard",
    ),
    ("manifest", lambda f: shutil.copy(f / TAR, f / "shard-000099.tar"), "no shard of the"),
    ("manifest", lambda f: (f / "extra.tar").write_bytes(b""), "no shard of the manifest"),
    ("manifest", lambda f: (f / MANIFEST).unlink(), "it is missing"),
    ("manifest", lambda f: cut(f / MANIFEST), "is no JSON"),
    ("manifest", lambda f: (f / "skipped.jsonl").unlink(), "skipped.jsonl it is missing"),
    ("manifest", lambda f: (f / "skipped.jsonl").write_text("x"), "not what was written"),
    (
        "manifest",
        lambda f: (f / "skipped.jsonl").write_text('{"source": "a", "reason": "b"}'),
        "lists 1 videos",
    ),
    (
        "shards",
        lambda f: change_json(
            f / MANIFEST,
            lambda m: (
                m.update(examples=m["examples"] + 1),
                m["shards"]["examples"].__setitem__(0, m["shards"]["examples"][0] + 1),
            ),
        ),
        "of another shard than the manifest's",
    ),
    (
        "manifest",
        lambda f: change_json(f / MANIFEST, lambda m: m.update(skipped=3)),
        "it says that 3 videos were skipped",
    ),
    (
        "manifest",
        lambda f: change_json(f / MANIFEST, lambda m: m.update(lanes=10**9)),
        "1000000000 lanes",
    ),
    (
        "manifest",
        lambda f: change_json(f / MANIFEST, lambda m: m.update(split="test")),
        "the split 'test'",
    ),
    (
        "manifest",
        lambda f: change_json(f / MANIFEST, lambda m: m["autoencoder"].update(scaling_factor=0)),
        "scaling_factor is 0",
    ),
    (
        "statistics",
        lambda f: change_json(f / MANIFEST, lambda m: m["latents_std"].__setitem__(1, 0.25)),
        "latents_std of channel 1 is 0.25",
    ),
    (
        "statistics",
        lambda f: change_json(f / INDEX, lambda i: i["sums"].__setitem__(0, 1e6)),
        "other sums of latents",
    ),
    (
        "tar members",
        lambda f: change_json(
            f / INDEX,
            lambda i: i["members"]["json"]["offsets"].__setitem__(
                0, i["members"]["json"]["offsets"][1]
            ),
        ),
        "where its index has",
    ),
]


@pytest.mark.parametrize(("check", "damage", "reason"), FILE_DAMAGE)
def test_damaged_files_are_named(
    dataset: Path, check: str, damage: Callable[[Path], object], reason: str
) -> None:
    damage(dataset / "train")
    wrong, said = look(dataset)
    assert wrong[check]
    assert reason in said
    assert all("train/" in line for line in said.splitlines())


def with_mask(example: Example, mask: np.ndarray) -> Example:
    return dataclasses.replace(example, mask=mask)


def with_nan(example: Example) -> Example:
    latents = example.latents.copy()
    latents[2, 1, 0, 0] = np.nan
    return dataclasses.replace(example, latents=latents)


def in_another_frame(example: Example) -> Example:
    """Where frames are hidden or not as a whole, the next ones."""
    return with_mask(example, np.roll(example.mask, 3, axis=0))


VALUE_DAMAGE: list[tuple[str, Callable[[Example], Example], str]] = [
    ("finite values", with_nan, "latents holds NaN"),
    ("masks", lambda e: with_mask(e, e.mask * 0), "hides nothing"),
    ("masks", lambda e: with_mask(e, e.mask * 0 + 1), "hides the whole clip"),
    ("masks", lambda e: with_mask(e, e.mask * 2), "has the value 2"),
    ("masked latents", lambda e: with_mask(e, 1 - e.mask), "its mask is inverted"),
    ("masked latents", in_another_frame, "masked latents differ"),
    (
        "masked latents",
        lambda e: dataclasses.replace(e, latents=e.masked_latents, masked_latents=e.latents),
        "swapped",
    ),
    (
        "XXH3, shapes",
        lambda e: dataclasses.replace(e, record={**e.record, "source": "../../secret.mp4"}),
        "outside the folder of videos",
    ),
    ("XXH3, shapes", lambda e: dataclasses.replace(e, record={}), "has no source"),
    (
        "XXH3, shapes",
        lambda e: dataclasses.replace(e, record={**e.record, "fill": [1, 2]}),
        "which is no colour",
    ),
    (
        "XXH3, shapes",
        lambda e: dataclasses.replace(e, record={**e.record, "split": "test"}),
        "of the split test",
    ),
    (
        "XXH3, shapes",
        lambda e: with_mask(e, np.repeat(e.mask, 2, axis=1)),
        "the manifest says uint8",
    ),
    ("keys", lambda e: dataclasses.replace(e, key="same_stationary"), "of this key too"),
]


@pytest.mark.parametrize(("check", "change", "reason"), VALUE_DAMAGE)
def test_wrong_values_under_right_checksums_are_named(
    dataset: Path, check: str, change: Callable[[Example], Example], reason: str
) -> None:
    rewrite(dataset, change, numbers={1})
    wrong, said = look(dataset)
    assert wrong[check]
    assert reason in said
    assert "shard-000001.tar video_" in said or "same_stationary" in said
    assert "shard-000000.tar" not in said


@pytest.mark.parametrize(
    ("evidence", "reason"),
    [
        (Evidence(0.5, 0.2, 0.0, 0.3, 0.8), ""),
        (Evidence(0.02, 0.03, 0.0, 0.2, 0.2), ""),  # what is hidden has the fill's colour
        (Evidence(0.02, 0.02, 0.0, 0.2, 0.2, 0.4), ""),
        (Evidence(0.0, 0.0, 0.0, 0.2, 0.2, 1.0), "are the same in 100% of the examples"),
        (Evidence(0.3, 0.35, 0.0, 0.3, 0.3), "masks are not theirs"),
        (Evidence(0.5, 0.2, 0.0, 0.6, 0.4), "the two are swapped"),
    ],
)
def test_what_shows_in_no_example_shows_on_average(evidence: Evidence, reason: str) -> None:
    assert not evidence.find_wrong(tolerance=0.01)
    wrong = evidence.find_wrong_on_average()
    assert reason in wrong
    assert bool(reason) == bool(wrong)


def test_a_repair_that_cannot_begin_leaves_all_as_it_was(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = dataset / "train" / TAR
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    (tmp_path / "others").mkdir()
    before = hash_tree(dataset)
    assert main([str(dataset), "--repair", "--samples", "0", "--videos", str(tmp_path / "others")])
    assert hash_tree(dataset) == before


def test_examples_of_which_nothing_was_masked_are_found(dataset: Path) -> None:
    rewrite(dataset, lambda e: dataclasses.replace(e, masked_latents=e.latents))
    wrong, said = look(dataset)
    assert wrong["masked latents"]
    assert "are the same in 100% of the examples" in said


def test_a_latent_mask_of_another_mask_is_found(dataset: Path) -> None:
    first, size = place_of(dataset, "latent_mask.npy")
    plant(dataset, first + size - 2, np.float16(0.5).tobytes(), "latent_mask.npy")
    wrong, said = look(dataset)
    assert wrong == {"masks": 1}
    assert "its latent_mask is not its mask's" in said


def test_a_pickle_is_found_and_never_loaded(dataset: Path) -> None:
    first, size = place_of(dataset, "masked_latents.npy")
    content = io.BytesIO()
    np.save(content, np.array([Path("x")], dtype=object), allow_pickle=True)
    assert pickle.PROTO in content.getvalue()
    plant(dataset, first, content.getvalue().ljust(size, b"\0"), "masked_latents.npy")
    wrong, _ = look(dataset)
    assert wrong["XXH3, shapes"] == 1


@pytest.mark.parametrize("member", ["latents.npy", "latent_mask.npy"])
def test_an_array_in_another_order_than_training_takes_it_for_is_found(
    dataset: Path, member: str
) -> None:
    first, _ = place_of(dataset, member)
    tar = (dataset / "train" / TAR).read_bytes()
    at = tar.index(b"False", first)
    assert b"fortran_order" in tar[first:at]
    plant(dataset, at, b"True ", member)
    wrong, said = look(dataset)
    assert wrong["XXH3, shapes"] == 1
    assert f"{member.removesuffix('.npy')} is no array of the manifest's shape" in said


@pytest.mark.parametrize("name", ["../../../tmp/a.json", "a.json"])
def test_a_member_of_another_name_is_found(dataset: Path, name: str) -> None:
    first, size = place_of(dataset, "json")
    header = tarfile.TarInfo(name)
    header.size = size
    plant(dataset, first - 512, header.tobuf(tarfile.GNU_FORMAT))
    wrong, said = look(dataset)
    assert wrong == {"tar members": 1}
    assert f"it has {name!r} where its index has video_" in said


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize(
    ("factor", "said_of_it"), [(FACTOR, "scaled twice"), (1 / FACTOR, "not scaled at all")]
)
def test_a_wrong_scaling_is_recognised(
    dataset: Path, factor: float, said_of_it: str, samples: int
) -> None:
    def scale(example: Example) -> Example:
        return dataclasses.replace(
            example,
            latents=(example.latents * np.float32(factor)).astype(np.float16),
            masked_latents=(example.masked_latents * np.float32(factor)).astype(np.float16),
        )

    rewrite(dataset, scale)
    wrong, said = look(dataset, samples=samples)
    assert wrong["scaling"] == 1
    assert f"the latents are {said_of_it}" in said


def test_clips_of_other_videos_are_found_by_encoding_them(dataset: Path) -> None:
    def turn(example: Example) -> Example:
        turned = {
            name: np.ascontiguousarray(getattr(example, name)[..., ::-1])
            for name in ("latents", "masked_latents", "mask")
        }
        return dataclasses.replace(example, **turned)

    rewrite(dataset, turn)
    assert look(dataset) == ({}, "")
    wrong, said = look(dataset, samples=2)
    assert wrong["encoded again"] == 2
    assert "encoded afresh it is another" in said


def test_videos_and_autoencoder_may_lie_elsewhere(dataset: Path, pristine: Path) -> None:
    videos = shutil.copytree(pristine.parent / "videos", dataset.parent / "moved")
    change_json(dataset / "job.json", lambda job: job["config"].update(videos="/nowhere"))
    for split in ("train", "validation"):
        change_json(dataset / split / MANIFEST, lambda m: m["autoencoder"].update(name="/nowhere"))
    [without, _] = verify(VerifyConfig(str(dataset), samples=2))
    assert without.seen["decoded"] == 0
    assert "cannot load /nowhere" in without.notes["decoded"]
    autoencoder = str(pristine.parent / "autoencoder")
    options = {"samples": 2, "autoencoder": autoencoder, "device": "cpu"}
    [train, validation] = verify(VerifyConfig(str(dataset), **options))
    assert "give --videos" in train.notes["encoded again"]
    assert validation.seen["encoded again"] == 2  # of the pixels that it keeps
    [train, _] = verify(VerifyConfig(str(dataset), videos=videos, **options))
    assert train.seen["encoded again"] == 2
    assert is_sound([train, validation])


def damage_much(root: Path) -> None:
    tar = bytearray((root / "train" / TAR).read_bytes())
    tar[3000] ^= 1
    (root / "train" / TAR).write_bytes(tar)
    cut(root / "train" / "shard-000001.tar")
    (root / "validation" / INDEX).unlink()
    (root / "validation" / MANIFEST).write_text("{}")
    (root / "train" / "skipped.jsonl").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        damage_much,
        lambda root: shutil.rmtree(root / "validation"),
        lambda root: rewrite(root, with_nan, numbers={2}),
    ],
)
def test_repair_gives_back_the_very_bytes(
    dataset: Path, pristine: Path, damage: Callable[[Path], object]
) -> None:
    damage(dataset)
    assert main([str(dataset), "--samples", "0", "--repair", "true", "--device", "cpu"]) == 0
    before, after = hash_tree(pristine), hash_tree(dataset)
    del before["job.json"], after["job.json"]  # it names the folder, which is a copy
    assert after == before


def test_repair_says_what_it_lacks(
    dataset: Path, pristine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--samples", "0", "--repair", "true", "--device", "cpu"]
    (dataset / "train" / "extra.tar").write_bytes(b"")
    assert main([str(dataset), *arguments]) == 1
    assert "encoding again repairs nothing of this" in capsys.readouterr().err
    (dataset / "train" / "extra.tar").unlink()
    (dataset / "train" / TAR).unlink()
    moved = shutil.copytree(pristine.parent / "videos", dataset.parent / "moved")
    assert main([str(dataset), *arguments, "--videos", str(moved)]) == 0
    (dataset / "train" / TAR).unlink()
    change_json(dataset / "job.json", lambda job: job["config"].update(videos="/nowhere"))
    assert main([str(dataset), *arguments]) == 2
    assert "the videos are not in /nowhere; give --videos" in capsys.readouterr().err
    (dataset / "job.json").unlink()
    assert main([str(dataset), *arguments]) == 2
    assert "does not say how this was encoded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "/nowhere"}, "/nowhere holds no encoded split"),
        ({"samples": -1}, "samples is -1"),
        ({"split": "test"}, "split is 'test'; .* has train, validation"),
        ({"videos": Path("/nowhere")}, "videos is /nowhere"),
        ({"autoencoder": "/nowhere"}, "cannot load /nowhere"),
        ({"autoencoder": "shipped"}, "name that one"),
        ({"dataset": "https://a.b/c", "repair": True}, "is a URL: repair the folder"),
    ],
)
def test_bad_input_is_one_line(pristine: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        verify(VerifyConfig(**{"dataset": str(pristine), "samples": 1, "device": "cpu", **options}))


def test_what_lies_behind_a_url_is_checked_too(
    dataset: Path, pristine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"memory://{dataset}"
    memory = fsspec.filesystem("memory")
    memory.put(str(pristine), str(dataset), recursive=True)
    videos = ["--videos", str(pristine.parent / "videos"), "--device", "cpu"]
    assert main([url, "--samples", "1", *videos]) == 0
    assert capsys.readouterr().out.count("│ ok") == 26
    memory.pipe(f"{dataset}/train/{TAR}", b"other")
    memory.rm(f"{dataset}/validation/{INDEX}")
    assert main([url, "--samples", "0"]) == 1
    said = capsys.readouterr().out
    assert f"train/{TAR}" in said
    assert f"validation/{TAR}" in said
    assert "repair the original" in said


def test_many_findings_are_shown_by_a_few_of_each_kind(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(dataset, lambda e: with_mask(e, e.mask * 2))
    for number in range(100, 100 + 2 * SHOWN):
        (dataset / "train" / shard_name(number)).write_bytes(b"")
    assert main([str(dataset), "--samples", "0"]) == 1
    said = capsys.readouterr().out
    assert said.count("has the value 2") == said.count("remove it") == SHOWN // 2
    examples = len(ShardedDataset(dataset, "train"))
    assert f"and {2 * SHOWN + examples - SHOWN} more" in said
