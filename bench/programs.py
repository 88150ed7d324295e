"""The C programs of the benchmarks, compiled when a run starts."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent

# child.c needs no C library on these; see there.
_FREESTANDING = ("x86_64", "aarch64")


class CompilerError(Exception):
    """There is no C compiler, or it does not compile our programs."""


def find_compiler() -> str | None:
    """Return the C compiler's path, or None."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def compile_all(directory: Path) -> None:
    """Compile every program into `directory`, under its own name."""
    compiler = find_compiler()
    if compiler is None:
        raise CompilerError("the benchmarks need a C compiler (cc): their children, and the floors, are C programs")
    bare = ["-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-fno-builtin"]
    for source in sorted(SOURCES.glob("*.c")):
        flags = bare if source.stem == "child" and platform.machine() in _FREESTANDING else []
        output = directory / source.stem
        command = [compiler, "-O2", "-std=gnu11", "-Wall", "-Wextra", *flags, str(source), "-o", str(output)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise CompilerError(f"{source.name} does not compile: {result.stderr.strip()}")
