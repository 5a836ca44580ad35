"""The main CUDA kernels within the budgets of their machine code, and the tool that reads it."""

from dataclasses import replace
from pathlib import Path

import pytest

from tools import cuda_budgets, cuda_code, cuda_resources, cuda_sass

needs_tools = pytest.mark.skipif(
    cuda_resources.nvcc() is None or cuda_code.disassembler() is None,
    reason="needs nvcc and the disassembler of the triton package",
)
FILES = sorted({b.file for b in cuda_budgets.BUDGETS})


@needs_tools
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("arch", cuda_sass.ARCHS)
def test_kernels_keep_to_their_budgets(file, arch):
    own = [b for b in cuda_budgets.BUDGETS if b.file == file]
    assert [p for b in own for p in cuda_sass.figures(b, arch).problems(b, arch)] == []


def code(text: str) -> list[cuda_code.Instruction]:
    """Instructions of 16 bytes, one a line."""
    return [
        cuda_code.Instruction(16 * i, line.strip())
        for i, line in enumerate(text.strip().split("\n"))
    ]


# Two ways to the end; a loop back to the second block; a branch with its condition as an operand.
BRANCHES = code("""
    ISETP.NE.AND P0, PT, R0, RZ, PT
    @P0 BRA 0x60
    LDG.E.U16 R2, desc[UR4][R4.64]
    FADD R2, R2, R2
    @P1 BRA 0x20
    EXIT
    LDG.E.128 R8, desc[UR4][R4.64]
    MUFU.EX2 R8, R8
    FADD R8, R8, R9
    BRA.U UP0, 0x50
    @!P2 MUFU.EX2 R9, R9
    BRA 0x50
""")


@pytest.mark.parametrize(
    "holds,addresses",
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({r"LDG\.E\.U16": 1}, [0, 1, 2, 3, 4, 5]),
        ({"MUFU": 1}, [0, 1, 6, 7, 8, 9, 5]),
        ({"MUFU": 2}, [0, 1, 6, 7, 8, 9, 10, 11, 5]),
        # By its operands too.
        ({r"LDG\.E\.\w+ R8, desc\S*\[R4\.64\]": 1}, [0, 1, 6, 7, 8, 9, 5]),
        ({r"MUFU\.EX2 R9": 1}, [0, 1, 6, 7, 8, 9, 10, 11, 5]),
    ],
)
def test_the_fast_path_is_the_cheapest_that_holds_what_it_must(holds, addresses):
    path = cuda_code.fast_path(BRANCHES, holds)
    assert [x.address // 16 for x in path] == addresses


def test_the_cheapest_iteration_of_a_loop():
    path = cuda_code.loop_path(BRANCHES, {r"LDG\.E\.U16": 1})
    assert [x.address // 16 for x in path] == [2, 3, 4]
    # The exponentials are outside the loop.
    with pytest.raises(LookupError, match="no loop"):
        cuda_code.loop_path(BRANCHES, {"MUFU": 1})


# The short way calls a subroutine; a shuffle has another one for a warp that has parted.
WAYS = code("""
    @!P0 BRA 0x40
    CALL.REL.NOINC 0x100
    EXIT
    NOP
    BRA.DIV UR4, 0x90
    SHFL.DOWN PT, R2, R2, 0x1, 0x1f
    FADD R2, R2, R2
    FADD R2, R2, R2
    EXIT
    WARPSYNC.COLLECTIVE R4, 0xb0
    SHFL.DOWN PT, R2, R2, 0x1, 0x1f
    BRA 0x80
""")


def test_slow_ways_are_not_the_fast_path():
    path = cuda_code.fast_path(WAYS, {})
    assert [x.address // 16 for x in path] == [0, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("holds", [{r"LDG\.E\.U16": 2}, {"LDG": 2}, {"STG": 1}])
def test_a_path_that_is_not_there_is_an_error(holds):
    # A loop counts once: it cannot make up for what the path lacks.
    with pytest.raises(LookupError, match="no path"):
        cuda_code.fast_path(BRANCHES, holds)


TOGETHER = code("""
    LDG.E.U8 R2, desc[UR4][R10.64]
    LDG.E.128 R4, desc[UR4][R10.64+0x10]
    ISETP.NE.AND P0, PT, R2, RZ, PT
    FADD R7, R7, R7
    EXIT
""")
ONE_BY_ONE = code("""
    LDG.E.U8 R2, desc[UR4][R10.64]
    ISETP.NE.AND P0, PT, R2, RZ, PT
    LDG.E.128 R4, desc[UR4][R10.64+0x10]
    FADD R7, R7, R7
    EXIT
""")
# The address of the second load is what the first one loaded.
CHAINED = code("""
    LDG.E.64 R2, desc[UR4][R10.64]
    LDG.E R4, desc[UR4][R2.64]
    STG.E.128 desc[UR4][R10.64], R4
    EXIT
""")


@pytest.mark.parametrize(
    "path,most,waits", [(TOGETHER, 17, 1), (ONE_BY_ONE, 16, 2), (CHAINED, 8, 2)]
)
def test_loads_that_wait_for_one_another_are_seen(path, most, waits):
    assert cuda_code.memory(path) == (most, waits)


def test_widths_of_loads_and_stores():
    assert cuda_code.widths(TOGETHER, "LDG") == {1: 1, 16: 1}
    assert cuda_code.widths(CHAINED, "STG") == {16: 1}
    sizes = [x.width for x in code("LDG.E.U16 R1\nLDG.E.64.CONSTANT R1\nSTG.E R1\nLDG.E.U8 R1")]
    assert sizes == [2, 8, 4, 1]


@pytest.mark.parametrize(
    "worse,said",
    [
        ({"instructions": 13.5}, "13.50 instructions per token"),
        ({"registers": 65}, "65 registers"),
        ({"in_flight": 95.0}, "95 KiB of loads in flight"),
        ({"waits": 3}, "3 waits for memory"),
        ({"stores": {4: 16}}, "16 stores of less than 16 bytes"),
        ({"loads": {2: 2, 16: 8}}, "2 loads of less than 16 bytes"),
        ({"spills": 4}, "4 bytes of spills"),
    ],
)
def test_a_kernel_over_its_budget_is_refused(worse, said):
    limit = cuda_budgets.Limit(13.4, 64, 96, 2, 1, 0)
    budget = cuda_budgets.Budget("x", "x.cu", "x", "token", 4, 0, {}, 2, limit, limit)
    at_limit = cuda_sass.Figures(13.4, 1.0, {1: 1, 16: 8}, {16: 4}, 96.0, 2, 64, 4, 0)
    assert at_limit.problems(budget, 90) == []
    [problem] = replace(at_limit, **worse).problems(budget, 90)
    assert said in problem


# The path of the first kernel of cuda_bad_kernels.cu, at its limit.
SUMS = cuda_budgets.Budget(
    "sums of rows", str(Path(__file__).parent / "cuda_bad_kernels.cu"), "good_kernel", "column", 4,
    0, {r"LDG\.E\.128": 4}, 4, *[cuda_budgets.Limit(12.5, 28, 128, 2, 4, 0)] * 2,
)  # fmt: skip


@needs_tools
@pytest.mark.parametrize("arch", cuda_sass.ARCHS)
@pytest.mark.parametrize(
    "kernel,said",
    [
        ("good", []),
        ("splitting", ["4 stores of less than 16 bytes"]),
        ("waiting", ["5 waits for memory", "KiB of loads in flight"]),
        ("dividing", ["instructions per column"]),
        ("spilling", ["bytes of spills"]),
    ],
)
def test_the_gate_refuses_bad_kernels(kernel, said, arch):
    budget = replace(SUMS, kernel=f"{kernel}_kernel")
    problems = cuda_sass.figures(budget, arch).problems(budget, arch)
    assert bool(problems) == bool(said)
    assert [s for s in said if not any(s in p for p in problems)] == []


def test_bounds_of_a_kernel():
    limit = cuda_budgets.Limit(8.0, 64, 96, 2, 1, 0)
    budget = cuda_budgets.Budget("x", "x.cu", "x", "logit", 4, 0, {}, 2, limit, limit)
    gpu = cuda_sass.Gpu("x", 90, 100, 1.5, 3.0)
    figures = cuda_sass.Figures(8.0, 2.0, {16: 8}, {16: 4}, 96.0, 2, 64, 4, 0)
    # 100 multiprocessors of 128 lanes: 19.2e12 instructions a second, an eighth of that in logits.
    assert cuda_sass.bounds(figures, budget, gpu) == pytest.approx((4.8, 2.4, 0.8))
    # Without exponentials these bind nothing; a copy is as fast as can be.
    figures = replace(figures, instructions=4.0, exponentials=0.0)
    assert cuda_sass.bounds(figures, budget, gpu) == pytest.approx((9.6, float("inf"), 1.0))


@pytest.mark.parametrize(
    "registers,shared,threads,blocks",
    [(79, 96, 256, 3), (64, 96, 256, 4), (64, 38208, 512, 2), (16, 0, 256, 8), (32, 120000, 64, 1)],
)
def test_blocks_of_a_multiprocessor(registers, shared, threads, blocks):
    assert cuda_sass.blocks_per_multiprocessor(registers, shared, threads) == blocks
