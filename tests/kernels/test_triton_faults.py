"""What Triton kernels do with bad data and odd layouts: no access outside their tensors, results as
promised, neighbours unharmed.

The cases run in processes of their own under Triton's interpreter, in memory that ends the process
when it is touched out of range (guarded_memory.py).
"""

import json
import signal
from pathlib import Path

import pytest
import torch
import triton.language as tl

from tests.cases.faults import OPERATIONS, assert_promised
from tests.kernels.guarded_memory import SIDES
from tests.run_python import run_python

from rlhf_kernels.kernels.triton._launch import INTERPRETED, kernel, launch
from rlhf_kernels.kernels.triton._tiles import tile_bounds

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="guards memory of the interpreter")

SCRIPT = ("-m", "tests.kernels.triton_faults")
ROOT = str(Path(__file__).parents[2])


def run_cases(*arguments, **variables):
    return run_python(
        *SCRIPT, *map(str, arguments), TRITON_INTERPRET="1", PYTHONPATH=ROOT, **variables
    )


@pytest.mark.parametrize("operation", OPERATIONS)
def test_bad_data_and_layouts(operation, tmp_path):
    file = tmp_path / "results"
    run_cases(operation, file)
    sides = torch.load(file, weights_only=True)
    cases = list(OPERATIONS[operation]())
    assert len(cases) > 10 and len({case.name for case in cases}) == len(cases)
    assert list(sides) == list(SIDES)
    for results in sides.values():
        for case in cases:
            try:
                assert_promised(case, results[case.name], sides[SIDES[0]][case.like])
            except AssertionError as error:
                raise AssertionError(f"{operation}, {case.name}: {error}") from error
        for name, tensors in results.items():
            if name.endswith("clean"):
                assert all((t != 0).any() for t in tensors), name


def test_checks_name_position_and_value():
    found = json.loads(run_cases("--errors", RLHF_KERNELS_CHECK="1").stdout)
    assert list(found) == list(OPERATIONS)
    for operation, cases in OPERATIONS.items():
        for case in cases():
            if case.error:
                assert case.error in found[operation][case.name], (operation, case.name)
    assert (
        "label at flat position 2 is -1;"
        in found["token_logprobs"]["small label -1 torch.int64 in row 2"]
    )


@pytest.mark.parametrize(("read", "write"), [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)])
def test_the_guard_sees_one_element_too_far(read, write):
    if (read, write) == (0, 0):
        run_cases("--bad-kernel", read, write)
        return
    with pytest.raises(AssertionError, match=rf"exit status -{signal.SIGSEGV}|wrote outside"):
        run_cases("--bad-kernel", read, write)


@kernel
def bounds_kernel(out, tile, size, UNIT: tl.constexpr, TILE: tl.constexpr):
    first, count = tile_bounds(tile, size, UNIT, TILE)
    tl.store(out, first)
    tl.store(out + 1, count.to(tl.int64))


@pytest.mark.parametrize("size", [1, 4096, 4099, 2**31 - 1, 2**31 + 5, 2**33 + 8, 2**35])
@pytest.mark.parametrize("unit", [1, 8])
def test_tiles_of_any_size(size, unit):
    # In 32 bits the last columns of a vocabulary near 2^31 would be negative, and so inside.
    tile, units = 4096, -(-size // unit)
    for last in {0, (units * unit - 1) // tile}:
        out = torch.zeros(2, dtype=torch.int64)
        launch(bounds_kernel, 1, out, out, last, units, UNIT=unit, TILE=tile, warps=1)
        assert out.tolist() == [last * tile, min(units * unit - last * tile, tile)]
