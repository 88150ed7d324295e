"""The house: imports go one way, and two modules alone talk to the compiled binding."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import aiopidfd


def imports() -> dict[str, set[str]]:
    """Each module of the package, with those of the package that it imports when it is imported."""
    found: dict[str, set[str]] = {}
    for path in Path(aiopidfd.__file__).parent.glob("*.py"):
        names: set[str] = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names.update([node.module] if node.module else [alias.name for alias in node.names])
        found[path.stem] = names
    return found


def test_imports_go_one_way() -> None:
    """CycleError names the modules of a circle."""
    order = list(TopologicalSorter(imports()).static_order())
    assert order.index("_linux") < order.index("_registry") < order.index("_watcher") < order.index("__init__")


def test_only_two_modules_use_the_binding() -> None:
    assert {module for module, names in imports().items() if "_ext" in names} == {"_linux", "_reaper"}
