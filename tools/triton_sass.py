"""Counts the machine code of Triton kernels: ours beside others' of the libraries installed.

    python -m tools.triton_sass                                   # sm_90 and sm_100
    python -m tools.triton_sass --ours                            # without other libraries
    python -m tools.triton_sass --report benchmarks/results/triton-sass.md --date 2026-01-31

Each library's own function is called on bf16 rows of Qwen's vocabulary. What it would launch is
recorded and compiled by `tools.triton_aot`. The fast path is counted per logit as in
`tools.cuda_sass`: the whole path, with the padding of tiles, or an iteration if the kernel loops
over its row. Our kernels must keep to the limits of `tools.triton_points`: otherwise the exit
status is 1. No GPU is needed, and nothing is measured.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from tools import cuda_code, cuda_sass, triton_aot, triton_record
from tools.cuda_budgets import VOCABULARY
from tools.tables import options_of_report, table
from tools.triton_points import MODULES, POINTS, Point

ARCHS = (90, 100)


@dataclass(frozen=True)
class Figures:
    """Per unit of a fast path: instructions and exponentials; of a block: registers and warps."""

    instructions: float
    exponentials: float
    registers: int
    warps: int
    blocks: int
    # KiB of loads in flight on a multiprocessor.
    in_flight: float

    def problems(self, point: Point, arch: int) -> list[str]:
        """The figures that exceed the limit of a point."""
        if point.limit is None:
            return []
        issued, registers, in_flight = point.limit
        found = []
        if self.instructions > issued:
            found.append(f"{self.instructions:.2f} instructions per {point.unit}")
        if self.registers > registers:
            found.append(f"{self.registers} registers")
        if self.in_flight < in_flight:
            found.append(f"{self.in_flight:g} KiB of loads in flight")
        return [f"{point.name}, sm_{arch}: {text}, beyond {point.limit}" for text in found]


def installed(library: str) -> bool:
    return importlib.util.find_spec(MODULES[library]) is not None


def instructions(cubin: bytes) -> list[cuda_code.Instruction]:
    """The instructions of the one kernel in a cubin."""
    tool = cuda_code.disassembler()
    assert tool is not None  # triton compiled the cubin
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        text = subprocess.run(
            [str(tool), "-sass", file.name],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PATH": path},
        ).stdout
    (code,) = cuda_code.listing(text).values()
    return code


def figures(point: Point, arch: int) -> Figures:
    """The figures of a point on sm_90 or sm_100.

    Raises:
        LookupError: the call launches no such kernel, or its code has no such path.
    """
    target = triton_record.TARGETS[f"sm_{arch}"]
    recorder, _ = triton_record.record(target, [point.call()])
    chosen = [v for v in recorder.variants.values() if v.kernel == point.kernel]
    if len(chosen) != 1:
        found = sorted(v.kernel for v in recorder.variants.values())
        raise LookupError(f"expected one {point.kernel}, found {found}")
    names = list(chosen[0].signature)
    constants = {names[i]: v for (i, *at), v in chosen[0].constants.items() if not at}
    binary = triton_aot.binary_of(chosen[0], target)
    columns, warps = constants[point.columns], binary.metadata.num_warps
    # A thread's columns of one row.
    units = columns // (32 * warps)
    code = instructions(binary.asm["cubin"])
    path_of = cuda_code.loop_path if point.loops else cuda_code.fast_path
    exponentials = {r"MUFU\.EX2": units * point.exponentials} if point.exponentials else {}
    path = path_of(code, exponentials | dict(point.holds))
    # Tiles of tokens have no padding.
    tiled = 1.0 if point.unit == "token" else -(-VOCABULARY // columns) * columns / VOCABULARY
    share = tiled / units
    usage = triton_aot.cubin_usage(binary.asm["cubin"])
    blocks = triton_aot.nvidia_blocks(target, usage["REG"], warps, binary.metadata.shared)
    flying, _ = cuda_code.memory(path)
    return Figures(
        instructions=len(path) * share,
        exponentials=sum(x.operation.startswith("MUFU") for x in path) * share,
        registers=usage["REG"],
        warps=warps,
        blocks=blocks,
        in_flight=flying * 32 * warps * blocks / 1024,
    )


def bounds(point: Point, f: Figures, gpu: cuda_sass.Gpu) -> tuple[float, float]:
    """The TB/s that instructions and exponentials allow, and that as a share of a copy's."""
    clocks = gpu.multiprocessors * gpu.clock * 1e9 * point.traffic / 1e12
    rate = clocks * cuda_sass.ISSUED / f.instructions
    # Those of a thread's preamble are too few to be a bound.
    if point.exponentials:
        rate = min(rate, clocks * cuda_sass.EXPONENTIALS / f.exponentials)
    return rate, min(1.0, rate / gpu.copy)


def markdown(found: dict[tuple[Point, int], Figures], missing: list[str], date: str) -> str:
    """The figures of every point, and the rates that they allow."""
    head = ["operation", "library", "target", "issued", "MUFU", "registers", "warps", "blocks"]
    head += ["KiB", *(f"{g.name}: TB/s, share" for g in cuda_sass.GPUS)]
    rows = []
    for (point, arch), f in found.items():
        cells = [point.name, point.library, f"sm_{arch}", f"{f.instructions:.1f}"]
        cells += [f"{f.exponentials:.2f}", str(f.registers), str(f.warps), str(f.blocks)]
        cells.append(f"{f.in_flight:.0f}")
        for gpu in cuda_sass.GPUS:
            rate, share = bounds(point, f, gpu)
            cells.append(f"{rate:.1f}, {share:.0%}" if gpu.arch == arch else "-")
        rows.append(cells)
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("triton", "trl", "liger-kernel", "flash-attn")
        if importlib.util.find_spec(name.replace("-", "_"))
    )
    absent = f" Not installed: {', '.join(missing)}." if missing else ""
    return "\n".join(
        [
            "# Machine code of Triton kernels, ours and others'",
            "",
            f"Compiled on {date} by `make cuda-report` with {versions}.",
            f"Nothing was measured.{absent}",
            f"The logits are bf16, the vocabulary is {VOCABULARY:,}. Instructions and",
            "exponentials (MUFU) are per logit, for a divergence per pair, padding of tiles",
            "included, for losses and gae per fp32 token with a mask; if the kernel loops over its",
            "row, those of an iteration. KiB: loads in flight on a multiprocessor, in a loop those",
            "of an iteration. The rates are what instructions and exponentials allow, also as a",
            "share of a copy. Latency and barriers come on top.",
            "",
            *table(head, rows, left=3),
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ours", action="store_true", help="leave out other libraries")
    options = options_of_report(parser)
    missing = [name for name in MODULES if options.ours or not installed(name)]
    found = {
        (point, arch): figures(point, arch)
        for point in POINTS
        if not point.library.startswith(tuple(missing))
        for arch in ARCHS
    }
    text = markdown(found, missing, options.date or "a day not given")
    print(text)
    if options.report:
        options.report.write_text(text)
    problems = [text for (point, arch), f in found.items() for text in f.problems(point, arch)]
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
