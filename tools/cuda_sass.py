"""Checks the machine code of csrc/cuda's main kernels against `tools/cuda_budgets.py`.

    python -m tools.cuda_sass              # every kernel of the table, sm_90 and sm_100
    python -m tools.cuda_sass --report benchmarks/results/cuda-sass.md --date 2026-01-31

The fast path of a kernel is the cheapest path from entry to end that executes the operations in the
table (so many exponentials, loads and stores). The figures of this path are instructions per
element or token, widths of global loads and stores, bytes of loads in flight, and waits for memory.
The disassembler comes with triton. No GPU is needed, and nothing is measured.
"""

import argparse
import functools
import heapq
import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tools import cuda_budgets, cuda_resources, head_traffic
from tools.cuda_budgets import Budget
from tools.tables import options_of_report, table

ARCHS = (90, 100)
# The architectures of cuda_resources, so that both gates share one compilation.
COMPILED = (80, 90, 100)
# Limits of a multiprocessor of sm_90 and sm_100.
MAX_THREADS, MAX_BLOCKS = 2048, 32
SHARED = 227 << 10
# Slow code paths of compilers contain subroutine calls and shuffles of diverged warps. The search
# for a path adds the cost SLOW to a block that contains one.
SLOW_WAYS = ("CALL", "WARPSYNC.COLLECTIVE")
SLOW = 1000


def disassembler() -> Path | None:
    """The cuobjdump that comes with triton."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return None
    tool = Path(found.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return tool if tool.exists() else None


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str

    @functools.cached_property
    def operation(self) -> str:
        """The operation without predicate and operands, as in LDG.E.128."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]

    @functools.cached_property
    def unconditional(self) -> bool:
        """Whether control never passes to the next instruction. A branch may have its condition as
        an operand, or branch on divergence of the warp."""
        if re.match(r"@!?U?P(?!T)\w", self.text):
            return False
        return not re.search(r"\bBRA(\.\w+)*\s+!?U?P\d|\bBRA\.(DIV|CONV)", self.text)

    @functools.cached_property
    def width(self) -> int:
        """Bytes per thread of a load or store."""
        parts = self.operation.split(".")
        sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1}
        return next((size for part, size in sizes.items() if part in parts), 4)

    @functools.cached_property
    def registers(self) -> tuple[list[int], list[int]]:
        """The general registers that it writes and reads. Wide operands are known of loads, stores
        and addresses; of others only the first register is."""
        operands = re.sub(r"^(@\S+\s+)?\S+\s*", "", self.text).split(",")
        stores = self.operation.startswith(("ST", "RED"))
        write: list[int] = []
        if not stores and (match := re.fullmatch(r"\s*R(\d+)(\.\w+)?\s*", operands[0])):
            count = max(1, self.width // 4) if self.operation.startswith("LD") else 1
            write = [int(match[1]) + i for i in range(count)]
            operands = operands[1:]
        read = []
        for operand in operands:
            for number, pair in re.findall(r"\bR(\d+)\b(\.64)?", operand):
                value = stores and "[" not in operand
                count = max(1, self.width // 4) if value else 2 if pair else 1
                read += [int(number) + i for i in range(count)]
        return write, read


@dataclass(frozen=True)
class Block:
    """A basic block, and the blocks that may follow it."""

    body: tuple[Instruction, ...]
    after: tuple[int, ...]


_FUNCTION = re.compile(r"Function : (\S+)")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")


@functools.cache
def functions(compiled: Path, arch: int) -> dict[str, list[Instruction]]:
    """The kernels of an object file by their short C++ name."""
    tool = disassembler()
    path = f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    text = subprocess.run(
        [str(tool), "-sass", "-arch", f"sm_{arch}", str(compiled)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PATH": path},
    ).stdout
    found = listing(text)
    names = cuda_resources.short_names(list(found))
    if len(set(names)) != len(names):
        raise ValueError(f"kernels of {compiled.name} share a name: {sorted(names)}")
    return dict(zip(names, found.values(), strict=True))


def listing(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each function in cuobjdump's text."""
    found: dict[str, list[Instruction]] = {}
    current = None
    for line in text.splitlines():
        if match := _FUNCTION.search(line):
            current = found.setdefault(match[1], [])
        elif (match := _INSTRUCTION.match(line)) and current is not None:
            current.append(Instruction(int(match[1], 16), match[2]))
    return found


def flow(code: list[Instruction]) -> list[Block]:
    """The control-flow graph of a kernel, without the subroutines that it calls."""
    place = {x.address: i for i, x in enumerate(code)}
    targets = {
        i: [
            place[int(t, 16)] for t in re.findall(r"0x([0-9a-f]+)\b", x.text) if int(t, 16) in place
        ]
        for i, x in enumerate(code)
        if x.operation.startswith("BRA")
    }
    ends = ("BRA", "EXIT", "RET", "BRX")
    starts = {0} | {t for found in targets.values() for t in found}
    starts |= {i + 1 for i, x in enumerate(code[:-1]) if x.operation.startswith(ends)}
    edges = [*sorted(starts), len(code)]
    number = {start: i for i, start in enumerate(edges[:-1])}
    blocks = []
    for i, (begin, end) in enumerate(pairwise(edges)):
        last = code[end - 1]
        after = [number[t] for t in targets.get(end - 1, [])]
        leaves = last.operation.startswith(ends) and last.unconditional
        if not leaves and end < len(code):
            after.append(i + 1)
        blocks.append(Block(tuple(code[begin:end]), tuple(after)))
    return blocks


def _without_loops(blocks: list[Block]) -> tuple[list[tuple[int, ...]], list[tuple[int, int]]]:
    """The edges of each block without back edges, so that a loop runs once; and the back edges."""
    state = [0] * len(blocks)
    kept: list[list[int]] = [[] for _ in blocks]
    back = []
    stack = [(0, iter(blocks[0].after))]
    state[0] = 1
    while stack:
        block, rest = stack[-1]
        following = next(rest, None)
        if following is None:
            state[block] = 2
            stack.pop()
        elif state[following] == 1:
            back.append((block, following))
        else:
            kept[block].append(following)
            if state[following] == 0:
                state[following] = 1
                stack.append((following, iter(blocks[following].after)))
    return [tuple(k) for k in kept], back


def _cheapest(
    blocks: list[Block],
    edges: list[tuple[int, ...]],
    ends: tuple[int, set[int]],
    holds: dict[str, int],
) -> list[Instruction] | None:
    """The cheapest path from ends[0] to a block of ends[1] with the operations of `holds`."""
    prices = [
        len(b.body) + SLOW * any(x.operation.startswith(SLOW_WAYS) for x in b.body) for b in blocks
    ]
    patterns = [re.compile(p) for p in holds]
    wanted = tuple(holds.values())
    has = [tuple(sum(bool(p.match(x.operation)) for x in b.body) for p in patterns) for b in blocks]

    def met(before: tuple[int, ...], block: int) -> tuple[int, ...]:
        return tuple(min(w, m + h) for w, m, h in zip(wanted, before, has[block], strict=True))

    first, last = ends
    start = (first, met((0,) * len(wanted), first))
    cost, before = {start: prices[first]}, {}
    queue = [(cost[start], start)]
    while queue:
        spent, state = heapq.heappop(queue)
        block, found = state
        if spent > cost[state]:
            continue
        if block in last and found == wanted:
            path = [block]
            while state in before:
                state = before[state]
                path.append(state[0])
            return [x for b in reversed(path) for x in blocks[b].body]
        for following in edges[block]:
            new = (following, met(found, following))
            total = spent + prices[following]
            if total < cost.get(new, sys.maxsize):
                cost[new], before[new] = total, state
                heapq.heappush(queue, (total, new))
    return None


def fast_path(code: list[Instruction], holds: dict[str, int]) -> list[Instruction]:
    """The cheapest path from entry to end with at least holds[pattern] operations of each pattern.
    Raises LookupError if there is none."""
    blocks = flow(code)
    exits = {i for i, b in enumerate(blocks) if b.body[-1].operation.startswith("EXIT")}
    path = _cheapest(blocks, _without_loops(blocks)[0], (0, exits), holds)
    if path is None:
        raise LookupError(f"no path through the kernel holds {holds}")
    return path


def loop_path(code: list[Instruction], holds: dict[str, int]) -> list[Instruction]:
    """The cheapest iteration of a loop with at least holds[pattern] operations of each pattern.
    Raises LookupError if no loop has one."""
    blocks = flow(code)
    edges, back = _without_loops(blocks)
    found = [_cheapest(blocks, edges, (head, {tail}), holds) for tail, head in back]
    paths = [path for path in found if path is not None]
    if not paths:
        raise LookupError(f"no loop of the kernel holds {holds}")
    return min(paths, key=len)


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


def memory(path: list[Instruction]) -> tuple[int, int]:
    """The maximum bytes of loads in flight, and how often the path waits for loads. At the first
    use of a load, all earlier loads count as complete."""
    pending: set[int] = set()
    most = flying = waits = 0
    for x in path:
        write, read = x.registers
        if not pending.isdisjoint(read):
            pending, flying, waits = set(), 0, waits + 1
        if x.operation.startswith("LDG"):
            flying += x.width
            pending.update(write)
            most = max(most, flying)
        elif not x.text.startswith("@"):
            pending.difference_update(write)
    return most, waits


def _widths(path: list[Instruction], operation: str) -> dict[int, int]:
    return dict(sorted(Counter(x.width for x in path if x.operation.startswith(operation)).items()))


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
    code = functions(compiled, arch).get(budget.kernel)
    if code is None or len(needs) != 1:
        raise LookupError(f"{budget.file} has no kernel {budget.kernel} for sm_{arch}")
    path = (loop_path if budget.loop else fast_path)(code, budget.holds)
    share = budget.waste / budget.units
    most, waits = memory(path)
    blocks = blocks_per_multiprocessor(needs[0].registers, needs[0].shared, budget.threads)
    return Figures(
        instructions=len(path) * share,
        exponentials=sum(x.operation.startswith("MUFU") for x in path) * share,
        loads=_widths(path, "LDG"),
        stores=_widths(path, "STG"),
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
