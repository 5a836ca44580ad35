"""Compiles csrc/cuda with nvcc, without a GPU, and reads the resources that ptxas reports.

    python -m tools.cuda_resources --arch 80 --arch 90
    python -m tools.cuda_resources --report benchmarks/results/cuda-resources.md --date 2026-01-31

prints registers and shared memory of every kernel. Spills and stack frames are failures, because
both cause memory traffic. Results are cached by the contents of their sources.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.tables import options_of_report, table

ROOT = Path(__file__).parent.parent
FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
# Registers of a multiprocessor, and the minimum number of resident blocks: with a single block
# nothing hides the latency of its loads and barriers.
REGISTERS = 65536
MIN_BLOCKS = 2
# The smallest shared memory of a multiprocessor (sm_86, sm_89 and sm_120), and the part of it that
# the system reserves for each block.
SHARED, SYSTEM_SHARED = 100 << 10, 1 << 10


@dataclass(frozen=True)
class Resources:
    """The resources of one kernel on one architecture."""

    kernel: str
    arch: int
    registers: int
    shared: int
    stack: int
    spills: int

    def problems(self, threads: int = 256) -> list[str]:
        """Violations of the gate; `threads` is the size of a block."""
        found = []
        if self.stack:
            found.append(f"a stack frame of {self.stack} bytes")
        if self.spills:
            found.append(f"{self.spills} bytes of spills")
        blocks = REGISTERS // (-(-self.registers // 8) * 8 * threads)
        if blocks < MIN_BLOCKS:
            found.append(f"{self.registers} registers: {blocks} blocks to a multiprocessor")
        blocks = SHARED // (self.shared + SYSTEM_SHARED)
        if blocks < MIN_BLOCKS:
            found.append(f"{self.shared} bytes of shared memory: {blocks} blocks to one")
        return [f"{self.kernel}, sm_{self.arch}: {p}" for p in found]


def nvcc() -> str | None:
    """The nvcc that setup.py would use."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'")
_MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse(report: str) -> list[Resources]:
    """The kernels in the output of `ptxas -v`."""
    found = []
    name = arch = stack = spills = None
    for line in report.splitlines():
        if match := _ENTRY.search(line):
            name, arch = match[1], int(match[2])
        elif match := _MEMORY.search(line):
            # ptxas prints this also for functions that were not inlined; their frames count too.
            stack, spills = int(match[1]), int(match[2]) + int(match[3])
        elif (match := _USED.search(line)) and name is not None:
            shared = _SHARED.search(line)
            found.append(
                Resources(name, arch, int(match[1]), int(shared[1]) if shared else 0, stack, spills)
            )
            name = None
    return found


def short_names(mangled: list[str]) -> list[str]:
    """C++ names of kernels without namespaces and arguments; unchanged if c++filt is missing."""
    if not mangled or shutil.which("c++filt") is None:
        return mangled
    names = subprocess.check_output(["c++filt"], input="\n".join(mangled), text=True).splitlines()
    plain = [re.sub(r"^void |\brk::(cuda::)?|\(anonymous namespace\)::", "", n) for n in names]
    # Numbers of a template have their type before them where it is bool or an enumeration.
    plain = [re.sub(r"\(\w+\)(?=\d|true|false)", "", n) for n in plain]
    return [n.partition("(")[0] for n in plain]


def _readable(found: list[Resources]) -> list[Resources]:
    """The same resources with C++ names of kernels."""
    names = short_names([r.kernel for r in found])
    return [Resources(**(asdict(r) | {"kernel": n})) for r, n in zip(found, names, strict=True)]


def compile_file(
    source: Path, archs: tuple[int, ...], flags: tuple[str, ...] = (), out: Path | None = None
) -> str:
    """Compiles one file, with its object file at `out` if given. Returns nvcc's output, or raises
    RuntimeError with it."""
    generate = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc(), "-c", *FLAGS, "-Xptxas=-v", *flags, *generate, str(source)]
        done = subprocess.run(
            [*command, "-o", str(out or f"{folder}/out.o")],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}{done.stdout}")
    return done.stderr + done.stdout


def compiled(source: Path, archs: tuple[int, ...]) -> tuple[list[Resources], Path]:
    """The kernels of one file on each architecture, and their object file. A lock makes other
    processes wait and use the result."""
    read = hashlib.sha256(subprocess.check_output([nvcc(), "--version"]))
    read.update(repr((FLAGS, archs, Path(__file__).read_bytes(), source.name)).encode())
    shared = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.*h"), source]
    for file in sorted(shared):
        read.update(file.name.encode() + file.read_bytes())
    cache = ROOT / "build" / "cuda-resources"
    cache.mkdir(parents=True, exist_ok=True)
    cached = cache / f"{source.stem}-{read.hexdigest()[:16]}.json"
    made = cached.with_suffix(".o")
    with open(cache / f"{source.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not cached.exists():
            for old in (*cache.glob(f"{source.stem}-*.json"), *cache.glob(f"{source.stem}-*.o")):
                old.unlink(missing_ok=True)
            found = _readable(parse(compile_file(source, archs, out=made)))
            # The JSON is written last, so that an interrupted run leaves no complete entry.
            new = cached.with_suffix(".new")
            new.write_text(json.dumps([asdict(r) for r in found]))
            new.replace(cached)
    return [Resources(**r) for r in json.loads(cached.read_text())], made


def report(source: Path, archs: tuple[int, ...]) -> list[Resources]:
    """The kernels of one file on each architecture."""
    return compiled(source, archs)[0]


def sources() -> list[Path]:
    """The CUDA files, largest first because they take longest."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"), key=lambda f: -f.stat().st_size)


def markdown(found: dict[str, list[Resources]], date: str) -> str:
    """A table of the maxima over the variants of each kernel, by file and architecture."""
    version = re.search(
        r"release ([\d.]+)", subprocess.check_output([nvcc(), "--version"]).decode()
    )
    variants = sum(map(len, found.values()))
    figures = ("registers", "shared", "spills", "stack")
    lines = [
        "# What the CUDA kernels need",
        "",
        f"Compiled, not run, by nvcc {version[1] if version else 'of unknown version'} on {date}: "
        f"{variants} variants (dtypes, options, architectures). The worst variant of each kernel.",
        "Written by `make cuda-report`. The gate: no spills, no stack frames, at least "
        f"{MIN_BLOCKS} blocks of 256 threads a multiprocessor by registers and by shared memory.",
        "",
    ]
    head = ("file", "kernel", "target", "variants", "registers", "shared B", "spills B", "stack B")
    rows = []
    for file, kernels in sorted(found.items()):
        names = {(r.kernel.partition("<")[0], r.arch) for r in kernels}
        for name, arch in sorted(names):
            own = [r for r in kernels if (r.kernel.partition("<")[0], r.arch) == (name, arch)]
            most = [max(getattr(r, k) for r in own) for k in figures]
            rows.append([f"{file}.cu", name, f"sm_{arch}", *map(str, (len(own), *most))])
    return "\n".join([*lines, *table(head, rows, left=3)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, action="append")
    options = options_of_report(parser)
    archs = tuple(options.arch or (80, 90, 100))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = list(pool.map(lambda f: report(f, archs), sources()))
    if options.report:
        by_file = {f.stem: r for f, r in zip(sources(), found, strict=True)}
        options.report.write_text(markdown(by_file, options.date))
    problems = 0
    for source, kernels in zip(sources(), found, strict=True):
        for r in sorted(kernels, key=lambda r: (r.kernel, r.arch)):
            bad = r.problems()
            problems += len(bad)
            print(
                f"{source.stem:12} {r.kernel:44} sm_{r.arch:<4} {r.registers:3} registers "
                f"{r.shared:6} B shared  {'; '.join(bad)}".rstrip()
            )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
