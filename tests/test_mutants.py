"""tests/mutants: its list applies to the tree as it is, and it knows which bugs the tests notice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="tests/mutants needs tomllib, which is in Python 3.11")


def mutants(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "tests" / "mutants"), *arguments]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environ)


@pytest.mark.skipif(not (TESTS.parent / "src").is_dir(), reason="the sources are not here: this is a test of the wheel")
def test_each_mutation_still_applies() -> None:
    done = mutants(TESTS.parent, "--check")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """A repository with one function and one test of it that sees little."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    (tmp_path / "src").mkdir()
    (tmp_path / "tests" / "mutations").mkdir(parents=True)
    shutil.copy2(TESTS / "mutants", tmp_path / "tests")
    (tmp_path / "src" / "small.py").write_text("def double(x):\n    return 2 * x\n", encoding="utf-8")
    (tmp_path / "tests" / "test_small.py").write_text(
        "import small\n\ndef test_two():\n    assert small.double(2) == 4\n\ndef test_broken():\n    raise OSError\n",
        encoding="utf-8",
    )
    subprocess.run(["git", "-C", tmp_path, "init", "-q"], check=True)
    return tmp_path


def write_mutation(tree: Path, name: str, new: str, test: str = "test_two", old: str = "2 * x") -> None:
    fields = {"name": name, "cost": "wrong sums", "file": "src/small.py", "old": old, "new": new}
    table = "\n".join(["[[mutation]]", *(f"{key} = '''{value}'''" for key, value in fields.items())])
    text = f'{table}\ntests = ["tests/test_small.py::{test}"]\n'
    (tree / "tests" / "mutations" / f"{name}.toml").write_text(text, encoding="utf-8")


@pytest.mark.long
def test_bug_that_a_test_notices_is_killed_and_others_survive(small_tree: Path) -> None:
    write_mutation(small_tree, "a real one", "3 * x")
    write_mutation(small_tree, "a harmless one", "x + 2")
    done = mutants(small_tree)
    assert (done.returncode, done.stderr) == (1, "")
    words = {line.split(": ")[1]: line.split()[0] for line in done.stdout.splitlines() if "src/small.py" in line}
    assert words == {"a real one": "killed", "a harmless one": "survived"}
    assert mutants(small_tree, "--match", "a real").returncode == 0
    assert "return 2 * x" in (small_tree / "src" / "small.py").read_text(encoding="utf-8")


def test_test_that_always_fails_kills_nothing(small_tree: Path) -> None:
    write_mutation(small_tree, "one", "3 * x", "test_broken")
    done = mutants(small_tree)
    assert done.returncode == 1
    assert "1 error" in done.stdout
    assert "fails without any bug" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"new": "2 * x"}, "it changes nothing"),
        ({"new": "", "old": "4 * x"}, "its old text is 0 times in src/small.py, not once"),
        ({"new": "", "old": "x"}, "its old text is 2 times in src/small.py, not once"),
        ({"new": "", "test": "test_three"}, "there is no test tests/test_small.py::test_three"),
    ],
)
def test_mutation_that_cannot_be_applied_is_an_error(arguments: dict[str, str], complaint: str, small_tree: Path) -> None:
    write_mutation(small_tree, "one", **arguments)
    done = mutants(small_tree, "--check")
    assert (done.returncode, done.stderr) == (1, f"mutants: one.toml: 'one': {complaint}\n")
