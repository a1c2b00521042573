"""One word for one thing, as CONTRIBUTING's list of words asks, as far as names can tell."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = ("modeling", "data", "sampling", "train", "launch")
# Each verb's module has its own.
OF_EACH_MODULE = {"EXAMPLES"}
# Words that do not say what is held: anything can be a `Task`.
EMPTY = {
    "Data",
    "Finding",
    "Hole",
    "Info",
    "Inputs",
    "Item",
    "Plan",
    "Result",
    "Row",
    "Span",
    "Task",
    "View",
    "Work",
}


def modules() -> dict[str, ast.Module]:
    files = [file for file in ROOT.glob("*.py") if file.name != "setup.py"]
    files += [file for layer in LAYERS for file in (ROOT / layer).rglob("*.py")]
    trees = {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in files}
    return {name: tree for name, tree in trees.items() if "/weights/" not in name}


def is_type_variable(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and ast.unparse(value.func) == "TypeVar"


def names_of(tree: ast.Module) -> list[str]:
    """What a module defines, in the order of its lines."""
    named = []
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            named.append(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            named.append(node.target.id)
        elif isinstance(node, ast.Assign) and not is_type_variable(node.value):
            named += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return named


def test_no_two_public_classes_or_constants_share_a_name() -> None:
    where = defaultdict(list)
    for module, tree in modules().items():
        for name in names_of(tree):
            if name[0].isupper() and name not in OF_EACH_MODULE:
                where[name].append(module)
    assert not {name: found for name, found in where.items() if len(found) > 1}


def test_no_class_has_a_name_that_says_nothing() -> None:
    found = {
        (module, name)
        for module, tree in modules().items()
        for name in names_of(tree)
        if name in EMPTY
    }
    assert not found


def test_private_names_are_not_imported() -> None:
    taken = [
        (module, alias.name)
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert not taken
