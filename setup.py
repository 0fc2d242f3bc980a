"""Build script: the optional compiled parts. Everything else about the distribution is stated in pyproject.toml.

They are shared libraries with a plain C interface, loaded through ctypes: they need a C++17 compiler, neither torch's
nor Python's headers, and are built for the processor of this machine. Without a compiler the package installs all the
same and computes with torch alone.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BASE = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wno-psabi", "-g0"]
# vectorised loops; a source that lets sums be reordered says so itself (fused.cpp)
BASE += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
# the first set of flags that the compiler takes is used: not every compiler knows OpenMP or -march=native
ATTEMPTS = (["-march=native", "-fopenmp"], ["-fopenmp"], ["-march=native"], [])


class BuildNative(build_ext):
    """Try the flags in turn; a library that cannot be built is left out with one line."""

    def build_extension(self, extension: Extension) -> None:
        for flags in ATTEMPTS:
            extension.extra_compile_args = [*BASE, *flags]
            extension.extra_link_args = [flag for flag in flags if flag == "-fopenmp"]
            try:
                super().build_extension(extension)
            except Exception as error:  # whatever the compiler or its absence raises, the package works without
                reason = str(error)
            else:
                return
        print(f"bamboo: {extension.name} was not built ({reason[:80]}); the package works without it, but slower.")

    def get_export_symbols(self, extension: Extension) -> list[str]:
        """Return no symbol: this is a plain library, not a Python module."""
        return []


def library(name: str, *, source: str) -> Extension:
    headers = sorted(str(path) for path in Path(source).parent.glob("*.h"))
    return Extension(name, sources=[source], depends=headers, optional=True)


setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[
        library("bamboo.kernels._native", source="bamboo/kernels/source/native.cpp"),
        library("bamboo.nn._fused", source="bamboo/nn/source/fused.cpp"),
    ],
)
