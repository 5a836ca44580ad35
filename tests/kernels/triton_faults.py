"""Faults for the Triton kernels, in guarded memory. Run by test_triton_faults.py:

python -m tests.kernels.triton_faults OPERATION FILE saves the results of its cases, from both sides
of the guard; `--errors` prints as JSON what RLHF_KERNELS_CHECK=1 raises, for all operations;
`--bad-kernel READ WRITE` copies with offsets that lie outside the tensors unless both are 0.
"""

import argparse
import json

import torch
import triton.language as tl
from torch import Tensor

from tests.cases.faults import OPERATIONS
from tests.kernels.guarded_memory import SIDES, GuardedMemory
from tests.kernels.quick_interpreter import quicken

import rlhf_kernels as rk
from rlhf_kernels.kernels.triton import _tokens, advantages, policy_backward
from rlhf_kernels.kernels.triton._launch import kernel, launch


def results(operation: str) -> dict[str, dict[str, list[Tensor]]]:
    """Results of every case, by side of the guard and by name."""
    found: dict[str, dict[str, list[Tensor]]] = {}
    for side in SIDES:
        found[side] = {}
        for case in OPERATIONS[operation]():
            with GuardedMemory(side) as memory:
                tensors = [t.detach() for t in case.call()]
            memory.check()
            found[side][case.name] = [t.clone() for t in tensors]
    return found


def errors() -> dict[str, dict[str, str]]:
    """Type and text of what the bad cases raise, by operation and name."""
    found: dict[str, dict[str, str]] = {}
    for operation, cases in OPERATIONS.items():
        found[operation] = {}
        for case in cases():
            if case.error:
                try:
                    case.call()
                    found[operation][case.name] = "nothing"
                except (IndexError, ValueError) as error:
                    found[operation][case.name] = f"{type(error).__name__}: {error}"
    return found


@kernel
def copy_kernel(x, out, n, read, write, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i + write, tl.load(x + i + read, mask=i < n, other=0.0), mask=i < n)


def bad_kernel(read: int, write: int) -> None:
    for side in SIDES:
        with GuardedMemory(side) as memory:
            x, out = torch.ones(100), torch.empty(100)
            launch(copy_kernel, 1, x, x, out, 100, read, write, BLOCK=128, warps=1)
            memory.check()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operation", nargs="?", choices=OPERATIONS)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--errors", action="store_true")
    parser.add_argument("--bad-kernel", type=int, nargs=2)
    options = parser.parse_args()
    if options.bad_kernel:
        bad_kernel(*options.bad_kernel)
    quicken()
    # As small as the interpreter's tiles of the scans, so that sequences here have several.
    _tokens.TILE = policy_backward.TILE = advantages.TILE
    with rk.use_backend("triton"):
        if options.operation:
            torch.save(results(options.operation), options.file)
        if options.errors:
            print(json.dumps(errors()))


if __name__ == "__main__":
    main()
