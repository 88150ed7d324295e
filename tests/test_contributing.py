"""CONTRIBUTING.md names what there is: every folder of the package, and commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

import aiopidfd

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_map_names_every_folder_of_the_package() -> None:
    folders = {path.parent.name for path in Path(aiopidfd.__file__).parent.glob("*/*.py")}
    assert [name for name in sorted(folders) if f"`src/aiopidfd/{name}/`" not in TEXT] == []


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = re.findall(r"(?:^|`)make ((?:[a-z]+ ?)+)", TEXT, re.MULTILINE)
    named = {target for command in commands for target in command.split()}
    assert named >= {"build", "test", "full", "lint", "types", "c", "wheel", "ci"}
    assert named <= targets


def test_every_file_that_is_named_exists() -> None:
    named = set(re.findall(r"(?:tests|bench)/[\w/]*\w\.(?:py|c|md)\b|\.ci/run\b", TEXT))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
