"""Bad data and odd layouts for every operation that a GPU kernel must survive.

`python -m tests.kernels.gpu_faults --device cuda --backend triton` runs them all: what
compute-sanitizer watches, since a wrong read need not show in any result. test_gpu.py holds that
each fault poisons and raises.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.cases.faults import OPERATIONS, Case
from tests.cases.layouts import layouts

from rlhf_kernels.kernels import backends, triton
from rlhf_kernels.ops._examples import EXAMPLES, Inputs, gradients, tensors

#: (operation, case) of data that RLHF_KERNELS_CHECK=1 refuses.
FAULTS = [(op, case) for op, cases in OPERATIONS.items() for case in cases() if case.error]


def results(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """The results of a case on a device that is no default while the operation runs."""
    with device:
        given = case.make()
    return case.run(**given)[case.part]


def examples(device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every operation with its kernels, forward and backward: ragged, and in odd layouts."""
    for function, example in EXAMPLES.items():
        if function.__name__ not in triton.launchers():
            continue
        for rows, size, dtype in ((1, 1, torch.float32), (5, 1031, torch.bfloat16)):
            inputs = Inputs(rows, size, dtype, device, torch.Generator().manual_seed(1))
            arguments, options = example(inputs)
            for i in range(4):
                views = [_layout(a, i) for a in arguments]

                def call(f: Any = function, a: Any = views, o: Any = options) -> list[Tensor]:
                    results = list(tensors(f(*a, **o)))
                    return results + gradients(results, (a, o))

                yield f"{function.__name__} {rows}x{size} layout {i}", call


def _layout(value: Any, index: int) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    _, view = list(layouts(value))[index]
    return view.requires_grad_(value.requires_grad)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="triton", choices=("cuda", "triton"))
    parser.add_argument(
        "--every", type=int, default=1, help="each so many-th fault and layout alone"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    with backends.use_backend(options.backend):
        has = backends.get(options.backend).launchers
        faults = [case for op, case in FAULTS if op in has][:: options.every]
        for case in faults:
            results(case, device)
        calls = [(n, c) for n, c in examples(device) if n.split()[0] in has][:: options.every]
        for _, call in calls:
            call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    print(f"{len(faults)} faults, {len(calls)} layouts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
