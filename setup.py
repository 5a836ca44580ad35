"""Compiles the native extensions. Needs setuptools, pybind11 and GCC or Clang, but not torch.

`_cpu`: csrc/cpu/isa_<name>.cpp hold the same kernels once per instruction set, each compiled with
its own flags. The module selects one of them when it is imported.

`_cuda` is built from csrc/cuda/*.cu if nvcc is found. RLHF_KERNELS_CUDA_ARCHS, or else
TORCH_CUDA_ARCH_LIST, names the architectures, as in "80;90;100+PTX".

RLHF_KERNELS_CPU=1 and RLHF_KERNELS_CUDA=1 make a failure an error, 0 skips the extension. Unset, a
failure leaves the extension out and is said in one line: the package then has the plain-torch
reference, Triton and what was built.
"""

import errno
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11 import get_include
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError

# Used if CFLAGS contain -fsanitize=... (make sanitize), so that reports name functions and lines.
SANITIZED_FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# Without -mprefer-vector-width, compilers use 256 bits even with AVX-512.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *AVX2[1:]]
# GCC 12 warns about its own AVX-512 headers; the other levels still warn about our code.
AVX512 += ["-mprefer-vector-width=512", "-Wno-uninitialized"]
ISA_FLAGS = {"baseline": [], "avx2": AVX2, "avx512": AVX512}
# Fast-math is removed even from CFLAGS: it changes results and, passed to the linker, the
# floating-point mode of the whole process that loads the module.
COMPILE_FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
    *("-Wall", "-Wextra"),
]
FAST_MATH = {
    *("-Ofast", "-ffast-math", "-funsafe-math-optimizations", "-ffinite-math-only"),
    *("-fassociative-math", "-freciprocal-math", "-fno-signed-zeros", "-fcx-limited-range"),
    # These are flags of nvcc, from its environment variables.
    *("-use_fast_math", "-ftz=true", "-prec-div=false", "-prec-sqrt=false"),
    *("--use_fast_math", "--ftz=true", "--prec-div=false", "--prec-sqrt=false"),
}
# This is for the same GCC warnings, but Clang does not know the flag.
OPTIONAL_FLAGS = ["-Wno-maybe-uninitialized"]

# Default architectures of `_cuda`, if nvcc supports them, plus PTX of the newest for later GPUs.
# The kernels need 8.0.
CUDA_ARCHS = (80, 86, 89, 90, 100, 120)
# Contraction is allowed here, but not fast-math, as above. GCC checks the host part.
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
NVCC_FLAGS += ["-Xfatbin=-compress-all"]

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


def without_fast_math(words: Iterable[str]) -> list[str]:
    return [word for word in words if word not in FAST_MATH]


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME or CUDA_PATH, else on the PATH, else in its default folder."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home:
            return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def run_nvcc(nvcc: str, *arguments: str) -> str:
    """Runs nvcc and returns its output; raises CompileError with its messages."""
    environment = dict(os.environ)
    for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        if name in environment:
            environment[name] = " ".join(without_fast_math(environment[name].split()))
    try:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True, env=environment)
    except OSError as error:
        raise CompileError(f"nvcc could not be run: {error}") from None
    if done.returncode != 0:
        said = done.stderr or done.stdout or f"exit status {done.returncode}"
        raise CompileError(f"{shlex.join([nvcc, *arguments])}\n{said}")
    return done.stdout


def cuda_archs(nvcc: str) -> list[str]:
    """The code to generate: "sm_90" for a device, "compute_90" for PTX."""
    listed = run_nvcc(nvcc, "--list-gpu-arch")
    known = {int(n) for n in re.findall(r"compute_(\d+)\b", listed)}
    for variable in ("RLHF_KERNELS_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        words = re.split(r"[;,\s]+", os.environ.get(variable, "").strip())
        if words == [""]:
            continue
        found = []
        for word in words:
            match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)a?(\+PTX)?", word, re.I)
            number = int(match[1] + match[2]) if match else 0
            if number not in known or number < 80:
                names = ", ".join(str(n) for n in sorted(known) if n >= 80)
                raise CompileError(
                    f"{variable}: this nvcc and the kernels know {names}; got {word!r}"
                )
            found += [f"sm_{number}"] + [f"compute_{number}"] * bool(match[3])
        return found
    chosen = [n for n in CUDA_ARCHS if n in known]
    if not chosen:
        raise CompileError("this nvcc knows none of the architectures that the kernels need")
    return [f"sm_{n}" for n in chosen] + [f"compute_{chosen[-1]}"]


class BuildExt(build_ext):
    """build_ext that probes the compiler, and compiles in parallel with flags per ISA."""

    def _error(self, code: str, flags: list[str]) -> str | None:
        """The compiler's errors when building `code` into a program, or None."""
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
        try:
            self._build_extension(ext)
        except CCompilerError as error:
            # A full disk says nothing about the machine: what could be built is not left out.
            if os.strerror(errno.ENOSPC) in str(error):
                ext.optional = False
            if not ext.optional:
                raise
            said = " ".join(str(error).split())
            said = said if len(said) <= 600 else f"{said[:400]} ... {said[-200:]}"
            variable = ext.name.upper().replace(".", "")
            note(f"built without {ext.name} ({variable}=1 makes this an error): {said}")

    def _build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise CompileError(
                "needs GCC or Clang: the kernels use their vector types. On Windows install under "
                "WSL."
            )
        for name in ("compiler_so_cxx", "compiler_cxx", "linker_so", "linker_so_cxx"):
            setattr(self.compiler, name, without_fast_math(getattr(self.compiler, name)))
        if ext.name.endswith("._cuda"):
            self.build_cuda(ext)
        else:
            self.build_cpu(ext)

    def build_cpu(self, ext: Extension) -> None:
        """Builds `_cpu`, with the kernels once per instruction set."""
        error = self._error("int main() { return 0; }\n", COMPILE_FLAGS)
        if error is not None:
            raise CompileError(
                "needs GCC 9+ or Clang 12+ with C++17 (Debian: apt install g++; or set CXX). The "
                f"compiler said: {error}"
            )
        isas = ["baseline"]
        # Probe the compiler rather than the machine, because it may be cross-compiling.
        if self._error(X86_PROBE, AVX512) is None:
            isas += ["avx2", "avx512"]
        openmp = ["-fopenmp"] if self._error(OPENMP_PROBE, ["-fopenmp"]) is None else []
        if not openmp:
            note("the compiler has no OpenMP; the kernels will run on one thread")
        # -Werror is needed because Clang only warns about an unknown warning flag.
        optional = [f for f in OPTIONAL_FLAGS if not self._error("int main() {}\n", [f, "-Werror"])]
        sanitized = any("-fsanitize=" in word for word in self.compiler.compiler_so_cxx)
        if sanitized:
            optional += SANITIZED_FLAGS
        macros = [("RK_HAVE_X86_LEVELS", "1")] if "avx512" in isas else []

        def compile_one(source: str) -> str:
            # Concurrent calls are safe: distutils' Unix compile() does not change the compiler.
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
        strip = ["-Wl,-s"] if platform.system() == "Linux" and not sanitized else []
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=[*openmp, *strip],
            target_lang="c++",
        )
        note(f"built {ext.name} for {', '.join(isas)}; OpenMP: {'yes' if openmp else 'no'}")

    def build_cuda(self, ext: Extension) -> None:
        """Builds `_cuda`: an object per .cu for all architectures; the module needs no nvcc."""
        nvcc = find_nvcc()
        if nvcc is None:
            note("nvcc was not found: built without CUDA kernels")
            return
        archs = cuda_archs(nvcc)
        sources = sorted(str(p) for p in Path("csrc/cuda").glob("*.cu"))
        cores = os.cpu_count() or 1
        generate = [f"-gencode=arch=compute_{a.partition('_')[2]},code={a}" for a in archs]
        # Each file is compiled for all architectures. As many files as cores run at once; the
        # remaining cores are divided among the architectures of each file.
        at_once = max(1, min(cores, len(sources)))
        flags = [*NVCC_FLAGS, *generate, f"--threads={max(1, cores // at_once)}"]
        folder = Path(self.build_temp, "csrc", "cuda")
        folder.mkdir(parents=True, exist_ok=True)
        note(f"compiling {len(sources)} CUDA files for {', '.join(archs)} with {nvcc}")

        def compile_one(source: str) -> str:
            target = str(folder / f"{Path(source).stem}.o")
            run_nvcc(nvcc, "-c", *flags, source, "-o", target)
            return target

        with ThreadPoolExecutor(at_once) as pool:
            objects = list(pool.map(compile_one, sources))
        objects += self.compiler.compile(
            ext.sources,
            output_dir=self.build_temp,
            macros=[("RK_CUDA_ARCHITECTURES", '"' + " ".join(archs) + '"')],
            include_dirs=ext.include_dirs,
            extra_postargs=COMPILE_FLAGS,
        )
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        # The CUDA runtime is linked statically, with hidden symbols. The module then needs no
        # library or driver when imported, and does not conflict with the runtime of torch.
        link = ["-shared", "-cudart=static", "-Xlinker=-s", "-Xlinker=--exclude-libs,ALL"]
        run_nvcc(nvcc, *link, *objects, "-o", target)
        size = Path(target).stat().st_size / 2**20
        note(f"built {ext.name} for {', '.join(archs)}: {size:.1f} MiB")


SOURCES = {
    "CPU": ["csrc/module_cpu.cpp", "csrc/cpu/memory.cpp"],
    "CUDA": ["csrc/module_cuda.cpp"],
}


def extensions() -> list[Extension]:
    """The extensions; optional unless their variable requires them."""
    found = []
    for name, sources in SOURCES.items():
        variable = f"RLHF_KERNELS_{name}"
        wanted = os.environ.get(variable, "").strip()
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"{variable}: expected 0, 1 or nothing, got {wanted!r}")
        if name == "CUDA" and wanted == "1" and find_nvcc() is None:
            # Fail before `_cpu` is built, which takes a minute.
            raise SystemExit(
                f"{variable}=1, but nvcc was not found; set CUDA_HOME to where CUDA is installed"
            )
        if wanted != "0":
            options = {"include_dirs": [get_include()], "language": "c++"}
            one = Extension(f"rlhf_kernels._{name.lower()}", sources=sources, **options)
            one.optional = wanted != "1"
            found.append(one)
    return found


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt})
