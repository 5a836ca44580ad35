"""Reads the machine code of CUDA kernels: instructions, blocks, the paths through them, and what a
path loads and stores. The disassembler comes with triton.
"""

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

from tools import cuda_resources

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
    def unpredicated(self) -> str:
        """The operation and its operands."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text)

    @functools.cached_property
    def operation(self) -> str:
        """The operation without predicate and operands, as in LDG.E.128."""
        return self.unpredicated.split()[0]

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
    has = [
        tuple(sum(bool(p.match(x.unpredicated)) for x in b.body) for p in patterns) for b in blocks
    ]

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


def widths(path: list[Instruction], operation: str) -> dict[int, int]:
    return dict(sorted(Counter(x.width for x in path if x.operation.startswith(operation)).items()))
