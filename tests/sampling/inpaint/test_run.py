from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
import signal
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from vidfill.data.videos import Frames, Masks, read_frames, read_video, write_video
from vidfill.errors import BadInput
from vidfill.modeling.autoencoder import Autoencoder, load_autoencoder
from vidfill.modeling.denoiser import Denoiser
from vidfill.sampling.inpaint import run
from vidfill.sampling.inpaint.blending import measure_border
from vidfill.sampling.inpaint.run import WORK_SUFFIX, count_windows, inpaint, main, open_inputs
from vidfill.sampling.inpaint.settings import InpaintConfig
from vidfill.sampling.inpaint.unfinished import UnfinishedWork
from vidfill.sampling.inpaint.windows import FilledWindow, fill_windows

LENGTH = 8  # frames of a window
HEIGHT, WIDTH = 26, 38
MASK = "9,5,14,10"


@pytest.fixture
def model(tmp_path: Path, denoiser: Denoiser, autoencoder: Autoencoder) -> Path:
    """The tiny one, as if trained on clips of 8 frames of 16×16."""
    folder = tmp_path / "model"
    autoencoder.network.save_pretrained(folder / "vae")
    identity = {**denoiser.autoencoder, "name": str(folder / "vae")}
    shape = [LENGTH, *denoiser.space.shape[1:]]
    space = dataclasses.replace(denoiser.space, shape=shape, autoencoder=identity)
    Denoiser(denoiser.network, denoiser.config, space).save(folder)
    return folder


@pytest.fixture
def configure(tmp_path: Path, model: Path) -> InpaintConfig:
    return InpaintConfig(
        make_images(tmp_path / "video", 19),
        MASK,
        tmp_path / "filled",
        model,
        "ddim:2",
        device="cpu",
    )


def make_images(folder: Path, frames: int) -> Path:
    """A folder of images: noise."""
    random = np.random.default_rng(frames)
    folder.mkdir()
    for index in range(frames):
        pixels = random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03}.png")
    return folder


def make_masks(folder: Path, mask: Masks) -> str:
    folder.mkdir()
    for index, hole in enumerate(mask):
        Image.fromarray(hole * np.uint8(255)).save(folder / f"{index:03}.png")
    return str(folder)


def read(path: Path) -> Frames:
    return np.stack(list(read_frames(path)))


def rectangle(frames: int) -> Masks:
    mask = np.zeros((frames, HEIGHT, WIDTH), np.uint8)
    mask[:, 5:15, 9:23] = 1
    return mask


@pytest.mark.parametrize("frames", [1, 8, 19])
def test_the_result_is_what_the_windows_give(
    configure: InpaintConfig, tmp_path: Path, frames: int
) -> None:
    config = dataclasses.replace(configure, video=make_images(tmp_path / "images", frames))
    video, mask = read(config.video), rectangle(frames)
    filler = open_inputs(config)[1]
    expected = [
        frame
        for window in fill_windows(zip(video, mask, strict=True), filler)
        for frame in window.frames[0]
    ]
    assert inpaint(config) == [config.out]
    ours = read(tmp_path / "filled")
    np.testing.assert_array_equal(ours, np.stack(expected))
    np.testing.assert_array_equal(ours[mask == 0], video[mask == 0])
    assert (ours[mask == 1] != video[mask == 1]).any()
    assert not (tmp_path / f"filled{WORK_SUFFIX}").exists()


def test_a_video_file_keeps_what_is_not_in_its_hole(
    configure: InpaintConfig, tmp_path: Path
) -> None:
    source, out = tmp_path / "video.mp4", tmp_path / "filled.mkv"
    write_video(source, read(configure.video), Fraction(30000, 1001))
    inpaint(dataclasses.replace(configure, video=source, out=out))
    (before, rate), (after, same_rate) = read_video(source), read_video(out)
    assert rate == same_rate
    # The mask grows to whole samples of colour, and these are interpolated in RGB.
    outside = np.ones(before.shape[:3], bool)
    outside[:, 2:18, 6:26] = False
    np.testing.assert_array_equal(after[outside], before[outside])
    assert (after != before).any(axis=(1, 2, 3)).all()


def test_without_a_hole_the_network_does_not_run_and_that_is_said(
    configure: InpaintConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Denoiser, "denoise", None)
    mask = make_masks(tmp_path / "masks", rectangle(19) * 0)
    inpaint(dataclasses.replace(configure, mask=mask))
    assert f"mask is {mask}, which hides nothing in any frame" in capsys.readouterr().err
    np.testing.assert_array_equal(read(tmp_path / "filled"), read(configure.video))


def test_a_hole_in_one_frame_is_a_hole(
    configure: InpaintConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = rectangle(19)
    masks[:-1] = 0
    inpaint(dataclasses.replace(configure, mask=make_masks(tmp_path / "masks", masks)))
    assert "hides nothing" not in capsys.readouterr().err


def test_a_mask_may_hide_everything(configure: InpaintConfig, tmp_path: Path) -> None:
    mask = make_masks(tmp_path / "masks", rectangle(19) * 0)
    inpaint(dataclasses.replace(configure, mask=mask, invert=True))
    ours, video = read(tmp_path / "filled"), read(configure.video)
    assert ours.shape == video.shape
    assert ours.std() < video.std() / 2  # nothing of the noise is left


def test_the_seed_reproduces(configure: InpaintConfig, tmp_path: Path) -> None:
    results = []
    for number, seed in enumerate((1, 1, 2)):
        out = tmp_path / f"result{number}"
        inpaint(dataclasses.replace(configure, seed=seed, out=out))
        results.append(read(out))
    np.testing.assert_array_equal(results[0], results[1])
    assert (results[0] != results[2]).any()


def test_a_trimmed_video_is_that_part_alone(configure: InpaintConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(configure, trim="0.25-0.5", frame_rate=24.0)
    inpaint(config)
    ours, video = read(tmp_path / "filled"), read(configure.video)[6:12]
    outside = rectangle(6) == 0
    np.testing.assert_array_equal(ours[outside], video[outside])


def arguments(config: InpaintConfig) -> list[str]:
    options = {"mask": config.mask, "out": config.out, "schedule": config.schedule}
    options |= {"model": config.model, "device": config.device}
    pairs = ((f"--{name}", str(value)) for name, value in options.items())
    return [str(config.video), *(word for pair in pairs for word in pair)]


def wait_for(work: UnfinishedWork, windows: int) -> None:
    ends = time.monotonic() + 300
    while not work.folder.is_dir() or len(work.files()) < windows:
        assert time.monotonic() < ends
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_and_continued_equals_uninterrupted(
    configure: InpaintConfig, tmp_path: Path
) -> None:
    video = make_images(tmp_path / "long", 48)
    config = dataclasses.replace(configure, video=video, schedule="ddpm:3+resample(n=2)")
    alone = dataclasses.replace(config, out=tmp_path / "alone")
    inpaint(alone)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vidfill.sampling.inpaint.run"])
    work = UnfinishedWork(tmp_path / f"filled{WORK_SUFFIX}", 1)
    for windows, later in ((0, 0.01), (1, 0.0), (3, 0.03)):
        process = context.Process(target=main, args=(arguments(config),))
        process.start()
        wait_for(work, windows)
        time.sleep(later)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "filled").exists()
    done = len(work.files())
    assert 3 <= done < count_windows(48, open_inputs(config)[1])
    assert main(arguments(config)) == 0
    np.testing.assert_array_equal(read(tmp_path / "filled"), read(tmp_path / "alone"))
    assert not work.folder.exists()


@pytest.mark.slow
def test_an_interrupt_in_any_window_changes_nothing(
    configure: InpaintConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = rectangle(19)
    mask[8:14] = 0  # all that the second window adds
    mask[15, 0, 30] = 1
    config = dataclasses.replace(configure, mask=make_masks(tmp_path / "masks", mask))
    inpaint(dataclasses.replace(config, out=tmp_path / "alone"))
    add = UnfinishedWork.add
    for stopped in range(3):

        def interrupt(work: UnfinishedWork, window: object, stopped: int = stopped) -> None:
            if len(work.files()) == stopped:
                raise KeyboardInterrupt
            add(work, window)  # type: ignore[arg-type]

        monkeypatch.setattr(UnfinishedWork, "add", interrupt)
        assert main(arguments(config)) == 130
    monkeypatch.setattr(UnfinishedWork, "add", add)
    assert main(arguments(config)) == 0
    np.testing.assert_array_equal(read(tmp_path / "filled"), read(tmp_path / "alone"))


def test_work_that_was_begun_is_not_continued_with_other_settings(
    configure: InpaintConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(UnfinishedWork, "add", None)
        with pytest.raises(TypeError):
            inpaint(configure)
    with pytest.raises(BadInput, match=r"seed was 0, now 1"):
        inpaint(dataclasses.replace(configure, seed=1))
    shutil.copy(configure.video / "018.png", configure.video / "019.png")
    with pytest.raises(BadInput, match=r"\(video\)"):
        inpaint(configure)


@pytest.fixture
def unfinished(configure: InpaintConfig, monkeypatch: pytest.MonkeyPatch) -> UnfinishedWork:
    """Work that stopped when all three windows were filled."""
    with monkeypatch.context() as patched:
        patched.setattr("vidfill.sampling.inpaint.run.write_all", None)
        with pytest.raises(TypeError):
            inpaint(configure)
    assert configure.out
    return UnfinishedWork(configure.out.with_name(f"{configure.out.name}{WORK_SUFFIX}"), 1)


@pytest.mark.slow
def test_a_window_lost_between_two_lives_is_filled_again(
    configure: InpaintConfig,
    tmp_path: Path,
    unfinished: UnfinishedWork,
    capsys: pytest.CaptureFixture[str],
) -> None:
    [alone] = inpaint(dataclasses.replace(configure, out=tmp_path / "alone"))
    files = unfinished.files()
    kept = shutil.copytree(unfinished.folder, tmp_path / "kept")
    for lost in ({0}, {1}, {2}, {0, 2}, {0, 1, 2}):
        shutil.copytree(kept, unfinished.folder, dirs_exist_ok=True)
        for number in lost:
            files[number].path.unlink()
        [out] = inpaint(configure)
        np.testing.assert_array_equal(read(out), read(alone))
        shutil.rmtree(out)
        said = f"has lost the window that begins with frame {files[min(lost)].first}: it and all"
        has_rest = any(number > min(lost) for number in {0, 1, 2} - lost)
        assert (said in capsys.readouterr().err) == has_rest


@pytest.mark.parametrize(
    ("window", "lost"),
    [(0, "folder"), (1, "file"), (1, "folder to another job"), (2, "folder")],
)
def test_work_that_is_lost_while_it_goes_on_ends_the_job(
    configure: InpaintConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    window: int,
    lost: str,
) -> None:
    add = UnfinishedWork.add

    def lose(work: UnfinishedWork, filled: FilledWindow) -> None:
        add(work, filled)
        if len(work.files()) == window + 1:
            if lost == "file":
                return work.files()[0].path.unlink()
            shutil.rmtree(work.folder)
            if lost == "folder to another job":
                work.folder.mkdir()
                (work.folder / "job.json").write_text('{"verb": "inpaint", "config": {}}')

    monkeypatch.setattr(UnfinishedWork, "add", lose)
    with pytest.raises(BadInput, match=r"lost windows while this job ran|removed or taken"):
        inpaint(configure)
    assert not (tmp_path / "filled").exists()


@pytest.mark.parametrize("step", ["check_output", "fill_all"])
def test_a_file_that_another_job_finished_meanwhile_stays(
    configure: InpaintConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Before the work begins, or while it goes on."""
    out, own = tmp_path / "filled.mkv", getattr(run, step)
    monkeypatch.setattr(run, step, lambda *a: (own(*a), out.write_text("done"))[0])
    with pytest.raises(BadInput, match="exists: choose another name"):
        inpaint(dataclasses.replace(configure, out=out))
    assert out.read_text() == "done"


def test_an_interrupt_after_the_output_is_there_only_leaves_the_rest(
    configure: InpaintConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("vidfill.jobs._remove_work", None)
        with pytest.raises(TypeError):
            inpaint(configure)
    with monkeypatch.context() as patched:
        patched.setattr(run, "write_all", None)
        assert inpaint(configure) == [configure.out]
    with pytest.raises(BadInput, match="exists: choose another name"):
        inpaint(configure)


@pytest.mark.slow
def test_work_of_0_1_continues_on_what_it_stands_on(
    configure: InpaintConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "video.mkv"
    write_video(raw, read(configure.video), 24.0)
    config = dataclasses.replace(configure, video=raw)
    with monkeypatch.context() as patched:
        patched.setattr(run, "write_all", None)
        with pytest.raises(TypeError):
            inpaint(config)
    mark = tmp_path / f"filled{WORK_SUFFIX}" / "job.json"
    job = json.loads(mark.read_text())
    older = {
        "config": job["config"],
        "model": job["stands_on"]["model"]["weights"],
        "autoencoder": job["stands_on"]["autoencoder"]["weights"],
        "video": [raw.stat().st_size, raw.stat().st_mtime_ns],
        "mask": [],
    }
    for name, value in (("model", "another"), ("autoencoder", "another"), ("video", [1, 2])):
        mark.write_text(json.dumps({"verb": "inpaint", "config": {**older, name: value}}))
        with pytest.raises(BadInput, match=rf"\({name}(\.weights)?\)"):
            inpaint(config)
    mark.write_text(json.dumps({"verb": "inpaint", "config": older}))
    assert inpaint(config) == [tmp_path / "filled"]


def test_a_work_folder_may_be_a_link(configure: InpaintConfig, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / f"filled{WORK_SUFFIX}").symlink_to("disk")
    assert inpaint(configure) == [tmp_path / "filled"]
    assert not list(tmp_path.glob(f"filled{WORK_SUFFIX}"))


def test_a_damaged_window_is_named(configure: InpaintConfig, unfinished: UnfinishedWork) -> None:
    first = unfinished.files()[0].path
    first.write_bytes(first.read_bytes()[:-100])
    with pytest.raises(BadInput, match=r"000000000-000000008.npz is damaged"):
        inpaint(configure)


@pytest.mark.slow
def test_samples_are_all_kept_or_the_one_with_the_smallest_steps(
    configure: InpaintConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(configure, samples=2, feather=0, colour_match=False)
    outs = inpaint(config)
    assert [out.name for out in outs] == ["filled-1", "filled-2"]
    every = [read(out) for out in outs]
    [chosen] = inpaint(dataclasses.replace(config, choose=True))
    assert chosen == config.out
    seams = [measure_border(frames, rectangle(19)) for frames in every]
    means = [seam.total / seam.steps for seam in seams]
    best = int(np.argmin(means))
    np.testing.assert_array_equal(read(chosen), every[best])
    said = f"{', '.join(f'{mean:.2f}' for mean in means)}; completion {best + 1} is taken"
    assert said in capsys.readouterr().out
    assert (every[0] != every[1]).any()


def test_a_plan_counts_windows_and_writes_nothing(
    configure: InpaintConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = rectangle(19)
    mask[8:14] = 0  # all that the second window adds
    config = dataclasses.replace(
        configure, mask=make_masks(tmp_path / "masks", mask), plan=True, out=None, samples=2
    )
    before = sorted(tmp_path.rglob("*"))
    assert inpaint(config) == []
    said = capsys.readouterr().out
    assert "3 windows of 8 frames, 2 of them taken over from the one before; 2 have a hole" in said
    assert "2: 28x26 pixels of the frame, seen at 16x16" in said
    assert "ddim:2: 2 evaluations a window and completion, 8 in all" in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mask": ""}, "mask is empty"),
        ({"samples": 0}, "samples is 0: give 1 or more"),
        ({"dilate": -1}, "dilate is -1: give 0 or more"),
        ({"out": None}, "out is missing"),
        ({"overlap": 5}, "overlap is 5"),
        ({"schedule": "ddim:41"}, "40 timesteps"),
        ({"autoencoder": "shipped"}, "autoencoder is shipped .* the model was trained on"),
        ({"video": Path("none.mp4")}, r"none\.mp4 does not exist"),
    ],
)
def test_bad_settings_are_told_before_anything_is_written(
    configure: InpaintConfig, tmp_path: Path, settings: dict[str, object], said: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match=said):
        inpaint(dataclasses.replace(configure, **settings))  # type: ignore[arg-type]
    assert sorted(tmp_path.rglob("*")) == before


def test_what_exists_is_not_overwritten(
    configure: InpaintConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "filled-2.mkv"
    out.write_text("mine")
    config = dataclasses.replace(configure, out=tmp_path / "filled.mkv")
    assert main([*arguments(config), "--samples", "2"]) == 2
    assert f"{out} exists: choose another name" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_out_has_a_short_name(configure: InpaintConfig, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-o" if word == "--out" else word for word in arguments(configure)]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{configure.out}\n"


def test_the_autoencoder_of_the_record_is_found(configure: InpaintConfig, model: Path) -> None:
    filler = open_inputs(configure)[1]
    assert filler.autoencoder.sha256 == load_autoencoder(str(model / "vae")).sha256
