"""The house: imports go one way, a wing knows only those below it, and rooms stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import aiopidfd

# From the ground up. A wing imports from itself and from those before it.
WINGS = ["_kernel", "_backends", "_watch", "_programs", "_loops", "_fork", "_forkserver", "_demo"]

# These stand above all wings. `__init__` has public names, and nothing else.
AT_THE_TOP = {"__init__", "__main__"}

PACKAGE = Path(aiopidfd.__file__).parent
TESTS = Path(__file__).resolve().parent

# tests/ has a folder for each wing, and these.
OTHER_TESTS = {"conformance", "helpers", "kernels", "mutations", "stress"}
MAX_LINES = 400


def find_modules(folder: Path) -> dict[str, Path]:
    """Return the file of each module, by its name below the package."""
    return {".".join(path.relative_to(folder).with_suffix("").parts): path for path in folder.rglob("*.py")}


def find_imports(name: str, source: str, modules: set[str]) -> Iterator[str]:
    """Yield the modules of the package that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "aiopidfd":
                    yield alias.name.partition(".")[2] or "__init__"
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            if node.level:
                base = [*parts[: len(parts) - node.level], *filter(None, [node.module])]
            elif (node.module or "").partition(".")[0] == "aiopidfd":
                base = (node.module or "").split(".")[1:]
            else:
                continue
            for alias in node.names:
                full = ".".join([*base, alias.name])
                yield full if full in modules else ".".join(base) or "__init__"


def find_graph(folder: Path = PACKAGE) -> dict[str, set[str]]:
    """Return each module of the package with those of the package that it imports."""
    modules = find_modules(folder)
    known = {*modules, "_ext"}
    return {name: set(find_imports(name, path.read_text(encoding="utf-8"), known)) for name, path in modules.items()}


def wing_of(module: str) -> str:
    return module.rpartition(".")[0].partition(".")[0]


def find_offences(graph: dict[str, set[str]]) -> list[str]:
    """Say what is wrong with the house, a sentence each."""
    offences = []
    for module, imported in graph.items():
        wing = wing_of(module)
        if not wing:
            continue
        for other in sorted(imported - {"_ext"}):
            known = wing_of(other)
            if known and WINGS.index(known) > WINGS.index(wing):
                offences.append(f"{module} imports {other}, which is above it")
            elif not known and wing != "_demo":  # which uses the public names
                offences.append(f"{module} imports {other}, which is above all wings")
    return offences


def find_long_files(folders: list[Path]) -> dict[str, int]:
    """Return the source files with more lines than a file may have, and how many those are."""
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in {".py", ".c", ".h"}]
    sizes = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    return {name: lines for name, lines in sizes.items() if lines > MAX_LINES}


def test_imports_go_one_way() -> None:
    """CycleError names the modules of a circle."""
    order = list(TopologicalSorter(find_graph()).static_order())
    assert order.index("_ext") < order.index("__init__") < order.index("__main__")


def test_wing_knows_only_those_below_it() -> None:
    assert find_offences(find_graph()) == []


def test_only_two_modules_use_the_binding() -> None:
    users = {module for module, imported in find_graph().items() if "_ext" in imported}
    assert users == {"_kernel.reaper", "_kernel.syscalls"}


def test_nothing_but_wings_stands_at_the_top() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == AT_THE_TOP
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(WINGS)


@pytest.mark.parametrize("wing", WINGS)
def test_wing_has_at_most_ten_modules_and_says_what_it_promises(wing: str) -> None:
    assert len([path for path in (PACKAGE / wing).glob("*.py") if path.stem != "__init__"]) <= 10
    body = ast.parse((PACKAGE / wing / "__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)


@pytest.mark.parametrize("wing", WINGS)
def test_wing_has_its_folder_in_tests(wing: str) -> None:
    assert list((TESTS / wing.lstrip("_")).glob("test_*.py"))


def test_tests_have_no_folder_but_those_of_wings_and_a_few_others() -> None:
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))}
    assert folders == {wing.lstrip("_") for wing in WINGS} | OTHER_TESTS


def test_no_file_has_over_400_lines() -> None:
    # A test run against an installed package has no cffi_build/ and no bench/.
    assert find_long_files([PACKAGE, TESTS, TESTS.parent / "cffi_build", TESTS.parent / "bench"]) == {}


BROKEN = {
    "_kernel/low.py": "from .._watch import high\n",
    "_watch/high.py": "from .._kernel import low\n",
    "_loops/inside.py": "def function():\n    from .._fork.child import name\n",
    "_fork/child.py": "import aiopidfd\n",
}


def test_broken_house_is_noticed(tmp_path: Path) -> None:
    for name, source in BROKEN.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(source, encoding="utf-8")
    graph = find_graph(tmp_path)
    assert sorted(find_offences(graph)) == [
        "_fork.child imports __init__, which is above all wings",
        "_kernel.low imports _watch.high, which is above it",
        "_loops.inside imports _fork.child, which is above it",
    ]
    with pytest.raises(ValueError, match="cycle"):
        list(TopologicalSorter(graph).static_order())
    (tmp_path / "_fork/long.py").write_text("\n" * (MAX_LINES + 1), encoding="utf-8")
    assert find_long_files([tmp_path]) == {str(tmp_path / "_fork/long.py"): MAX_LINES + 1}
