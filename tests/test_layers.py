"""Who may import whom, and what an import may do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each layer, and what it may import of the package beside itself. `cli` finds a verb's module by
# its name when the verb is run.
MAY_IMPORT = {
    "jobs": set(),
    "seeding": set(),
    "crew": {"jobs"},
    "cli": {"__version__"},
    "modeling": {"jobs", "seeding"},
    "data": {"jobs", "seeding", "crew", "modeling"},
    "sampling": {"jobs", "seeding", "crew", "modeling", "data"},
    "train": {"jobs", "seeding", "crew", "modeling", "data", "sampling"},
    "launch": {"jobs", "train.config", "train.deepspeed"},
}
HEAVY = ("torch", "numpy", "diffusers", "accelerate", "av", "cv2", "matplotlib", "jsonargparse")


def sources() -> dict[str, Path]:
    """Every module of the package by its dotted name within it; `__main__` is run, not imported."""
    files = [ROOT / f"{layer}.py" for layer in MAY_IMPORT if (ROOT / f"{layer}.py").is_file()]
    files += [file for layer in MAY_IMPORT for file in (ROOT / layer).glob("*.py")]
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


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
            named = [node.module] if node.module else [name.name for name in node.names]
            found |= {".".join([*base, name]) for name in named}
    return found


def is_within(module: str, layer: str) -> bool:
    return module == layer or module.startswith(layer + ".")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from ..train.loop import train", {"train.loop"}),
        ("from .. import jobs, seeding", {"jobs", "seeding"}),
        (
            "from . import figures\nfrom .metrics import psnr",
            {"sampling.figures", "sampling.metrics"},
        ),
        ("def late():\n    from ..launch import files", {"launch"}),
        ("import vidfill.train\nfrom vidfill.cli import main", {"vidfill.train", "vidfill.cli"}),
        ("import torch\nfrom numpy.linalg import norm", set()),
    ],
)
def test_every_way_to_import_is_seen(source: str, found: set[str]) -> None:
    assert imported_by("sampling.report", source) == found


@pytest.mark.parametrize("module", sources())
def test_imports_point_towards_the_lower_layers_only(module: str) -> None:
    file = sources()[module]
    layer = module.split(".")[0]
    allowed = {layer} | MAY_IMPORT[layer]
    for name in imported_by(module, file.read_text(), file.name == "__init__.py"):
        assert any(is_within(name, other) for other in allowed), f"{module} imports {name}"


def test_every_folder_with_source_is_a_layer() -> None:
    packages = {file.parent.name for file in ROOT.glob("*/__init__.py")}
    assert packages == {layer for layer in MAY_IMPORT if (ROOT / layer).is_dir()}


@pytest.mark.parametrize("command", [["-c", "import vidfill"], ["-m", "vidfill.cli", "--help"]])
def test_import_and_help_load_nothing_heavy(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "vidfill" in loaded
    assert not loaded & set(HEAVY)


def test_importing_every_module_says_nothing_and_writes_nothing(tmp_path: Path) -> None:
    names = [f"vidfill.{name}" for name in sources() if not name.endswith("__main__")]
    script = f"import importlib\nfor name in {names}: importlib.import_module(name)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
