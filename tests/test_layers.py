"""Who may import whom, and what an import may do."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The floors, ground first. A module stands on the floor that names it best, and imports from its
# own floor or a lower one. `cli` finds a verb's module by its name when the verb is run.
FLOORS = (
    ("errors", "interrupts", "seeding"),
    ("files", "records"),
    ("progress", "processes", "jobs", "options"),
    ("modeling",),
    (
        "data.videos",
        "data.own_masks",
        "data.masks",
        "data.storage",
        "data.synth",
        "data.fingerprints",
    ),
    ("data.motion",),
    ("data.shards",),
    ("data.encode",),
    ("data.verify",),
    ("sampling.figure_style",),
    ("sampling.schedules", "sampling.metrics"),
    ("sampling.sampler", "sampling.capacity", "sampling.examples"),
    ("sampling.inpaint", "sampling.sweep"),
    ("sampling.pipeline", "sampling.report"),
    ("train.config", "train.deepspeed", "train.monitor.profiling", "train.monitor.trackers"),
    ("train.card", "train.control", "train.state", "train.step", "train.checkpoints"),
    ("train.monitor", "train.export"),
    ("train.preflight",),
    ("train.loop", "train.autoencoder"),
    ("demo", "launch", "cli", "__main__"),
)
LAUNCH_MAY_IMPORT = ("errors", "files", "jobs", "options", "train.config", "train.deepspeed")
LAYERS = ("modeling", "data", "sampling", "train", "launch")
HEAVY = ("torch", "numpy", "diffusers", "accelerate", "av", "cv2", "matplotlib", "jsonargparse")


def sources() -> dict[str, Path]:
    """Every module of the package, at any depth, by its dotted name within it."""
    files = [file for file in ROOT.glob("*.py") if file.name not in ("setup.py", "__init__.py")]
    files += [file for layer in LAYERS for file in (ROOT / layer).rglob("*.py")]
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    modules = {name.removesuffix(".__init__"): file for name, file in names.items()}
    return {name: file for name, file in modules.items() if ".weights." not in name}


def floor_of(module: str) -> int:
    """The number of the floor that names a module, or the nearest folder around it."""
    named = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    parts = module.split(".")
    if parts[-1] == "__main__":  # what `python -m` starts, which only hands over
        return named["__main__"]
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in named:
            return named[name]
    raise KeyError(f"{module} stands on no floor: add it to FLOORS")


def imported_by(module: str, source: str, is_package: bool = False) -> set[str]:
    """What a module imports of the package, as dotted names within it.

    An absolute import of the package keeps its `vidfill.` in front.
    """
    found = set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.split(".")[0] == "vidfill"}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            if (node.module or "").split(".")[0] == "vidfill":
                found.add(node.module or "")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            names = [name.name for name in node.names]
            named = [node.module] if node.module else names
            if node.module and (ROOT / "/".join([*base, *node.module.split(".")])).is_dir():
                named = [f"{node.module}.{name}" for name in names]
            found |= {".".join([*base, name]) for name in named}
    return found


def is_within(module: str, layer: str) -> bool:
    return module == layer or module.startswith(layer + ".")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from ..train.loop import train", {"train.loop"}),
        ("from ..data import masks, videos", {"data.masks", "data.videos"}),
        ("from .. import jobs, seeding", {"jobs", "seeding"}),
        (
            "from . import pipeline\nfrom .sampler import sample",
            {"sampling.pipeline", "sampling.sampler"},
        ),
        ("def late():\n    from ..launch import files", {"launch.files"}),
        ("import vidfill.train\nfrom vidfill.cli import main", {"vidfill.train", "vidfill.cli"}),
        ("import torch\nfrom numpy.linalg import norm", set()),
    ],
)
def test_every_way_to_import_is_seen(source: str, found: set[str]) -> None:
    assert imported_by("sampling.report", source) == found


PACKAGES = [name for name, file in sources().items() if file.name == "__init__.py"]


@pytest.mark.parametrize("module", [name for name in sources() if name not in PACKAGES])
def test_imports_point_towards_the_lower_floors_only(module: str) -> None:
    for name in imported_by(module, sources()[module].read_text()) - {"__version__"}:
        assert floor_of(name) <= floor_of(module), f"{module} imports {name}"


def test_contributing_lists_the_floors() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text().partition("| floor |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`.*?`) \|", page, flags=re.MULTILINE)
    assert [tuple(re.findall("`(.*?)`", row)) for row in rows] == [
        tuple(name for name in floor if "__main__" not in name) for floor in FLOORS
    ]


def test_launch_imports_configuration_only() -> None:
    for name in imported_by("launch.launch", sources()["launch.launch"].read_text()):
        assert any(is_within(name, other) for other in LAUNCH_MAY_IMPORT), name


def test_nothing_imports_what_stands_on_the_top_floor() -> None:
    top = len(FLOORS) - 1
    starts = {module for module in sources() if module.endswith("__main__")}
    for module in sources().keys() - {*PACKAGES, *starts}:
        named = imported_by(module, sources()[module].read_text())
        named -= {"__version__"}
        assert not [name for name in named if floor_of(name) == top], module


def test_the_faces_of_packages_import_nothing() -> None:
    for name in PACKAGES:
        assert not imported_by(name, sources()[name].read_text(), True)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: imported_by(module, file.read_text(), file.name == "__init__.py")
        for module, file in sources().items()
    }
    tuple(TopologicalSorter(graph).static_order())


def test_every_folder_with_source_is_a_layer() -> None:
    packages = {file.parent.name for file in ROOT.glob("*/__init__.py")}
    assert packages == set(LAYERS)


def test_folders_and_files_stay_small_enough_to_name() -> None:
    lines = {name: len(file.read_text().splitlines()) for name, file in sources().items()}
    assert not {name: count for name, count in lines.items() if count > 500}
    folders = Counter(file.parent for file in sources().values())
    assert not {folder: count for folder, count in folders.items() if count > 12}


@pytest.mark.parametrize("command", [["-c", "import vidfill"], ["-m", "vidfill.cli", "--help"]])
def test_import_and_help_load_nothing_heavy(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "vidfill" in loaded
    assert not loaded & set(HEAVY)


def test_the_help_of_every_verb_takes_less_than_a_second_and_no_torch() -> None:
    script = """
import contextlib, io, sys, time
from vidfill.cli import VERBS, main
for verb in VERBS:
    for option in ("--help", "--help_all"):
        began = time.process_time()
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
            main([verb, option])
        assert "torch" not in sys.modules, verb
        if "--help_all" in said.getvalue() or option == "--help":
            assert said.getvalue().startswith(f"usage: vidfill {verb}"), verb
            assert "examples:" in said.getvalue(), verb
            assert "type:" not in said.getvalue(), verb
        assert time.process_time() - began < 1, verb
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
def test_importing_every_module_says_nothing_and_writes_nothing(tmp_path: Path) -> None:
    names = [f"vidfill.{name}" for name in sources() if not name.endswith("__main__")]
    script = f"import importlib\nfor name in {names}: importlib.import_module(name)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# What is read by other means: what this process, or another one of the job, has just written.
OWN = {
    "jobs": ("read_bytes", "json.loads"),
    "processes": ("json.loads",),
    "sampling.inpaint.unfinished": ("read_bytes",),
    "sampling.pipeline": ("read_text", "json.loads"),
    "sampling.sweep.ledger": ("read_text",),
    "sampling.sweep.run": ("json.loads",),
    "train.autoencoder": ("json.loads",),
    "train.control": ("json.loads",),
    "train.state": ("json.loads",),
}


def test_what_strangers_wrote_is_read_by_one_module() -> None:
    bare = re.compile(r"\b(np\.load|json\.loads?|read_bytes|read_text|model_validate_json)\(")
    found = {
        name: set(bare.findall(file.read_text())) - set(OWN.get(name, ()))
        for name, file in sources().items()
        if name != "records"
    }
    assert not {name: calls for name, calls in found.items() if calls}
