from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vidfill.data.verify import defects
from vidfill.errors import BadInput, printable, say, say_error
from vidfill.progress import show_progress

ROOT = Path(__file__).parents[1]
LAYERS = ("modeling", "data", "sampling", "train", "launch")
# What a stranger may call a video: it clears the screen, forges a line, colours it, turns text
# round, and closes a tag of rich's markup that nobody opened.
NAME = "clip\x1b[2J\nvidfill: all is well\r\x9b31m\u202e4pm.\u2028[/bold].mp4"


@given(st.text())
def test_what_is_printable_stays_in_its_line_and_does_nothing(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    assert not text.isprintable() or shown == text


@pytest.mark.parametrize("on_a_terminal", [False, True])
def test_a_strangers_name_is_escaped_wherever_it_is_shown(
    on_a_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rich.console.Console.is_terminal", on_a_terminal)
    found = defects.Inspection("train")
    found.add("keys", NAME, NAME)
    found.notes["masks"] = NAME
    say(NAME)
    say_error("encode", BadInput(NAME))
    with show_progress("encode", 1, "videos") as shown:
        shown.advance(note=NAME)
    defects.show([found])
    out, err = capsys.readouterr()
    assert r"clip\x1b[2J\nvidfill: all is well\r\x9b31m\u202e4pm.\u2028[/bold].mp4" in err
    for said in (out, err):
        assert "\nvidfill: all is well" not in said
        assert not any(raw in said for raw in ("\x1b[2J", "\x9b", "\u202e", "\u2028"))


def test_nothing_is_printed_past_the_one_place_that_escapes() -> None:
    """A launch script, a schedule's JSON and the list of verbs hold no stranger's text."""
    files = [file for file in ROOT.glob("*.py") if file.name not in ("errors.py", "cli.py")]
    files += [file for layer in LAYERS for file in (ROOT / layer).rglob("*.py")]
    calls = [
        (str(file.relative_to(ROOT)), ast.unparse(call))
        for file in files
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "print"
    ]
    assert [call for call in calls if "json.dumps" not in call[1]] == []
