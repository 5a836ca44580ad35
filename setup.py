"""Compiles the native extensions. Needs setuptools, pybind11 and a C++17 compiler; never torch.

csrc/cpu/isa_<name>.cpp are the same kernels once per instruction set, each compiled with its own
flags; the module chooses among them when it is imported.
"""

import os
import platform
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11 import get_include
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in {"x86_64", "amd64"}
ISA_FLAGS = {
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512.cpp": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        # GCC 12 warns about its own AVX-512 headers.
        *("-mprefer-vector-width=512", "-Wno-maybe-uninitialized"),
    ],
}
# No fast-math: it changes results, and at link time the floating-point mode of the whole process.
COMPILE_FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
    *("-Wall", "-Wextra"),
]


class BuildExt(build_ext):
    """build_ext with flags per source file and parallel compilation."""

    def _openmp_flags(self) -> list[str]:
        """['-fopenmp'] if the compiler and its runtime library have it, else [] with a notice."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
            command = [*self.compiler.compiler_so, "-fopenmp", str(source), "-o", f"{folder}/probe"]
            try:
                subprocess.run(command, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                print("rlhf_kernels: the compiler has no OpenMP; kernels will run on one thread")
                return []
        return ["-fopenmp"]

    def build_extension(self, ext: Extension) -> None:
        openmp = self._openmp_flags()
        objects_folder = self.build_temp

        def compile_one(source: str) -> str:
            flags = [*COMPILE_FLAGS, *openmp, *ISA_FLAGS.get(Path(source).name, [])]
            # A copy: distutils compilers keep per-call state.
            [object_file] = self.compiler.compile(
                [source],
                output_dir=objects_folder,
                macros=ext.define_macros,
                include_dirs=ext.include_dirs,
                depends=ext.depends,
                extra_postargs=flags,
            )
            return object_file

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=[*openmp, "-Wl,-s"] if platform.system() == "Linux" else openmp,
            target_lang="c++",
        )
        isas = [re.sub(r"isa_|\.cpp", "", Path(s).name) for s in ext.sources if "isa_" in s]
        print(f"rlhf_kernels: built {ext.name} for {', '.join(isas)}; OpenMP: {bool(openmp)}")


def cpu_extension() -> Extension:
    isas = ["baseline", "avx2", "avx512"] if X86 else ["baseline"]
    return Extension(
        "rlhf_kernels._cpu",
        sources=["csrc/module_cpu.cpp", *(f"csrc/cpu/isa_{isa}.cpp" for isa in isas)],
        depends=sorted(str(p) for p in Path("csrc").rglob("*.h")),
        include_dirs=[get_include()],
        define_macros=[("RK_HAVE_X86_LEVELS", "1")] if X86 else [],
        language="c++",
    )


setup(ext_modules=[cpu_extension()], cmdclass={"build_ext": BuildExt})
