"""What people type first."""

from __future__ import annotations

import io
import sys

import pytest
from vidfill import cli, jobs
from vidfill.sampling.inpaint.settings import InpaintConfig


@pytest.mark.parametrize("words", [["help"], ["-h"], ["--help"], []])
def test_help_has_several_names(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    assert "usage: vidfill VERB" in capsys.readouterr().out


def test_a_word_too_many_is_told_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        jobs.parse(InpaintConfig, ["a.mp4", "m.png"], verb="inpaint")
    assert "as in --mask m.png" in capsys.readouterr().err


def test_a_terminal_that_lacks_letters_shows_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert cli.main([]) == 0
    sys.stdout.flush()
    assert b"usage: vidfill VERB ?" in shown.getvalue()


@pytest.mark.parametrize("name", jobs.LAUNCHERS)
def test_an_empty_variable_of_a_launcher_is_not_set(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "")
    assert cli.main(["schedule", "ddim:2"]) == 0
