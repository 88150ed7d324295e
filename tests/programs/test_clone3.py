"""The child of clone3(2) on its own stack, which needs assembly. It is right with each compiler and level."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from aiopidfd._backends.backend import probe_pidfd

ROOT = Path(__file__).parents[2]
INCLUDE = sysconfig.get_path("include")
FLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'cffi_build'}", f"-I{INCLUDE}"]

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
    pytest.mark.skipif(not Path(INCLUDE, "Python.h").exists(), reason="Python came without its headers"),
]

LEVELS = ["-O0", "-O1", "-O2", "-O3", "-Os"]
WAYS = ["-fomit-frame-pointer", "-fno-omit-frame-pointer -fPIC", "-fstack-protector-all -fPIE"]
COMBINATIONS = [f"{level} {way}" for level in LEVELS for way in WAYS]


def compile_objects(folder: Path, sources: list[Path], *options: str) -> list[str]:
    """Compile C files. Return the path of the result."""
    made = []
    for source in sources:
        made.append(str(folder / f"{source.stem}.o"))
        result = subprocess.run(
            ["cc", *FLAGS, *options, "-c", "-o", made[-1], source], check=False, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
    return made


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The C files that are not about clone3."""
    sources = [ROOT / "cffi_build" / name for name in ("pidfd.c", "reaper.c", "tracked_fds.c", "child.c")]
    return compile_objects(tmp_path_factory.mktemp("others"), [*sources, ROOT / "tests" / "helpers" / "spawner.c"], "-fPIC")


@pytest.mark.skipif(probe_pidfd() is not None, reason="there are no pidfds here")
@pytest.mark.parametrize("options", [*COMBINATIONS, "-O1 -fsanitize=address,undefined"])
def test_programs_start_however_the_assembly_is_compiled(options: str, others: list[str], tmp_path: Path) -> None:
    sources = [ROOT / "cffi_build" / name for name in ("spawn.c", "spawn_child.c")]
    objects = compile_objects(tmp_path, sources, *options.split())
    made = str(tmp_path / "spawner")
    command = ["cc", *options.split(), "-o", made, *objects, *others, "-lpthread", "-ldl"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if "-fsanitize" in options and "cannot find" in result.stderr:
        pytest.skip("the compiler came without its sanitizers")
    assert result.returncode == 0, result.stderr
    result = subprocess.run([made, "/bin/sh", "-c", "exit 3"], check=False, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


# By compiler: the instruction before the child's first one, and one that the child never reaches.
ASSEMBLY = {
    "x86_64-linux-gnu-gcc": (r"\bsyscall\b(.*?)\bhlt\b", r"%\w+", {"%r8", "%r9", "%rdi", "%rax", "%ebp"}),
    "aarch64-linux-gnu-gcc": (r"\bsvc\b(.*?)\bbrk\b", r"\bx\w+", {"x0", "x9", "x10", "x29", "xzr"}),
}


@pytest.mark.parametrize("compiler", [name for name in ASSEMBLY if shutil.which(name)])
@pytest.mark.parametrize("level", LEVELS)
def test_operands_of_the_assembly_are_where_nobody_changes_them(level: str, compiler: str, tmp_path: Path) -> None:
    """They are not in rcx and r11, which the system call changes, nor in rdi and rbp, which the child changes."""
    made = tmp_path / "spawn.s"
    options = [*FLAGS, level, "-fomit-frame-pointer", "-fPIC", "-S", "-o", str(made)]
    subprocess.run([compiler, *options, str(ROOT / "cffi_build" / "spawn.c")], check=True)
    pattern, register, expected = ASSEMBLY[compiler]
    (child,) = re.findall(pattern, made.read_text(), re.DOTALL)
    assert set(re.findall(register, child)) == expected
