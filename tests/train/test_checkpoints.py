"""A checkpoint is what was saved, on any number of processes, or it is found to be damaged."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from vidfill.errors import BadInput, BadInputEverywhere
from vidfill.modeling.denoiser import Denoiser, LatentSpace
from vidfill.modeling.run_folder import Damaged, newest_first, newest_whole, read_state, verify
from vidfill.modeling.settings import DiffusionConfig
from vidfill.modeling.unet import VideoUNet
from vidfill.seeding import derive_seed, generator
from vidfill.train.checkpoints import Checkpoints
from vidfill.train.config import OptimizerConfig, TrainConfig
from vidfill.train.state import (
    TrainState,
    kinds,
    make_accelerator,
    make_state,
    read_full,
    write_full,
)

DECAYS = (0.9, 0.99)
AUTOENCODER = {"name": "none", "kind": "AutoencoderTiny", "sha256": "0" * 64, "channels": 2}
AUTOENCODER |= {"scaling_factor": 1.0, "downsampling": 8}
FOUR_DAMAGES = ("truncated", "flipped", "missing", "empty")


class Run:
    """A run's state and checkpoints, without training."""

    def __init__(self, out: Path, stage: int = 0, mean: float = 0.0, keep: int = 2) -> None:
        config = TrainConfig(
            "shards",
            out,
            zero_stage=stage,
            keep_checkpoints=keep,
            optimizer=OptimizerConfig(ema_decays=DECAYS),
        )
        network = VideoUNet(2, 3, (8, 16), layers_per_block=1, head_channels=8, norm_groups=4)
        space = LatentSpace([4, 2, 8, 8], [mean, 0.0], [1.0, 1.0], AUTOENCODER)
        self.denoiser = Denoiser(network, DiffusionConfig(mask_channel=True), space)
        self.accelerator: Accelerator = make_accelerator(config)
        self.state: TrainState = make_state(config, self.accelerator, network)
        self.checkpoints = Checkpoints(out, keep, DECAYS, self.denoiser, self.accelerator)
        self.folder = out / "checkpoints"

    def advance_to(self, step: int) -> None:
        """Put a state there that depends on the step alone."""
        self.state.step, self.state.skipped = step, 1
        self.state.productive = step / 3
        for name, parameter in self.state.network.named_parameters():
            for kind in kinds(self.state):
                value = expected(step, kind, name, shape_of(parameter))
                write_full(self.state, parameter, kind, value)

    def save(self, step: int) -> None:
        self.advance_to(step)
        self.checkpoints.save(self.state)
        self.checkpoints.wait()

    def is_at(self, step: int) -> bool:
        """Whether all of the state is what it was at that step; a collective under ZeRO."""
        equal = self.state.step == step and self.state.productive == step / 3
        for name, parameter in self.state.network.named_parameters():
            for kind in kinds(self.state):
                found = read_full(self.state, parameter, kind)
                equal &= torch.equal(found, expected(step, kind, name, found.shape))
        return equal


def shape_of(parameter: torch.nn.Parameter) -> torch.Size:
    """Under ZeRO-3 a parameter is empty and says elsewhere what it stands for."""
    return getattr(parameter, "ds_shape", parameter.shape)


def expected(step: int, kind: str, name: str, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=generator(step, kind, name))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def damage(file: Path, way: str) -> None:
    content = bytearray(file.read_bytes())
    match way:
        case "truncated":
            file.write_bytes(content[:-1])
        case "flipped":
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        case "missing":
            file.unlink()
        case "empty":
            file.write_bytes(b"")


def test_a_loaded_state_is_what_was_saved(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(7)
    again = Run(tmp_path)
    again.checkpoints.load(again.state)
    assert again.is_at(7)
    assert again.state.counters() == run.state.counters()


def test_a_run_without_checkpoints_stays_as_it_is(tmp_path: Path) -> None:
    run = Run(tmp_path)
    before = run.state.network.state_dict()
    run.checkpoints.load(run.state)
    assert run.state.step == 0
    assert all(torch.equal(run.state.network.state_dict()[name], before[name]) for name in before)


def test_a_checkpoint_holds_the_moment_of_its_save_whatever_happens_while_it_is_written(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path)
    run.advance_to(3)
    run.checkpoints.save(run.state)
    run.advance_to(4)
    run.checkpoints.wait()
    again = Run(tmp_path)
    again.checkpoints.load(again.state)
    assert again.is_at(3)


def test_a_write_that_is_not_done_is_waited_for_and_both_become_whole(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (1, 2):
        run.advance_to(step)
        run.checkpoints.save(run.state)
    run.checkpoints.wait()
    for path in newest_first(run.folder):
        verify(path)
    assert [path.name for path in newest_first(run.folder)] == ["step-00000002", "step-00000001"]
    assert (run.folder / "latest").read_text() == "step-00000002"


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has the checkpoints of steps 3 and 6."""
    out = tmp_path_factory.mktemp("saved")
    run = Run(out)
    run.save(3)
    run.save(6)
    return out


def files_of(checkpoint: Path) -> list[str]:
    return sorted(contents(checkpoint))


def test_a_checkpoint_is_what_the_documentation_lists(two_saved: Path) -> None:
    assert files_of(two_saved / "checkpoints" / "step-00000006") == [
        *("average-1/denoiser.json", "average-1/unet/config.json"),
        "average-1/unet/diffusion_pytorch_model.safetensors",
        *("exp_avg.safetensors", "exp_avg_sq.safetensors"),
        *("model/denoiser.json", "model/unet/config.json"),
        "model/unet/diffusion_pytorch_model.safetensors",
        *("state.json", "weights.safetensors"),
    ]


@pytest.mark.parametrize("way", FOUR_DAMAGES)
def test_whatever_file_is_damaged_it_is_named_and_the_one_before_is_used(
    way: str, two_saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run")
    for name in files_of(two_saved / "checkpoints" / "step-00000006"):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(two_saved, tmp_path / "run")
        file = run.folder / "step-00000006" / name
        damage(file, way)
        capsys.readouterr()
        run.checkpoints.load(run.state)
        said = capsys.readouterr().err
        assert run.is_at(3), name
        assert len(said.splitlines()) == 1 and "step-00000006" in said and file.name in said, said


def test_no_flipped_byte_of_state_json_goes_unnoticed(two_saved: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(two_saved / "checkpoints" / "step-00000006", tmp_path / "one")
    true = read_state(checkpoint)
    content = (checkpoint / "state.json").read_bytes()
    noticed = 0
    for place in range(0, len(content), 3):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        (checkpoint / "state.json").write_bytes(changed)
        try:
            assert read_state(checkpoint) == true  # white space may be another
        except Damaged:
            noticed += 1
    assert noticed > len(content) / 4


@pytest.mark.parametrize("pointer", ["step-00000099", "", "../..", None, b"\xff\xfe"])
def test_a_pointer_that_points_nowhere_stops_nobody(
    pointer: str | bytes | None, two_saved: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(two_saved, tmp_path / "run")
    latest = out / "checkpoints" / "latest"
    latest.unlink()
    if pointer is not None:
        latest.write_bytes(pointer if isinstance(pointer, bytes) else pointer.encode())
    run = Run(out)
    run.checkpoints.load(run.state)
    assert run.is_at(6)
    assert_is_average(Denoiser.load(out), step=6)


def assert_is_average(denoiser: Denoiser, step: int, which: int = 0) -> None:
    for name, tensor in denoiser.network.named_parameters():
        assert torch.equal(tensor, expected(step, f"average_{which}", name, tensor.shape)), name


def test_the_model_that_loads_is_the_one_pointed_to_and_else_the_newest_whole_one(
    two_saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(two_saved, tmp_path / "run")
    assert_is_average(Denoiser.load(out), step=6)
    (out / "checkpoints" / "latest").write_text("step-00000003")
    assert_is_average(Denoiser.load(out), step=3)
    damage(out / "checkpoints/step-00000003/weights.safetensors", "flipped")
    assert_is_average(Denoiser.load(out), step=3)  # the model itself is whole
    assert not capsys.readouterr().err
    damage(out / "checkpoints/step-00000003/model/unet/config.json", "flipped")
    assert_is_average(Denoiser.load(out), step=6)
    assert "step-00000003/model/unet/config.json is damaged" in capsys.readouterr().err
    damage(out / "checkpoints/step-00000006/model/denoiser.json", "missing")
    with pytest.raises(BadInput, match=r"every checkpoint in .* is damaged"):
        Denoiser.load(out)


def test_where_all_are_damaged_nothing_is_trained_over_them(
    two_saved: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(two_saved, tmp_path / "run")
    for path in newest_first(out / "checkpoints"):
        damage(path / "exp_avg.safetensors", "truncated")
    before = contents(out)
    run = Run(out)
    with pytest.raises(BadInputEverywhere, match=r"every checkpoint in .* is damaged: remove it"):
        run.checkpoints.load(run.state)
    assert contents(out) == before


def test_checkpoints_of_other_latents_are_refused(two_saved: Path, tmp_path: Path) -> None:
    run = Run(shutil.copytree(two_saved, tmp_path / "run"), mean=0.5)
    with pytest.raises(BadInputEverywhere, match="trained on other latents"):
        run.checkpoints.load(run.state)
    assert run.state.step == 0


def test_the_newest_are_kept_and_copies_of_other_names_are_left_alone(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=2)
    for step in (1, 2):
        run.save(step)
    shutil.copytree(run.folder / "step-00000001", run.folder / "step-00000001-mine")
    for step in (99_999_999, 100_000_000):
        run.save(step)
    assert sorted(path.name for path in run.folder.iterdir()) == [
        *("latest", "step-00000001-mine", "step-100000000", "step-99999999")
    ]
    assert newest_whole(run.folder)[0].name == "step-100000000"


def test_a_whole_checkpoint_is_never_pruned_in_favour_of_a_damaged_one(tmp_path: Path) -> None:
    """Another interval: what is saved next lies before the damaged one that was passed over."""
    run = Run(tmp_path, keep=1)
    run.save(3)
    shutil.copytree(run.folder / "step-00000003", run.folder / "step-00000006")
    damage(run.folder / "step-00000006" / "weights.safetensors", "flipped")
    run.checkpoints.load(run.state)
    run.save(4)
    assert [path.name for path in newest_first(run.folder)] == ["step-00000004"]
    verify(run.folder / "step-00000004")


def test_a_damaged_checkpoint_is_replaced_by_the_step_when_it_comes_again(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(3)
    run.save(6)
    before = contents(run.folder)
    damage(run.folder / "step-00000006" / "weights.safetensors", "flipped")
    run.checkpoints.load(run.state)
    assert run.is_at(3)
    run.save(6)
    after = contents(run.folder)
    assert before.keys() == after.keys()
    assert all(before[name] == after[name] for name in before if "state.json" not in name)


def test_what_a_killed_write_left_is_removed_at_the_next_start(
    two_saved: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(two_saved, tmp_path / "run")
    before = contents(out)
    shutil.copytree(out / "checkpoints/step-00000006", out / "checkpoints/.partial-step-00000009")
    (out / "checkpoints" / ".partial-latest").write_text("step-0")
    run = Run(out)
    run.checkpoints.load(run.state)
    assert contents(out) == before
    assert run.is_at(6)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for one checkpoint and a half."""
    path = tmp_path / "disk"
    path.mkdir()
    Run(tmp_path / "probe").save(1)
    size = sum(map(len, contents(tmp_path / "probe").values()))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2 // 1024}k", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_told_and_harms_nothing_and_with_room_it_goes_on(full_disk: Path) -> None:
    run = Run(full_disk / "run", keep=1)
    run.save(1)
    assert run.checkpoints.failure() is None
    before = contents(full_disk)
    run.advance_to(2)
    run.checkpoints.save(run.state)
    assert wait_for_failure(run.checkpoints) == (
        f"the checkpoint of step 2 cannot be written into {run.folder} "
        "(Error while serializing: I/O error: No space left on device (os error 28)): "
        "remove the cause, and the same command continues from the one before"
    )
    run.checkpoints.save(run.state)  # the loop may come here before it hears of the failure
    with pytest.raises(BadInput, match="No space left on device"):
        run.checkpoints.wait()
    assert contents(full_disk) == before
    again = Run(full_disk / "run", keep=1)
    again.checkpoints.load(again.state)
    assert again.is_at(1)
    mount = ["mount", "-o", "remount,size=64m", str(full_disk)]
    subprocess.run(mount, check=True)
    again.save(2)
    assert [path.name for path in newest_first(run.folder)] == ["step-00000002"]


def wait_for_failure(checkpoints: Checkpoints) -> str:
    ends = time.monotonic() + 30
    while not checkpoints.failure() and time.monotonic() < ends:
        time.sleep(0.01)
    return str(checkpoints.failure())


@pytest.mark.slow
def test_whichever_file_the_system_refuses_the_last_checkpoint_stays(tmp_path: Path) -> None:
    """A limit on a file's size refuses the larger files, then also state.json."""
    run = Run(tmp_path)
    run.save(1)
    before = contents(tmp_path)
    sizes = sorted({len(content) for content in before.values()})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in sizes[1:]:
        refused = Run(tmp_path)
        refused.checkpoints.load(refused.state)
        refused.advance_to(2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
        try:
            refused.checkpoints.save(refused.state)
            with pytest.raises(BadInput, match="the checkpoint of step 2 cannot be written"):
                refused.checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert contents(tmp_path) == before
    run.save(2)
    verify(tmp_path / "checkpoints" / "step-00000002")


@pytest.mark.slow
def test_a_model_loads_at_any_moment_while_its_run_writes_and_prunes(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=1)
    run.save(1)
    ended = threading.Event()

    def write() -> None:
        step = 1
        while not ended.is_set():
            step += 1
            run.state.step = step
            run.checkpoints.save(run.state)
            run.checkpoints.wait()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        loads = 0
        while loads < 20 or run.state.step <= 5:
            assert_is_average(Denoiser.load(tmp_path), step=1)
            assert writer.is_alive()
            loads += 1
    finally:
        ended.set()
        writer.join()


# Continues from the checkpoint of step 3 under a ZeRO stage, on two processes; saves step 6. Then
# process 1 looks into a folder of its own, which has another checkpoint of that name.
WORKER = """
import importlib.util, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("laws", sys.argv[1])
laws = importlib.util.module_from_spec(spec)
sys.modules["laws"] = laws
spec.loader.exec_module(laws)

out, stage = Path(sys.argv[2]), int(sys.argv[3])
run = laws.Run(out, stage)
run.checkpoints.load(run.state)
assert run.accelerator.num_processes == 2
assert run.is_at(3)
assert run.state.updates == 2
run.save(6)
run.accelerator.wait_for_everyone()
if run.accelerator.process_index:
    run.checkpoints._folder = out.with_name("elsewhere") / "checkpoints"
try:
    run.checkpoints.load(run.state)
except laws.BadInputEverywhere as refusal:
    print(refusal, file=sys.stderr)
run.accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_processes_of_any_zero_stage_read_and_write_what_one_does(
    stage: int, two_saved: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(two_saved / "checkpoints/step-00000003", out / "checkpoints/step-00000003")
    other = Run(tmp_path / "elsewhere", mean=0.5)
    other.save(6)
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(29000 + derive_seed(str(tmp_path)) % 2000)]
    done = subprocess.run(
        [*command, str(worker), __file__, str(out), str(stage)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, two = (contents(root / "checkpoints/step-00000006") for root in (two_saved, out))
    assert one.keys() == two.keys()
    ignored = "state.json"  # has the time at which the run began
    assert all(one[name] == two[name] for name in one if name != ignored)
    assert "process 1 does not see" in done.stderr
