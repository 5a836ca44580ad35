"""Bad data and odd layouts for every operation that a GPU kernel must survive.

`python -m tests.kernels.gpu_faults --device cuda --backend triton` runs them all: what
compute-sanitizer watches, since a wrong read need not show in any result. test_gpu.py holds that
each fault poisons and raises.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from tests.cases.faults import OPERATIONS, Case
from tests.cases.layouts import layouts

import rlhf_kernels as rk
from rlhf_kernels.core.row_options import RowOptions
from rlhf_kernels.core.sentinels import SHARD_IGNORED
from rlhf_kernels.kernels import backends, triton
from rlhf_kernels.kernels.rows import TokenConstants
from rlhf_kernels.ops import _calls

#: (operation, case) of data that RLHF_KERNELS_CHECK=1 refuses.
FAULTS = [(op, case) for op, cases in OPERATIONS.items() for case in cases() if case.error]


def results(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """The results of a case on a device that is no default while the operation runs."""
    with device:
        given = case.make()
    return case.run(**given)[case.part]


def examples(device: torch.device) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """Every operation with its kernels, forward and backward: ragged, and in odd layouts."""
    for function in _calls.OPERATIONS:
        if function.__name__ not in triton.launchers():
            continue
        for rows, size, dtype in ((1, 1, torch.float32), (5, 1031, torch.bfloat16)):
            inputs = _calls.Inputs(rows, size, dtype, device, torch.Generator().manual_seed(1))
            call = _calls.example(function, inputs)
            for i in range(4):
                yield (
                    f"{call.op} {rows}x{size} layout {i}",
                    partial(_calls.results, _laid_out(call, i)),
                )


def _laid_out(call: _calls.Call, index: int) -> _calls.Call:
    views = {k: list(layouts(t))[index][1] for k, t in call.tensors.items() if t.dim()}
    return call._replace(tensors=call.tensors | views).requiring(*call.differentiable)


def large_rows(device: torch.device, backend: str) -> int:
    """Runs the one kernel of a head's large vocabularies on good, ignored and bad rows.

    Returns how often; 0 where the backend has no such kernel for this device.
    """
    rows, config = backends.get(backend).kernels.rows, rk.PolicyLossConfig.ppo(entropy_coef=0.1)
    options = RowOptions(1.0, 0.0, True, SHARD_IGNORED)
    runs = 0
    for vocab, gradient in ((20_011, torch.bfloat16), (50_257, torch.float32)):
        kernel = rows.policy_rows_for(device, vocab, options)
        if kernel is None:
            continue
        labels = torch.tensor([0, vocab - 1, SHARD_IGNORED, vocab, -1, 7], device=device)
        logits = torch.randn(len(labels), vocab, device=device)
        logits[-1] = -torch.inf
        constants = TokenConstants(*torch.randn(5, len(labels), device=device))
        out = logits if gradient == logits.dtype else torch.empty_like(logits, dtype=gradient)
        kernel(out, logits, labels, None, options, constants, config._codes, config._params)
        runs += 1
    return runs


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
    runs = large_rows(device, options.backend)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    print(f"{len(faults)} faults, {len(calls)} layouts, {runs} large vocabularies")
    return 0


if __name__ == "__main__":
    sys.exit(main())
