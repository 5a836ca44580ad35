"""Checks the machine code of csrc/cuda's main kernels against `tools/cuda_budgets.py`.

    python -m tools.cuda_sass              # every kernel of the table, sm_90 and sm_100
    python -m tools.cuda_sass --report benchmarks/results/cuda-sass.md --date 2026-01-31

The fast path of a kernel is the cheapest path from entry to end that executes the operations in the
table (so many exponentials, loads and stores). The figures of this path are instructions per
element or token, widths of global loads and stores, bytes of loads in flight, and waits for memory.
The disassembler comes with triton. No GPU is needed, and nothing is measured.
"""

import argparse
import sys
from dataclasses import dataclass

from tools import cuda_budgets, cuda_code, cuda_resources, head_traffic
from tools.cuda_budgets import Budget
from tools.tables import options_of_report, table

ARCHS = (90, 100)
# The architectures of cuda_resources, so that both gates share one compilation.
COMPILED = (80, 90, 100)
# Limits of a multiprocessor of sm_90 and sm_100.
MAX_THREADS, MAX_BLOCKS = 2048, 32
SHARED = 227 << 10


@dataclass(frozen=True)
class Figures:
    """Figures of a kernel's fast path, per unit (logit, pair or token), with padding of tiles."""

    instructions: float
    exponentials: float
    loads: dict[int, int]
    stores: dict[int, int]
    # KiB of loads in flight on a multiprocessor, and how often a thread waits for loads.
    in_flight: float
    waits: int
    registers: int
    blocks: int
    spills: int

    def problems(self, budget: Budget, arch: int) -> list[str]:
        """The figures that exceed `budget`."""
        limit = budget.limits(arch)
        found = []
        if self.instructions > limit.instructions:
            found.append(f"{self.instructions:.2f} instructions per {budget.unit}")
        if self.registers > limit.registers:
            found.append(f"{self.registers} registers")
        if self.in_flight < limit.in_flight:
            found.append(f"{self.in_flight:g} KiB of loads in flight")
        if self.waits > limit.waits:
            found.append(f"{self.waits} waits for memory")
        for kind, widths in (("loads", self.loads), ("stores", self.stores)):
            narrow = sum(n for width, n in widths.items() if width < 16)
            if narrow > getattr(limit, f"narrow_{kind}"):
                found.append(f"{narrow} {kind} of less than 16 bytes")
        if self.spills:
            found.append(f"{self.spills} bytes of spills")
        return [f"{budget.name}, sm_{arch}: {p}, beyond its {limit}" for p in found]


def blocks_per_multiprocessor(registers: int, shared: int, threads: int) -> int:
    """Blocks per multiprocessor of sm_90 and sm_100, by registers, shared memory and threads."""
    by_registers = cuda_resources.REGISTERS // (-(-registers // 8) * 8 * threads)
    by_shared = SHARED // (shared + cuda_resources.SYSTEM_SHARED)
    return min(by_registers, by_shared, MAX_THREADS // threads, MAX_BLOCKS)


def figures(budget: Budget, arch: int) -> Figures:
    """The figures of a kernel of the table; compiles its file if necessary. Raises LookupError if
    the file has no such kernel, or the kernel has no such path."""
    source = cuda_resources.ROOT / "csrc" / "cuda" / budget.file
    found, compiled = cuda_resources.compiled(source, COMPILED)
    needs = [r for r in found if r.kernel == budget.kernel and r.arch == arch]
    code = cuda_code.functions(compiled, arch).get(budget.kernel)
    if code is None or len(needs) != 1:
        raise LookupError(f"{budget.file} has no kernel {budget.kernel} for sm_{arch}")
    search = cuda_code.loop_path if budget.loop else cuda_code.fast_path
    path = search(code, budget.holds)
    share = budget.waste / budget.units
    most, waits = cuda_code.memory(path)
    blocks = blocks_per_multiprocessor(needs[0].registers, needs[0].shared, budget.threads)
    return Figures(
        instructions=len(path) * share,
        exponentials=sum(x.operation.startswith("MUFU") for x in path) * share,
        loads=cuda_code.widths(path, "LDG"),
        stores=cuda_code.widths(path, "STG"),
        in_flight=most * budget.threads * blocks / 1024,
        waits=waits,
        registers=needs[0].registers,
        blocks=blocks,
        spills=needs[0].spills,
    )


@dataclass(frozen=True)
class Gpu:
    """A GPU: multiprocessors, clock in GHz and copy rate in TB/s."""

    name: str
    arch: int
    multiprocessors: int
    clock: float
    copy: float


# The copy rates of the first two are measured; the third is nine tenths of the data sheet's.
GPUS = (
    Gpu("H100", 90, 132, 1.755, 3.0),
    Gpu("H200", 90, 132, 1.755, 4.3),
    Gpu("B200", 100, 148, 1.85, 7.2),
)
# Instructions per clock of a multiprocessor: in total, and exponentials.
ISSUED, EXPONENTIALS = 128, 16


def bounds(f: Figures, budget: Budget, gpu: Gpu) -> tuple[float, float, float]:
    """The TB/s that instructions and exponentials allow, and the lower one as a share of the copy
    rate. These are bounds, not measurements: latency and contention reduce them."""
    clocks = gpu.multiprocessors * gpu.clock * 1e9 * budget.traffic / 1e12
    issue = clocks * ISSUED / f.instructions
    # Exponentials of a thread's preamble are too few to be a bound.
    few = f.exponentials < 0.5
    exponentials = float("inf") if few else clocks * EXPONENTIALS / f.exponentials
    return issue, exponentials, min(1.0, issue / gpu.copy, exponentials / gpu.copy)


def markdown(found: dict[tuple[str, int], Figures], date: str) -> str:
    """The figures of every kernel, and the rates that they allow on each GPU."""
    budgets = {b.name: b for b in cuda_budgets.BUDGETS}
    lines = [
        "# Machine code of the CUDA kernels",
        "",
        f"Read from what nvcc compiled on {date}, by `make cuda-report`; nothing was measured.",
        "The fast path of each kernel, padding of tiles included. KiB: loads in flight on a",
        "multiprocessor. Waits: times that a thread waits for loads. Narrow: loads and stores of",
        "less than 16 bytes. Instructions and exponentials (MUFU) are per unit.",
        "",
    ]
    head = ("kernel", "target", "unit", "issued", "MUFU", "registers", "blocks", "KiB", "waits")
    rows = []
    for (name, arch), f in found.items():
        narrow = (sum(n for w, n in kind.items() if w < 16) for kind in (f.loads, f.stores))
        cells = [name, f"sm_{arch}", budgets[name].unit, f"{f.instructions:.2f}"]
        cells += [f"{f.exponentials:.2f}", f.registers, f.blocks, f"{f.in_flight:.0f}", f.waits]
        rows.append([*map(str, cells), " + ".join(map(str, narrow))])
    lines += [
        *table((*head, "narrow"), rows, left=3),
        "",
        "What instructions and exponentials (MUFU) allow, in TB/s, and the least of these and of a",
        "copy as a share of the copy: " + ", ".join(f"{g.name} {g.copy} TB/s" for g in GPUS) + ".",
        "Latency and contention come on top.",
        "",
    ]
    head = ("kernel", *(cell for g in GPUS for cell in (f"{g.name}: issue", "MUFU", "share")))
    rows = []
    for name, budget in budgets.items():
        if budget.traffic == 0:
            continue
        cells = [name]
        for gpu in GPUS:
            issue, exponentials, share = bounds(found[name, gpu.arch], budget, gpu)
            cells += [f"{issue:.1f}", f"{exponentials:.1f}".replace("inf", "-"), f"{share:.0%}"]
        rows.append(cells)
    return "\n".join([*lines, *table(head, rows)]) + "\n" + head_traffic.markdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    options = options_of_report(parser)
    found = {
        (budget.name, arch): figures(budget, arch)
        for budget in cuda_budgets.BUDGETS
        for arch in ARCHS
    }
    print(
        f"{'kernel':47} {'':6} {'instr':>6} {'MUFU':>5} {'reg':>4} {'blk':>4} {'KiB':>5} "
        "wait  loads, stores by width"
    )
    problems = []
    for budget in cuda_budgets.BUDGETS:
        for arch in ARCHS:
            f = found[budget.name, arch]
            problems += f.problems(budget, arch)
            print(
                f"{budget.name:47} sm_{arch:<3} {f.instructions:6.2f} {f.exponentials:5.2f} "
                f"{f.registers:4} {f.blocks:4} {f.in_flight:5.0f} {f.waits:4}  {f.loads} {f.stores}"
            )
    if options.report:
        options.report.write_text(markdown(found, options.date))
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
