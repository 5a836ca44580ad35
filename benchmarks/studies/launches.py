"""Counts the launches of each operation on a GPU, forward and backward.

    python -m benchmarks.studies.launches --device cuda --out launches.json

This needs a separate process, because a loaded profiler slows every later launch.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rlhf_kernels.ops._calls import OPERATIONS, Inputs, example, tensors

ROWS, SIZE = 64, 2048


def _activity(device: torch.device) -> ProfilerActivity:
    return ProfilerActivity.XPU if device.type == "xpu" else ProfilerActivity.CUDA


def launches(call: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """The kernels, copies and fills that `call` launches on the device, by name."""
    torch.accelerator.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, _activity(device)]) as profiled:
        call()
        torch.accelerator.synchronize(device)
    found: dict[str, int] = {}
    for event in profiled.events():
        # An annotated range is not a launch.
        if event.device_type.name != "CPU" and not getattr(event, "is_user_annotation", False):
            found[event.name] = found.get(event.name, 0) + 1
    return found


def of_operation(function: Callable[..., Any], device: torch.device) -> dict[str, Any]:
    """The launches of one operation, forward and backward."""
    inputs = Inputs(ROWS, SIZE, torch.float32, device, torch.Generator().manual_seed(0))
    call = example(function, inputs)
    leaves = [t for t in call.tensors.values() if t.requires_grad]

    def forward() -> list[Tensor]:
        return list(tensors(call.run()))

    outputs = [r for r in forward() if r.requires_grad]
    ones = [torch.ones_like(o) for o in outputs]

    def backward() -> None:
        torch.autograd.grad(outputs, leaves, ones, allow_unused=True, retain_graph=True)

    if outputs:
        backward()
    found = {"forward": launches(forward, device)}
    if outputs:
        found["backward"] = launches(backward, device)
    return {way: {"count": sum(names.values()), "names": names} for way, names in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device(args.device)
    report: dict[str, Any] = {"shape": [ROWS, SIZE], "operations": {}}
    # The first profile loads the profiler. If the second sees nothing, counting is impossible.
    probe = torch.ones(8, device=device)
    for _ in range(2):
        seen = launches(lambda: probe + 1, device) if device.type != "cpu" else {}
    if not seen:
        report["reason"] = "the profiler sees no device activity here"
    else:
        for function in OPERATIONS:
            report["operations"][function.__name__] = of_operation(function, device)
    args.out.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
