"""Compiles the native extension. Needs setuptools, pybind11 and GCC or Clang; never torch.

csrc/cpu/isa_<name>.cpp are the same kernels once per instruction set, each compiled with its own
flags; the module chooses among them when it is imported.
"""

import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11 import get_include
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# Without the preference, compilers stay at 256 bits even where AVX-512 is on.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *AVX2[1:]]
# GCC 12 warns about its own AVX-512 headers; the other levels warn about ours.
AVX512 += ["-mprefer-vector-width=512", "-Wno-uninitialized"]
ISA_FLAGS = {"baseline": [], "avx2": AVX2, "avx512": AVX512}
# No fast-math, not even from CFLAGS: it changes results and, when given to the linker, the
# floating-point mode of the whole process that loads the module.
COMPILE_FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
    *("-Wall", "-Wextra"),
]
FAST_MATH = {"-Ofast", "-ffast-math", "-funsafe-math-optimizations"}
# The same, but Clang does not know this warning.
OPTIONAL_FLAGS = ["-Wno-maybe-uninitialized"]

X86_PROBE = """
#ifndef __x86_64__
#error not x86-64
#endif
#include <immintrin.h>
void twice(float* p) { _mm512_storeu_ps(p, _mm512_add_ps(_mm512_loadu_ps(p), _mm512_loadu_ps(p))); }
int main() { return __builtin_cpu_supports("avx512f"); }
"""
OPENMP_PROBE = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"


def note(text: str) -> None:
    print(f"rlhf_kernels: {text}", file=sys.stderr)


class BuildExt(build_ext):
    """build_ext that asks the compiler what it can, and compiles in parallel, each ISA its way."""

    def _error(self, code: str, flags: list[str]) -> str | None:
        """What the compiler says against building `code` into a program, or None if it can."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(code)
            command = [*self.compiler.compiler_so_cxx, *flags, str(source)]
            try:
                subprocess.run(
                    [*command, "-o", f"{folder}/probe"], check=True, capture_output=True, text=True
                )
            except OSError as error:
                return str(error)
            except subprocess.CalledProcessError as error:
                return error.stderr or f"exit status {error.returncode}"
        return None

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise CompileError(
                "rlhf_kernels needs GCC or Clang: its kernels use their vector types. On Windows "
                "install it under WSL."
            )
        for name in ("compiler_so_cxx", "compiler_cxx", "linker_so", "linker_so_cxx"):
            command = getattr(self.compiler, name)
            setattr(self.compiler, name, [word for word in command if word not in FAST_MATH])
        error = self._error("int main() { return 0; }\n", COMPILE_FLAGS)
        if error is not None:
            raise CompileError(
                "rlhf_kernels needs GCC 9+ or Clang 12+ with C++17 (Debian: apt install g++; or "
                f"set CXX). The compiler said: {error}"
            )
        isas = ["baseline"]
        # Asked of the compiler, not of the machine: it may be cross-compiling.
        if self._error(X86_PROBE, AVX512) is None:
            isas += ["avx2", "avx512"]
        openmp = ["-fopenmp"] if self._error(OPENMP_PROBE, ["-fopenmp"]) is None else []
        if not openmp:
            note("the compiler has no OpenMP; the kernels will run on one thread")
        # -Werror: Clang only warns about a warning that it does not know.
        optional = [f for f in OPTIONAL_FLAGS if not self._error("int main() {}\n", [f, "-Werror"])]
        macros = [("RK_HAVE_X86_LEVELS", "1")] if "avx512" in isas else []

        def compile_one(source: str) -> str:
            # Concurrent calls are safe: distutils' Unix compile() changes no state of the compiler.
            [object_file] = self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=macros,
                include_dirs=ext.include_dirs,
                extra_postargs=[
                    *COMPILE_FLAGS,
                    *optional,
                    *openmp,
                    *ISA_FLAGS.get(Path(source).stem.removeprefix("isa_"), []),
                ],
            )
            return object_file

        sources = [*ext.sources, *(f"csrc/cpu/isa_{isa}.cpp" for isa in isas)]
        with ThreadPoolExecutor(min(len(sources), os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_one, sources))
        strip = ["-Wl,-s"] if platform.system() == "Linux" else []
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=[*openmp, *strip],
            target_lang="c++",
        )
        note(f"built {ext.name} for {', '.join(isas)}; OpenMP: {'yes' if openmp else 'no'}")


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                "rlhf_kernels._cpu",
                sources=["csrc/module_cpu.cpp"],
                include_dirs=[get_include()],
                language="c++",
            )
        ],
        cmdclass={"build_ext": BuildExt},
    )
