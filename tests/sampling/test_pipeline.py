"""The pipeline gives the same frames wherever it is loaded, and leaves what is visible alone."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from vidfill.errors import BadInput
from vidfill.modeling.autoencoder import Autoencoder, load_autoencoder
from vidfill.modeling.denoiser import SHIPPED, SHIPPED_FOLDER, Denoiser
from vidfill.sampling.inpaint import windows
from vidfill.sampling.inpaint.windows import Filler, fill_stretches, usual_schedule
from vidfill.sampling.pipeline import VideoInpaintPipeline, read_mask, read_video
from vidfill.sampling.schedules.language import parse
from vidfill.sampling.schedules.program import compile_schedule

SCHEDULE = "ddim:2"
FRAMES, HEIGHT, WIDTH = 5, 18, 22  # more frames than a window has, sides that fit nothing

# A process that knows nothing of this one fills what it is given.
READER = """
import sys
import numpy as np
from diffusers import DiffusionPipeline

given, folder = np.load(sys.argv[1]), sys.argv[2]
first = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
from vidfill import VideoInpaintPipeline
assert isinstance(first, VideoInpaintPipeline)
for number, pipe in enumerate([first, VideoInpaintPipeline.from_pretrained(folder)]):
    frames = pipe(given["video"], given["mask"], num_samples=2, output_type="np").frames
    np.save(f"{number}.npy", frames)
"""

PUSHER = """
import sys
import numpy as np
from vidfill import VideoInpaintPipeline

given, folder, name = np.load(sys.argv[1]), *sys.argv[2:]
VideoInpaintPipeline.from_pretrained(folder).push_to_hub(name, token="hf_none", private=True)
pipe = VideoInpaintPipeline.from_pretrained(name)
frames = pipe(given["video"], given["mask"], num_samples=2, output_type="np").frames
np.save("0.npy", frames)
"""


@pytest.fixture
def pipe(denoiser: Denoiser, autoencoder: Autoencoder) -> VideoInpaintPipeline:
    made = VideoInpaintPipeline.of(denoiser, autoencoder, SCHEDULE)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def video() -> np.ndarray:
    random = np.random.default_rng(0)
    return random.integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture
def mask() -> np.ndarray:
    """A box that moves, and a frame without a hole."""
    hole = np.zeros((FRAMES, HEIGHT, WIDTH), bool)
    for frame in range(FRAMES - 1):
        hole[frame, 4:12, 3 + frame : 11 + frame] = True
    return hole


def frames_of(pipe: VideoInpaintPipeline, *given: object, **options: object) -> np.ndarray:
    """Of all samples, as 8-bit values."""
    values = pipe(*given, output_type="np", **options).frames
    return np.rint(values * 255).astype(np.uint8)


def run_apart(folder: Path, script: str, clip: dict, *words: str, **environment: str) -> None:
    """Run a script in a process of its own, which works in `folder`."""
    np.savez(folder / "given.npz", **clip)
    command = [sys.executable, "-c", script, "given.npz", *words]
    environment |= {"HF_HOME": str(folder / "home")}
    subprocess.run(command, check=True, cwd=folder, env=os.environ | environment)


# What it makes


def test_what_is_visible_stays_to_the_bit_and_samples_differ_in_the_holes(
    pipe: VideoInpaintPipeline, video: np.ndarray, mask: np.ndarray
) -> None:
    first, second = frames_of(pipe, video, mask, num_samples=2)
    for frames in (first, second):
        assert np.array_equal(frames[~mask], video[~mask])
        assert not np.array_equal(frames[mask], video[mask])
    assert not np.array_equal(first, second)
    assert np.array_equal(frames_of(pipe, video, mask)[0], first)


def test_it_is_what_the_windows_are_filled_with(
    pipe: VideoInpaintPipeline,
    denoiser: Denoiser,
    autoencoder: Autoencoder,
    video: np.ndarray,
    mask: np.ndarray,
) -> None:
    program = compile_schedule(parse("ddim:3"), denoiser.timesteps)
    filler = Filler(denoiser, autoencoder, program, seed=7, samples=[1], feather=2)
    given = zip(video, mask.astype(np.uint8), strict=True)
    expected = [frame for stretch in fill_stretches(given, filler) for frame in stretch.frames[0]]
    frames = frames_of(pipe, video, mask, "ddim:3", seed=7, num_samples=2, feather=2)
    assert np.array_equal(frames[1], np.stack(expected))


def test_the_seed_decides_and_a_generator_draws_it(
    pipe: VideoInpaintPipeline, video: np.ndarray, mask: np.ndarray
) -> None:
    draws = [
        frames_of(pipe, video, mask, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
    assert not np.array_equal(frames_of(pipe, video, mask, seed=1), frames_of(pipe, video, mask))


def test_all_outputs_are_the_same_frames(
    pipe: VideoInpaintPipeline, video: np.ndarray, mask: np.ndarray
) -> None:
    expected = frames_of(pipe, video, mask)
    values = pipe(video, mask, output_type="np").frames
    assert np.array_equal((values * 255).astype(np.uint8), expected)  # as export_to_video does
    images = pipe(video, mask).frames
    assert np.array_equal([[np.array(image) for image in frames] for frames in images], expected)
    tensor = pipe(video, mask, output_type="pt").frames
    assert tensor.shape == (1, FRAMES, 3, HEIGHT, WIDTH)
    assert np.array_equal(tensor.permute(0, 1, 3, 4, 2).numpy(), values)


# What goes in


def test_all_ways_to_hold_a_video_are_the_same_frames(video: np.ndarray) -> None:
    channels_first = torch.from_numpy(video).permute(0, 3, 1, 2)
    for held in (
        [Image.fromarray(frame) for frame in video],
        video.astype(np.float32) / 255,
        video.astype(np.float64) / 255,
        channels_first,
        channels_first.float() / 255,
    ):
        assert np.array_equal(read_video(held), video)


def test_all_ways_to_hold_a_mask_are_the_same_holes(video: np.ndarray, mask: np.ndarray) -> None:
    levels = mask * np.uint8(255)
    tensor = torch.from_numpy(mask)
    for held in (
        mask,
        mask.astype(np.uint8),
        levels,
        np.where(mask, 140, 90).astype(np.uint8),
        mask.astype(np.float32)[..., None],
        tensor,
        tensor[:, None].float(),
        [Image.fromarray(frame) for frame in levels],
        [Image.fromarray(frame).convert("RGB") for frame in levels],
    ):
        assert np.array_equal(read_mask(held, video), mask)
    one_for_all = np.broadcast_to(mask[0], mask.shape)
    for held in (mask[0], mask[:1], tensor[0], Image.fromarray(levels[0])):
        assert np.array_equal(read_mask(held, video), one_for_all)
    assert not read_mask(Image.new("L", (WIDTH, HEIGHT), 1), video).any()


BLANK = np.zeros((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
HOLE = np.zeros((FRAMES, HEIGHT, WIDTH), bool)


@pytest.mark.parametrize(
    ("video", "mask", "said"),
    [
        (BLANK, HOLE[:-1], r"mask has the shape \[4, 18, 22\], the video's frames \[5, 18, 22\]"),
        (BLANK, HOLE[:, :-1], "one for all, of their size"),
        (BLANK, BLANK, r"mask has the shape \[5, 18, 22, 3\]"),
        (BLANK, HOLE.astype(np.int64), "mask is of int64: give 8-bit values"),
        (BLANK, HOLE - 0.5, "mask has values from -0.5 to -0.5"),
        (BLANK.astype(np.int32), HOLE, "video is of int32"),
        (BLANK - 1.0, HOLE, "video has values from -1 to -1: give floats from 0 to 1"),
        (BLANK + np.nan, HOLE, "video has values from nan to nan"),
        (BLANK[0], HOLE, r"video has the shape \[18, 22, 3\]: give one of \[frames, height"),
        (BLANK[None], HOLE, r"give one of \[frames, height, width, 3\]"),
        (BLANK[:0], HOLE, r"video has the shape \[0, 18, 22, 3\]"),
        (torch.from_numpy(BLANK), HOLE, r"give one of \[frames, 3, height, width\]"),
        ([], HOLE, "video has images of no size"),
        ("clip.mp4", HOLE, "video is a list of other things than PIL images"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], HOLE, "images of 8x8 and 8x9"),
    ],
)
def test_what_is_no_video_or_does_not_fit_is_refused_by_name(
    video: object, mask: object, said: str, pipe: VideoInpaintPipeline
) -> None:
    with pytest.raises(BadInput, match=said):
        pipe(video, mask)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_samples": 0}, "num_samples is 0: give 1 or more"),
        ({"schedule": "ddim:99"}, "the model was trained with 40 timesteps"),
        ({"output_type": "latent"}, "output_type is 'latent': give one of pil, np, pt"),
        ({"overlap": 9}, "overlap is 9"),
    ],
)
def test_an_impossible_option_is_refused_by_name(
    options: dict, said: str, pipe: VideoInpaintPipeline
) -> None:
    # The output's type is checked by Beartype first, as long as the tests run.
    with pytest.raises(Exception, match=said if "output_type" not in options else "output_type"):
        pipe(BLANK, HOLE, **options)


def test_an_autoencoder_of_other_latents_is_refused(denoiser: Denoiser) -> None:
    with pytest.raises(BadInput, match=r"vae has downsampling 8; .* of one with 4"):
        described = denoiser.describe()
        VideoInpaintPipeline(denoiser.network, load_autoencoder("shipped").network, **described)
    with pytest.raises(BadInput, match="diffusion and latents are missing"):
        VideoInpaintPipeline(denoiser.network)


# The folder


def test_saved_and_loaded_in_a_fresh_process_it_gives_the_same_frames(
    pipe: VideoInpaintPipeline, video: np.ndarray, mask: np.ndarray, tmp_path: Path
) -> None:
    expected = pipe(video, mask, num_samples=2, output_type="np").frames
    pipe.save_pretrained(tmp_path / "model")
    run_apart(tmp_path, READER, {"video": video, "mask": mask}, "model")
    for by_diffusers_and_by_us in ("0.npy", "1.npy"):
        assert np.array_equal(np.load(tmp_path / by_diffusers_and_by_us), expected)


def test_diffusers_runs_no_code_of_a_folder_unasked(
    pipe: VideoInpaintPipeline, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_the_folder_is_a_model_for_every_verb(
    pipe: VideoInpaintPipeline, denoiser: Denoiser, autoencoder: Autoencoder, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = Denoiser.load(tmp_path)
    assert loaded.config == denoiser.config
    assert loaded.space.shape == denoiser.space.shape
    ours, theirs = loaded.network.state_dict(), denoiser.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert load_autoencoder(loaded.autoencoder["name"]).sha256 == autoencoder.sha256


def test_the_packages_own_autoencoder_is_named_and_not_written(
    denoiser: Denoiser, video: np.ndarray, mask: np.ndarray, tmp_path: Path
) -> None:
    shipped = load_autoencoder("shipped")
    space = dataclasses.replace(denoiser.space, autoencoder=shipped.identity())
    pipe = VideoInpaintPipeline.of(Denoiser(denoiser.network, denoiser.config, space), shipped)
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "vae").exists()
    again = VideoInpaintPipeline.from_pretrained(tmp_path)
    frames = [frames_of(p, video, mask, SCHEDULE) for p in (pipe, again)]
    assert np.array_equal(*frames)
    assert Denoiser.load(tmp_path).autoencoder["name"] == "shipped"


def test_the_card_goes_along_and_no_path_of_this_machine(
    pipe: VideoInpaintPipeline, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    pipe.save_pretrained(first)
    (first / "README.md").write_text("# A model\n")
    VideoInpaintPipeline.from_pretrained(first).save_pretrained(second)
    written = {file.relative_to(second): file for file in second.rglob("*") if file.is_file()}
    assert {str(name) for name in written} == {
        *("README.md", "model_index.json", "pipeline.py"),
        *("unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        *("vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
    }
    assert (second / "README.md").read_text() == "# A model\n"
    for file in written.values():
        assert str(tmp_path).encode() not in file.read_bytes()
        assert file.stat().st_mode == (second / "README.md").stat().st_mode


def test_a_folder_without_a_pipeline_is_refused_with_the_remedy(
    denoiser: Denoiser, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="holds no model"):
        VideoInpaintPipeline.from_pretrained(tmp_path)
    denoiser.save(tmp_path)
    with pytest.raises(BadInput, match="`vidfill export` makes a pipeline of a run"):
        VideoInpaintPipeline.from_pretrained(tmp_path)


def test_a_folder_says_which_schedule_is_its_usual_one(
    pipe: VideoInpaintPipeline, denoiser: Denoiser, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path / "given")
    denoiser.save(tmp_path / "of_a_run")
    assert usual_schedule(tmp_path / "given") == SCHEDULE
    assert usual_schedule(tmp_path / "of_a_run") == windows.SCHEDULE


def test_the_packages_own_model_fills_at_once_and_is_small(
    video: np.ndarray, mask: np.ndarray, capfd: pytest.CaptureFixture[str]
) -> None:
    files = [file for file in SHIPPED_FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 10e6
    assert (SHIPPED_FOLDER / "README.md").is_file()
    pipe = VideoInpaintPipeline.from_pretrained(SHIPPED)
    assert "the package's own small model" in capfd.readouterr().err
    frames = frames_of(pipe, video, mask, "ddim:1")[0]
    assert np.array_equal(frames[~mask], video[~mask])
    assert not np.array_equal(frames[mask], video[mask])


# Precisions and devices


def assert_near(ours: np.ndarray, theirs: np.ndarray, most: int) -> None:
    assert np.abs(ours.astype(int) - theirs).max() <= most


def test_a_variant_in_half_precision_loads(
    pipe: VideoInpaintPipeline, video: np.ndarray, mask: np.ndarray, tmp_path: Path
) -> None:
    expected = frames_of(pipe, video, mask)
    pipe.save_pretrained(tmp_path / "whole")
    half = VideoInpaintPipeline.from_pretrained(tmp_path / "whole", dtype=torch.float16)
    assert (half.unet.dtype, half.vae.dtype) == (torch.float16, torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    name = "diffusion_pytorch_model.fp16.safetensors"
    assert all((tmp_path / "half" / part / name).is_file() for part in ("unet", "vae"))
    again = VideoInpaintPipeline.from_pretrained(tmp_path / "half", variant="fp16")
    assert again.unet.dtype == torch.float32
    # Eleven bits of each weight are left: measured 1 of 255.
    assert_near(frames_of(again, video, mask), expected, 2)
    assert_near(frames_of(half, video, mask), expected, 2)


def test_in_bfloat16_it_computes_in_bfloat16(
    pipe: VideoInpaintPipeline, video: np.ndarray, mask: np.ndarray
) -> None:
    expected = frames_of(pipe, video, mask)
    moved = pipe.to("cpu", torch.bfloat16)
    assert moved.unet.dtype == torch.bfloat16
    assert (moved.denoiser.precision, moved.autoencoder.precision) == ("bfloat16", "bfloat16")
    frames = frames_of(moved, video, mask)
    assert np.array_equal(frames[0][~mask], video[~mask])
    # Eight bits of each weight and activation are left.
    assert_near(frames, expected, 10)
    assert not np.array_equal(frames, expected)


def test_offloaded_it_gives_the_same_frames(
    pipe: VideoInpaintPipeline, video: np.ndarray, mask: np.ndarray
) -> None:
    expected = frames_of(pipe, video, mask)
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(frames_of(pipe, video, mask), expected)
    assert np.array_equal(frames_of(pipe, video, mask), expected)


# The hub


class Hub(ThreadingHTTPServer):
    """As much of the Hugging Face hub as an upload and a download ask for, for one model."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


COMMIT = "0" * 40
NAME = "someone/filler"


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            self._say({"url": f"{self.server.url}/{NAME}"})
        elif path == f"/api/models/{NAME}/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self._say({"files": [{"path": name, **modes} for name in names]})
        elif path == f"/api/models/{NAME}/commit/main":
            lines = [json.loads(line) for line in body.splitlines()]
            for value in (line["value"] for line in lines if line["key"] == "file"):
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.url}/{NAME}/commit/{COMMIT}"
            self._say({"success": True, "commitOid": COMMIT, "commitUrl": url})
        else:
            self._say({"warnings": [], "errors": []})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        resolved = f"/{NAME}/resolve/{COMMIT}/"
        if path.startswith(f"/api/models/{NAME}/tree/"):
            self._say(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": _hash(content)}
                    for name, content in self.server.files.items()
                ]
            )
        elif path.startswith(f"/api/models/{NAME}"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self._say({"id": NAME, "sha": COMMIT, "siblings": siblings})
        elif path.startswith(resolved) and path.removeprefix(resolved) in self.server.files:
            self._send(self.server.files[path.removeprefix(resolved)], "application/octet-stream")
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def _say(self, answer: object) -> None:
        self._send(json.dumps(answer).encode(), "application/json")

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{_hash(content)}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_pushed_to_the_hub_and_fetched_by_name_it_gives_the_same_frames(
    pipe: VideoInpaintPipeline, video: np.ndarray, mask: np.ndarray, hub: Hub, tmp_path: Path
) -> None:
    expected = pipe(video, mask, num_samples=2, output_type="np").frames
    folder = tmp_path / "model"
    pipe.save_pretrained(folder)
    (folder / "README.md").write_text("# A model\n")
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    run_apart(tmp_path, PUSHER, {"video": video, "mask": mask}, str(folder), NAME, **online)
    assert hub.files == {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }
    assert np.array_equal(np.load(tmp_path / "0.npy"), expected)
