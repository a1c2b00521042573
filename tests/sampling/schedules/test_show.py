from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from vidfill.sampling.schedules.language import parse
from vidfill.sampling.schedules.program import Kind, compile_schedule
from vidfill.sampling.schedules.show import COLUMNS, ROWS, cost_by_part, main, plot

REPAINT = "ddim:250+jump(length=10,times=10)"
EVERYTHING = "heun:18+jump(length=2,times=3)+restart(low=0.1,high=0.5,times=2,steps=3)+inject"


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_json_has_the_canonical_text_and_the_costs(capsys: pytest.CaptureFixture[str]) -> None:
    written = "ddim:250(eta=0)+repaint(times=10,length=10)"
    out = run(written, "--json", capsys=capsys)
    assert json.loads(out) == {
        "schedule": REPAINT,
        "timesteps": 1000,
        "nfe": 2410,
        "down_moves": 2410,
        "up_moves": 2160,
        "inject_moves": 0,
    }


def test_the_costs_of_the_parts_make_the_whole() -> None:
    program = compile_schedule(parse(EVERYTHING))
    *parts, (_, whole) = cost_by_part(program)
    assert "".join(name for name, _ in parts) == EVERYTHING
    assert whole == tuple(np.sum([counts for _, counts in parts], axis=0))
    assert whole == (program.nfe, *(program.count(kind) for kind in Kind))


def test_the_terminal_shows_moves_and_the_plot(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(REPAINT, "--timesteps", "500", capsys=capsys)
    assert out.count("2,160") == 4  # evaluations, DOWN and UP of the jumps; UP in all
    assert "of 500 timesteps: 499 → 497 → 495 → … → 3 → 1 → clean" in out
    assert plot(compile_schedule(parse(REPAINT), 500)) in out


@pytest.mark.parametrize("text", ["ddim:1", "ddim:50", REPAINT, EVERYTHING, "ddpm:1000"])
def test_the_plot_goes_from_the_upper_left_to_the_lower_right(text: str) -> None:
    lines = plot(compile_schedule(parse(text))).splitlines()[:ROWS]
    cells = np.array([[ord(c) - 0x2800 for c in line.split("┤")[1]] for line in lines])
    assert cells.shape == (ROWS, COLUMNS)
    assert ((cells >= 0) & (cells < 256)).all()
    assert cells.any(axis=0).all()  # the walk has no gaps
    assert cells[0, 0] and cells[-1, -1]
    assert not cells[-1, 0] and not cells[0, -1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ddim:250+jmp(length=10,times=10)"], "did you mean jump?"),
        (["ddim:250", "--timesteps", "100"], "give at most 100"),
        (["ddim:1", "--timesteps", "0"], "timesteps is 0: give 1 or more"),
    ],
)
def test_mistakes_end_with_a_remedy(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_schedule_is_described_without_torch() -> None:
    code = (
        "import sys; from vidfill.sampling.schedules.show import main; "
        "status = main(['ddim:5']); sys.exit(status or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
