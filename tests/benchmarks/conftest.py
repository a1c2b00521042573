"""`benchmarks` is no part of the package: it runs from the repository's root, which is not a path
that tests import from. Here it becomes importable, without making `data` or `train` importable too.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

if "benchmarks" not in sys.modules:
    spec = importlib.machinery.ModuleSpec("benchmarks", None, is_package=True)
    spec.submodule_search_locations = [str(ROOT / "benchmarks")]
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
