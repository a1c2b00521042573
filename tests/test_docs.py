"""Every command that the documentation shows is one that the program takes."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from vidfill import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [module for module, _ in cli.VERBS.values()] + ["train.autoencoder"]
MODULE_VERBS = {
    "vidfill.data.encode": "data.encode.run",
    "vidfill.train": "train.loop",
    "vidfill.train.autoencoder": "train.autoencoder",
    "vidfill.train.preflight": "train.preflight.doctor",
}


def commands_in(text: str) -> list[list[str]]:
    """The words of each indented command of ours, its continuation lines joined."""
    lines = re.findall(r"^ {2,}(.*)$", text.replace("\\\n", " "), flags=re.MULTILINE)
    words = [shlex.split(line, comments=True) for line in lines if "vidfill" in line]
    return [found for line in words if (found := ours(line))]


def ours(words: list[str]) -> list[str]:
    """[module, argument…] of a command that runs one of our jobs, else nothing."""
    if words[:1] == ["vidfill"] and len(words) > 1 and words[1] in cli.VERBS:
        return [cli.VERBS[words[1]][0], *words[2:]]
    for index, word in enumerate(words):
        if word in MODULE_VERBS and words[index - 1] == "-m":
            return [MODULE_VERBS[word], *words[index + 1 :]]
    return []


def documented() -> list[list[str]]:
    texts = [page.read_text() for page in PAGES]
    texts += [importlib.import_module(f"vidfill.{module}").EXAMPLES for module in MODULES]
    return [command for text in texts for command in commands_in(text)]


@pytest.mark.parametrize("command", documented(), ids=" ".join)
def test_documented_command_is_accepted(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    module, *arguments = command
    job = importlib.import_module(f"vidfill.{module}")
    with pytest.raises(SystemExit) as end:
        job.main([*arguments, "--print_config"])
    assert end.value.code in (0, None), capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_of_a_page_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        file, _, heading = target.partition("#")
        if not file.startswith("http"):
            assert (page.parent / file).exists(), target
            assert not heading or heading in headings_of(page.parent / file), target


def headings_of(page: Path) -> list[str]:
    """The anchors of a page's headings."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return [heading.lower().replace(" ", "-") for heading in found]


def test_every_verb_shows_help_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in cli.VERBS:
        with pytest.raises(SystemExit) as end:
            cli.main([verb, "--help"])
        assert end.value.code == 0
        assert f"vidfill {verb}" in capsys.readouterr().out.split("examples:")[1]


def test_a_wrong_verb_is_answered_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["swep"]) == 2
    assert "did you mean sweep?" in capsys.readouterr().err
