"""Compiles every Triton kernel ahead of time, without a GPU, and checks its resources.

    python -m tools.triton_aot --target sm_90 --target gfx942 --json out.json
    python -m tools.triton_aot --report benchmarks/results/triton-resources.md --date 2026-01-31
    python -m tools.triton_aot --record --json launches.json

`triton_record` captures the kernels that the launchers would compile for the calls in
triton_calls.py. The distinct kernels are then compiled and checked by `problems`.

This is not a test itself: it needs a process without TRITON_INTERPRET (test_triton_gates.py).
"""

import argparse
import importlib
import json
import math
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from tools.tables import options_of_report, table
from tools.triton_record import (
    TARGETS,
    Target,
    Variant,
    brief,
    cover,
    kernels,
    package_modules,
    record,
)

#: Minimum resident blocks of a kernel on a multiprocessor (NVIDIA) or compute unit (AMD): with a
#: single block nothing hides the latency of its loads and barriers.
MIN_BLOCKS = 2
# The module that lists the calls.
CASES = "tests.kernels.triton_calls"
#: Bits of the widest load if rows are known to be aligned.
ALIGNED_LOAD = 128


@dataclass(frozen=True)
class Resources:
    """The resources of a compiled variant; `spills` counts bytes or registers, `local` bytes."""

    kernel: str
    target: str
    variant: str
    warps: int
    registers: int
    shared: int
    spills: int
    local: int
    barriers: int
    atomics: int
    load_bits: int
    store_bits: int
    blocks: int
    wide: bool

    def problems(self) -> list[str]:
        """Violations of the gate."""
        found = []
        if self.spills or self.local:
            found.append(f"{self.spills} spilled, {self.local} bytes of local memory")
        if self.atomics:
            found.append(f"{self.atomics} atomic operations, whose order is left to chance")
        if self.blocks < MIN_BLOCKS:
            found.append(
                f"{self.blocks} blocks a multiprocessor, expected {MIN_BLOCKS} "
                f"({self.registers} registers, {self.warps} warps, {self.shared} bytes shared)"
            )
        if self.wide and 0 < self.load_bits < ALIGNED_LOAD:
            found.append(f"loads of {self.load_bits} bits from aligned rows")
        return [f"{self.kernel} on {self.target}: {text} [{self.variant}]" for text in found]


def nvidia_blocks(target: Target, registers: int, warps: int, shared: int) -> int:
    # A warp gets registers in units of 256, from the quarter of the multiprocessor that runs it.
    a_warp = math.ceil(registers * 32 / 256) * 256
    held = min(target.warps, (1 << 14) // a_warp * 4)
    # The system reserves 1 KiB for each block.
    return min(held // warps, target.shared // (shared + 1024), 32)


def _amd_blocks(target: Target, registers: int, warps: int, shared: int) -> int:
    # A SIMD has 512 registers per lane, in units of 8, and at most 8 waves; there are four SIMDs.
    held = min(target.warps, 4 * (512 // (math.ceil(max(registers, 1) / 8) * 8)))
    return min(held // warps, target.shared // max(shared, 1), 16)


def _widest(assembly: str, pattern: str, bits: Callable[[re.Match], int]) -> int:
    return max((bits(m) for m in re.finditer(pattern, assembly)), default=0)


def _ptx_width(m: re.Match) -> int:
    return int(m[1] or 1) * int(m[2])


_AMD_WIDTHS = {"byte": 8, "ubyte": 8, "sbyte": 8, "short": 16, "ushort": 16, "sshort": 16}


def _amd_width(m: re.Match) -> int:
    return _AMD_WIDTHS.get(m[1]) or 32 * int(m[2] or 1)


def cubin_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and more of the kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    if usage.keys() != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return usage


def binary_of(variant: Variant, target: Target) -> Any:
    """What Triton's compiler makes of a variant; its cache on disk makes a repetition quick."""
    source = ASTSource(variant.function, variant.signature, variant.constants, variant.attributes)
    return triton.compile(source, target=target.gpu, options=variant.options)


def compiled(variant: Variant, name: str) -> Resources:
    """Compiles for the target `name`."""
    target = TARGETS[name]
    binary = binary_of(variant, target)
    warps, shared = binary.metadata.num_warps, binary.metadata.shared
    if target.gpu.backend == "cuda":
        text = binary.asm["ptx"]
        usage = cubin_usage(binary.asm["cubin"])
        # NVIDIA spills to the stack, so a frame of 0 bytes means no spills.
        registers, spills, local = usage["REG"], usage["STACK"], usage["LOCAL"]
        barriers = len(re.findall(r"\bbar(?:rier)?\.", text))
        atomics = len(re.findall(r"\b(?:atom|red)\.", text))
        width = r"\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b"
        load, store = (_widest(text, rf"\b{op}{width}", _ptx_width) for op in ("ld", "st"))
        blocks = nvidia_blocks(target, registers, warps, shared)
    else:
        text = binary.asm["amdgcn"]
        fields = dict(re.findall(r"^\s+(?:- )?\.(\w+):\s+(\d+)$", text, re.MULTILINE))
        count = {k: int(v) for k, v in fields.items()}
        registers, local = count["vgpr_count"], count["private_segment_fixed_size"]
        # Scalar registers spill into lanes of vector registers, which is no memory traffic.
        spills = count["vgpr_spill_count"]
        barriers = len(re.findall(r"\bs_barrier\b", text))
        atomics = len(re.findall(r"\b(?:global|buffer|flat|ds)_\w*(?:atomic|_rtn)", text))
        width = r"_((?:[us]?(?:byte|short))|dword(?:x(\d))?)\b"
        load, store = (
            _widest(text, rf"\b(?:global|buffer|flat)_{op}{width}", _amd_width)
            for op in ("load", "store")
        )
        blocks = _amd_blocks(target, registers, warps, shared)
    return Resources(
        variant.kernel, name, variant.label(), warps, registers, shared, spills, local, barriers,
        atomics, load, store, blocks, variant.rows_aligned(),
    )  # fmt: skip


# The forked worker processes inherit this list.
_jobs: list[tuple[Variant, str]] = []


def _run_job(index: int) -> Resources | str:
    variant, name = _jobs[index]
    try:
        return compiled(variant, name)
    except Exception as error:
        # A kernel that does not compile must not hide the results of others.
        text = f"{type(error).__name__}: {error}"
        return f"{variant.kernel} on {name}: does not compile: {text} [{variant.label()}]"


def compile_all(jobs: list[tuple[Variant, str]], processes: int) -> list[Resources | str]:
    """Compiles each (variant, target name), in order; gives a message for each that fails."""
    _jobs[:] = jobs
    if processes == 1:
        return [_run_job(i) for i in range(len(jobs))]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return pool.map(_run_job, range(len(jobs)), chunksize=4)


def report(results: list[Resources], date: str) -> str:
    """A Markdown table of the maxima over the variants of each kernel on each target."""
    lines = [
        "# What the Triton kernels need",
        "",
        f"Compiled ahead of time, without a GPU, by Triton {triton.__version__} on {date}: "
        f"{len(results)} variants (dtypes, options, alignment). The worst variant of each kernel.",
        "Written by `make triton-report`. The gate: no spills, no local memory, no atomics, at "
        f"least {MIN_BLOCKS} blocks a multiprocessor; {ALIGNED_LOAD}-bit loads from aligned rows.",
        "",
        "Blocks: how many a multiprocessor (compute unit) holds, by registers and shared memory. "
        "Loads and stores: bits of the widest instruction, over the variants.",
        "",
    ]
    head = ("kernel", "target", "variants", "warps", "registers", "shared B", "spills", "local B")
    head += ("blocks", "barriers", "load", "store")
    rows = []
    groups: dict[tuple[str, str], list[Resources]] = {}
    for r in results:
        groups.setdefault((r.kernel, r.target), []).append(r)
    order = list(TARGETS)
    for kernel, name in sorted(groups, key=lambda g: (g[0], order.index(g[1]))):
        group = groups[kernel, name]

        def worst(field: str, group: list[Resources] = group) -> int:
            return max(getattr(r, field) for r in group)

        cells = [kernel, name, len(group), *map(worst, ("warps", "registers", "shared", "spills"))]
        cells += [worst("local"), min(r.blocks for r in group), worst("barriers")]
        cells += [_range(r.load_bits for r in group), _range(r.store_bits for r in group)]
        rows.append([str(cell) for cell in cells])
    return "\n".join([*lines, *table(head, rows, left=2)]) + "\n"


def _range(values: Iterable[int]) -> str:
    values = sorted(set(values))
    return str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--cases", default=CASES, help="module that lists the calls")
    parser.add_argument("--full", action="store_true", help="the whole cross product of options")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--cover", action="store_true", help="each value of each argument once")
    group.add_argument("--brief", action="store_true", help="the largest variants of each dtype")
    parser.add_argument("--record", action="store_true", help="list the launches, compile nothing")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="where results go")
    options = options_of_report(parser)
    # Workers are forked, and a team of threads would not survive a fork.
    torch.set_num_threads(1)
    module = importlib.import_module(options.cases)
    modules = list(getattr(module, "MODULES", None) or package_modules())
    names = options.target or list(TARGETS)
    recorded = {}
    for name in names:
        # The JIT specialises by vendor, not by model, but every target is recorded.
        recorded[name], launches = record(TARGETS[name], module.cases(options.full))
    captured = {v.kernel for r in recorded.values() for v in r.variants.values()}
    output: dict[str, Any] = {
        "kernels": sorted(kernels(modules)),
        "captured": sorted(captured),
        "launches": launches,
        "variants": [(v.kernel, v.label()) for r in recorded.values() for v in r.variants.values()],
    }
    problems = [f"{kernel} is never launched" for kernel in kernels(modules) - captured]
    if not options.record:
        jobs = []
        choose = cover if options.cover else brief if options.brief else list
        for name, r in recorded.items():
            jobs += [(v, name) for v in choose(r.variants.values())]
        done = compile_all(jobs, options.processes)
        problems += [failure for failure in done if isinstance(failure, str)]
        results = [r for r in done if isinstance(r, Resources)]
        problems += [p for r in results for p in r.problems()]
        output["resources"] = [asdict(r) for r in results]
        if options.report:
            options.report.write_text(report(results, options.date))
        print(f"{len(results)} variants of {len(captured)} kernels compiled")
    output["problems"] = problems
    if options.json:
        options.json.write_text(json.dumps(output))
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    if platform.system() != "Linux":
        sys.exit("Triton compiles on Linux alone")
    sys.exit(main())
