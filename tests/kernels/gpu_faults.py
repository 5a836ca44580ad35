"""Bad data and odd layouts for every operation that a GPU kernel must survive.

`python -m tests.kernels.gpu_faults --device cuda --backend triton` runs them all: what
compute-sanitizer watches, since a wrong read need not show in any result. test_gpu.py holds that
each fault poisons and raises.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels.kernels import backends, triton
from rlhf_kernels.ops._examples import EXAMPLES, Inputs, gradients, tensors


class Fault(NamedTuple):
    """A call with bad data: NaN in its first result, or `error` with RLHF_KERNELS_CHECK=1."""

    name: str
    operation: str
    error: type[Exception]
    call: Callable[[torch.device], Any]


def _tokens(device: torch.device, *shape: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return values.to(device).requires_grad_()


def _labels(bad: int) -> Callable[[torch.device], Any]:
    def call(device: torch.device) -> Any:
        labels = torch.tensor([1, bad, 3], device=device)
        return rk.token_logprobs(_tokens(device, 3, 9001), labels, entropy=True)

    return call


def _temperature(bad: float) -> Callable[[torch.device], Any]:
    def call(device: torch.device) -> Any:
        temperature = torch.tensor([1.0, bad, 2.0], device=device)
        labels = torch.tensor([1, 0, 3], device=device)
        return rk.token_logprobs(_tokens(device, 3, 500), labels, temperature=temperature)

    return call


# 300 tokens in three sequences, each list wrong in its own way.
_OFFSETS = {
    "late start": [7, 100, 200, 300],
    "early end": [0, 100, 200, 290],
    "beyond the end": [0, 100, 200, 100_000],
    "falling": [0, 200, 100, 300],
    "negative": [0, -5, 200, 300],
    "huge": [0, 2**40, 200, 300],
}


def _packed(operation: str, offsets: list[int]) -> Callable[[torch.device], Any]:
    def call(device: torch.device) -> Any:
        cu = torch.tensor(offsets, device=device)
        x = [_tokens(device, 300) for _ in range(4)]
        mask = torch.ones(300, dtype=torch.bool, device=device)
        arguments = {
            "gae": (x[0], x[1]),
            "discounted_returns": (x[0],),
            "ppo_advantages": (_tokens(device, 3), x[0], x[1], x[2], mask),
            "policy_loss": (x[0], x[1].detach(), x[2].detach(), mask),
            "value_loss": (x[0], x[1].detach(), x[2].detach(), mask),
        }
        return getattr(rk, operation)(*arguments[operation], cu_seqlens=cu)

    return call


def _normalizer(operation: str, bad: float) -> Callable[[torch.device], Any]:
    def call(device: torch.device) -> Any:
        x = [_tokens(device, 3, 50) for _ in range(3)]
        mask = torch.ones(3, 50, dtype=torch.bool, device=device)
        normalizer = torch.tensor(bad, device=device)
        return getattr(rk, operation)(
            x[0], x[1].detach(), x[2].detach(), mask, normalizer=normalizer
        )

    return call


def _faults() -> Iterator[Fault]:
    for bad in (9001, -1, 2**31, 2**40, -(2**40)):
        yield Fault(f"label {bad}", "token_logprobs", IndexError, _labels(bad))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        yield Fault(f"temperature {bad}", "token_logprobs", ValueError, _temperature(bad))
    for operation in ("gae", "discounted_returns", "ppo_advantages", "policy_loss", "value_loss"):
        for name, offsets in _OFFSETS.items():
            yield Fault(f"offsets {name}", operation, ValueError, _packed(operation, offsets))
    for operation in ("policy_loss", "value_loss"):
        for bad in (0.0, -2.0, float("nan"), float("inf")):
            call = _normalizer(operation, bad)
            yield Fault(f"normalizer {bad}", operation, ValueError, call)


FAULTS = [f for f in _faults() if f.operation in triton.launchers()]


def odd_layouts(t: Tensor) -> Iterator[Tensor]:
    """The values of `t` behind other addresses and strides; two layouts, four of a matrix."""
    *lead, n = t.shape
    # One element behind an aligned address.
    yield t.new_full((t.numel() + 1,), 7)[1:].view(t.shape).copy_(t)
    if t.dim() > 1:
        yield t.new_full((*lead, n + 3), 7)[..., 2 : 2 + n].copy_(t)
        yield t.transpose(0, -1).contiguous().transpose(0, -1)
    yield t.new_full((*lead, 2 * n + 1), 7)[..., 1::2].copy_(t)


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
    views = list(odd_layouts(value.detach()))
    return views[index % len(views)].requires_grad_(value.requires_grad)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="triton", choices=("cuda", "triton"))
    options = parser.parse_args()
    device = torch.device(options.device)
    with backends.use_backend(options.backend):
        has = backends.get(options.backend).launchers
        faults = [f for f in FAULTS if f.operation in has]
        for fault in faults:
            outputs = [t.sum() for t in tensors(fault.call(device)) if t.requires_grad]
            if outputs:
                torch.stack(outputs).sum().backward()
        calls = [(n, c) for n, c in examples(device) if n.split()[0] in has]
        for _, call in calls:
            call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    print(f"{len(faults)} faults, {len(calls)} layouts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
