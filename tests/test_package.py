"""What `make dist` builds holds all of the package, and works far from the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("data", "launch", "modeling", "sampling", "train")
NOT_PACKAGED = {"setup.py"}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sdist and of the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("build")
    aside = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "tree", ignore=aside)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist")]
    subprocess.run([*build, str(folder / "tree")], check=True, capture_output=True)
    return folder / "dist"


def package_files() -> set[str]:
    """Every file of the package, as the checkout has it."""
    found = {file for room in ROOMS for file in (ROOT / room).rglob("*") if file.is_file()}
    found |= {*ROOT.glob("*.py"), ROOT / "py.typed"}
    names = {file.relative_to(ROOT).as_posix() for file in found if "__pycache__" not in file.parts}
    return names - NOT_PACKAGED


@pytest.mark.slow
def test_a_wheel_holds_every_file_of_the_package_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.removeprefix("vidfill/") for name in names} == package_files()


@pytest.mark.slow
def test_an_sdist_holds_the_package_its_licence_and_what_builds_it(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert names >= package_files()
    assert names >= {"LICENSE", "README.md", "CHANGELOG.md", "constraints.txt"}
    assert names >= {"setup.py", "pyproject.toml"}
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment with the wheel; its dependencies are the tested ones."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/*/site-packages")
    # As a line of a .pth file, a folder is searched without its own .pth files, and so without the
    # checkout that one of them leads to.
    (packages / "tested.pth").write_text(sysconfig.get_path("purelib"))
    (wheel,) = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
    subprocess.run([*pip, "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    return folder / "bin"


def run(here: Path, *words: str | Path) -> str:
    """What a command prints, run in a folder without a way to the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_wheel_passes_the_path_of_the_demo_outside_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    vidfill, python = installed / "vidfill", installed / "python"
    assert "usage: vidfill VERB" in run(tmp_path, vidfill, "--help")
    where = run(tmp_path, python, "-c", "import vidfill; print(vidfill.__file__)")
    assert Path(where).is_relative_to(installed.parent)
    sizes = ["--clips", "2", "--validation", "1", "--steps", "2", "--schedules", "ddim:2"]
    said = run(tmp_path, vidfill, "demo", *sizes)
    assert "best schedule: ddim:2" in said
    assert (tmp_path / "runs" / "demo" / "report" / "index.html").is_file()
    two = ["--gpus_per_node", "0", "--processes_per_node", "2", "--out", "node"]
    run(tmp_path, vidfill, "launch", "encode runs/demo/videos shards", *two)
    launch = [python, "-m", "accelerate.commands.launch", "--config_file", "node.yaml"]
    encode = ["vidfill.data.encode", "runs/demo/videos", "shards", "--autoencoder", "shipped"]
    run(tmp_path, *launch, "-m", *encode)
    assert (tmp_path / "shards" / "train" / "manifest.json").is_file()


def steps_of(recipe: str, begin: str, end: str) -> list[str]:
    """The shell commands between two words of a recipe, each without its margin."""
    body = recipe.split(begin, 1)[1].split(end, 1)[0].replace("\\\n", " ")
    commands = re.split(r"\n|&&|^RUN ", body, flags=re.MULTILINE)
    return [words for line in commands if (words := " ".join(line.split())) and words[0] != "#"]


def test_the_recipes_of_both_containers_take_the_same_steps() -> None:
    docker = (ROOT / "Dockerfile").read_text()
    apptainer = (ROOT / "vidfill.def").read_text()
    assert re.findall("^FROM (.*)", docker, re.M) == re.findall("^From: (.*)", apptainer, re.M)
    ours = [step for step in steps_of(docker, "FROM", "WORKDIR") if step.startswith("COPY")]
    assert ours == ["COPY constraints.txt dist/vidfill-*.whl /opt/vidfill/"]
    assert steps_of(apptainer, "%files", "%post") == [
        "constraints.txt /opt/vidfill/",
        "dist/vidfill-*.whl /opt/vidfill/",
    ]
    steps = [step for step in steps_of(docker, "python:3.11-slim", "WORKDIR") if step not in ours]
    assert steps == steps_of(apptainer, "%post", "%environment")


def test_the_containers_leave_only_torch_to_the_registry() -> None:
    recipe, pins = (ROOT / "Dockerfile").read_text(), (ROOT / "constraints.txt").read_text()
    (pattern,) = re.findall("sed --in-place '/(.*?)/d'", recipe)
    (taken,) = (pin for pin in pins.splitlines() if re.search(pattern, pin))
    assert taken.startswith("torch==")
