"""Every command that the documentation shows is one that the program takes."""

from __future__ import annotations

import importlib
import re
import shlex
import textwrap
from pathlib import Path

import pytest
from vidfill import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LAYERS = ("data", "launch", "modeling", "sampling", "train")
MODULES = [*cli.JOBS.values(), "train.autoencoder"]
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
    runs = words[:1] in (["vidfill"], [".venv/bin/vidfill"])
    if runs and len(words) > 1 and words[1] in cli.VERBS:
        return [cli.JOBS[words[1]], *words[2:]]
    for index, word in enumerate(words):
        if word in MODULE_VERBS and words[index - 1] == "-m":
            return [MODULE_VERBS[word], *words[index + 1 :]]
    return []


def texts() -> list[str]:
    """Every page, and the examples of every verb's help."""
    pages = [page.read_text() for page in PAGES]
    return pages + [importlib.import_module(f"vidfill.{module}").EXAMPLES for module in MODULES]


def documented() -> list[list[str]]:
    commands = (tuple(command) for text in texts() for command in commands_in(text))
    return [list(command) for command in dict.fromkeys(commands)]


def write_shown_files(folder: Path) -> None:
    """Write the files whose content a page shows after the words "This is `NAME`:"."""
    for page in PAGES:
        shown = r"This is `([\w.]+)`:\n\n((?: {4}.*\n|\n)+)"
        for name, text in re.findall(shown, page.read_text()):
            (folder / name).write_text(textwrap.dedent(text))


@pytest.mark.parametrize("command", documented(), ids=" ".join)
def test_documented_command_is_accepted_outside_the_checkout(
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shown_files(tmp_path)
    module, *arguments = command
    job = importlib.import_module(f"vidfill.{module}")
    with pytest.raises(SystemExit) as end:
        job.main([*arguments, "--print_config"])
    assert end.value.code in (0, None), capsys.readouterr().err


def test_a_configuration_for_accelerate_is_written_before_it_is_used() -> None:
    used = set()
    for text in texts():
        for use in re.finditer(r"--config_file (\S+)\.yaml", text):
            written = re.findall(r"vidfill launch .* --out (\S+)\n", text[: use.start()])
            assert use[1] in written, use[0]
            used.add(use[1])
    assert used == {"node", "nodes"}


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


def paths_in(text: str) -> set[str]:
    """The files and folders of the repository that a page names: in `ticks`, or in its tree."""
    ticked = re.findall(r"`([\w./-]+\.(?:py|md|sh|sbatch|toml)|(?:tests|docs)/[\w./-]*)`", text)
    folder, tree = "", []
    for indent, entries in re.findall(r"^( {4}| {6})(\S.*?)(?:  .*)?$", text, flags=re.MULTILINE):
        names = entries.split(", ")
        if all(re.fullmatch(r"\w+(/|\.py)", name) for name in names):
            tree += [folder + name if len(indent) == 6 else name for name in names]
            folder = names[0] if len(indent) == 4 else folder
    return {path for path in (*ticked, *tree) if "NAME" not in path}


def modules_in(text: str) -> set[str]:
    """The modules, functions and classes of ours that a page names, without `vidfill.`."""
    ticked = re.findall(rf"`(?:vidfill\.)?((?:{'|'.join(LAYERS)})(?:\.\w+)+)(?:\(\))?`", text)
    imported = re.findall(r"^ {4}from vidfill\.([\w.]+) import ([\w, ]+)$", text, re.MULTILINE)
    listed = [f"{module}.{name}" for module, names in imported for name in names.split(", ")]
    return {name for name in (*ticked, *listed) if not name.endswith((".yaml", ".txt"))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_of_the_repository_exists(page: Path) -> None:
    text = page.read_text()
    for path in paths_in(text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for name in modules_in(text):
        *module, last = name.split(".")
        beside = ROOT.joinpath(*module)
        if not (beside / last).is_dir() and not (beside / f"{last}.py").is_file():
            found = importlib.import_module(f"vidfill.{'.'.join(module)}")
            assert hasattr(found, last), f"{page.name} names {name}"


def test_the_tree_of_the_readme_is_read() -> None:
    tree = (
        "    cli.py    a\n    errors.py, jobs.py\n    data/   b\n      shards/   c\n    docs/  d\n"
    )
    assert paths_in(tree) == {"cli.py", "errors.py", "jobs.py", "data/", "data/shards/", "docs/"}


def test_every_verb_shows_help_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in cli.VERBS:
        with pytest.raises(SystemExit) as end:
            cli.main([verb, "--help"])
        assert end.value.code == 0
        assert f"vidfill {verb}" in capsys.readouterr().out.split("examples:")[1]


def test_a_wrong_verb_is_answered_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["swep"]) == 2
    assert "did you mean sweep?" in capsys.readouterr().err
