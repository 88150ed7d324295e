"""Let setuptools write the cffi binding from the C headers, then compile it with our C files."""

from __future__ import annotations

import sys
from pathlib import Path

from cffi import FFI
from setuptools import Extension
from setuptools.command.build_ext import build_ext as _build_ext


class build_ext(_build_ext):
    """Compile each extension together with the binding that cffi generates from the headers beside its sources."""

    def build_extension(self, ext: Extension) -> None:
        """Generate the binding of `ext` into the build folder and build both."""
        if not sys.platform.startswith("linux"):
            raise SystemExit(f"aiopidfd needs Linux (pidfds are a Linux interface); this is {sys.platform}.")
        headers = [Path(source).with_suffix(".h") for source in ext.sources if Path(source).with_suffix(".h").exists()]
        ffi = FFI()
        for header in headers:
            # cffi reads the header that the compiler reads, without the lines meant for the preprocessor.
            lines = header.read_text(encoding="utf-8").splitlines()
            ffi.cdef("\n".join("" if line.startswith("#") else line for line in lines))
        ffi.set_source(ext.name, "\n".join(f'#include "{header.name}"' for header in headers))
        binding = Path(self.build_temp) / "_ext.c"
        binding.parent.mkdir(parents=True, exist_ok=True)
        ffi.emit_c_code(str(binding))
        ext.sources = [*ext.sources, str(binding)]
        super().build_extension(ext)
