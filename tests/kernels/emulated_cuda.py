"""Builds csrc/cuda for the CPU with the headers of cuda_emulator, and loads it.

No CUDA is needed. The object files are cached by the contents of what they are made from.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

from rlhf_kernels.kernels import backends, native

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "cuda_emulator"

# nvcc contracts too. _FORTIFY_SOURCE refuses to jump between stacks.
FLAGS = [
    *("-std=c++17", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-march=native"),
    *("-ffp-contract=fast", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas", "-DRK_EMULATED"),
    '-DRK_CUDA_ARCHITECTURES="emulated"',
]


def _sources() -> list[Path]:
    return [ROOT / "csrc" / "module_cuda.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]


def _sanitized() -> bool:
    return "-fsanitize" in os.environ.get("CXX", "")


def _compiler() -> list[str]:
    # With sanitizers twice as fast to compile, and reports name lines.
    return [*(os.environ.get("CXX") or "g++").split(), *FLAGS, *["-O1", "-g1"] * _sanitized()]


def _digest() -> str:
    read = hashlib.sha256(" ".join(_compiler()).encode())
    folders = (ROOT / "csrc", EMULATOR)
    for file in sorted(f for folder in folders for f in folder.rglob("*") if f.is_file()):
        if "cpu" not in file.parts:
            read.update(file.name.encode() + file.read_bytes())
    # -march=native: another machine may share the folder.
    read.update(Path("/proc/cpuinfo").read_bytes() if Path("/proc/cpuinfo").exists() else b"")
    return read.hexdigest()[:16]


def build() -> Path:
    """The extension's file, compiled if need be; one process at a time."""
    # With sanitizers in a place of its own, or each would delete the other.
    cache = ROOT / "build" / ("cuda-emulator" + "-sanitized" * _sanitized())
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        digest = _digest()
        target = cache / digest / f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
        if target.exists():
            return target
        for old in cache.iterdir():
            if old.is_dir():
                shutil.rmtree(old)
        target.parent.mkdir()
        compiler = [*_compiler(), f"-I{EMULATOR}"]
        compiler += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]

        def compile_one(source: Path) -> str:
            out = str(target.parent / f"{source.stem}.o")
            _run(*compiler, "-x", "c++", "-c", str(source), "-o", out)
            return out

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, _sources()))
        _run(*compiler, "-shared", *objects, "-o", f"{target}.new")
        os.replace(f"{target}.new", target)
        return target


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@functools.cache
def load() -> ModuleType:
    """The emulated extension."""
    spec = importlib.util.spec_from_file_location("_cuda_emulated", build())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def installed() -> Iterator[ModuleType]:
    """The emulated extension in the place of the real one, which may be missing."""
    extension = native.install("cuda", load())
    before = refresh()
    try:
        yield load()
    finally:
        native.install("cuda", *extension)
        backends.install(before)


def refresh() -> backends.Backend:
    """Makes the launchers anew, from functions of the extension that a test has replaced."""
    native.install("cuda", load())
    return backends.install(backends.of_extension("cuda", ("cuda",)))
