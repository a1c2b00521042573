from __future__ import annotations

import pytest
from rich import console
from vidfill import progress


def test_without_a_terminal_the_first_and_the_last_step_have_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress.show_progress("test", 5, "clips", done=2) as shown:
        for number in (3, 4, 5):
            shown.advance(note=f"clip {number}")
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("test: 3/5 clips, 0:00:00 elapsed, 0:00:0")
    assert last == "test: 5/5 clips, 0:00:00 elapsed, 0:00:00 left clip 5"


def test_on_a_terminal_a_bar_has_the_count_and_the_note(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.Console, "is_terminal", True)
    with progress.show_progress("test", 5, "clips", done=2) as shown:
        shown.advance(3, "the last")
    said = capsys.readouterr().err
    assert "5/5" in said
    assert "the last" in said
