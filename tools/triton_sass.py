"""Counts the machine code of Triton kernels: ours beside those of TRL and Liger, if installed.

    python -m tools.triton_sass                                   # sm_90 and sm_100
    python -m tools.triton_sass --ours                            # without TRL and Liger
    python -m tools.triton_sass --report benchmarks/results/triton-sass.md --date 2026-01-31

Each library's own function is called on bf16 rows of Qwen's vocabulary. What it would launch is
recorded and compiled by `tools.triton_aot`. The fast path is counted per logit as in
`tools.cuda_sass`: the whole path, with the padding of tiles, or an iteration if the kernel loops
over its row. Our kernels must keep to the limits of `POINTS`: otherwise the exit status is 1. No
GPU is needed, and nothing is measured.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tools import cuda_code, cuda_sass, triton_aot, triton_record
from tools.cuda_budgets import VOCABULARY
from tools.tables import options_of_report, table

import rlhf_kernels as rk

ARCHS = (90, 100)


@dataclass(frozen=True)
class Point:
    """A kernel that a library's call launches.

    `columns` names the constant that says how many columns of a row, or tokens, a program takes, or
    with `loops` an iteration of its loop; `traffic` are bytes read and written per unit. The path
    executes at least `exponentials` per unit, and what `holds` says of a thread.
    """

    name: str
    library: str
    kernel: str
    call: Callable[[], "Call"]
    columns: str
    loops: bool
    traffic: int
    unit: str = "logit"
    exponentials: int = 1
    holds: tuple[tuple[str, int], ...] = ()
    # Of our kernels: the most instructions per unit and registers, the least KiB in flight. A limit
    # is tightened when its kernel gets better, and never widened to pass.
    limit: tuple[float, int, float] | None = None


class Call(NamedTuple):
    """A call in the form that `triton_record.record` takes: it is a case and its call in one."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def call(self) -> "Call":
        return self

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {str(i): t for i, t in enumerate(self.args)}

    def run(self) -> Any:
        return self.function(*self.args, **self.options)

    def outputs(self, result: Any) -> Any:
        return result


def _logits(grad: bool = True) -> Tensor:
    return torch.zeros(2, VOCABULARY, dtype=torch.bfloat16, requires_grad=grad)


def _ours(entropy: bool) -> Call:
    labels = torch.zeros(2, dtype=torch.int64)
    function: Any = rk.token_logprobs
    if not entropy:
        function = lambda *args: rk.token_logprobs(*args).logprobs  # noqa: E731
    return Call("ours", function, (_logits(), labels), {"entropy": True} if entropy else {})


def _trl() -> Call:
    from trl.kernels import selective_log_softmax_and_entropy

    return Call(
        "TRL", selective_log_softmax_and_entropy, (_logits(), torch.zeros(2, dtype=torch.int64)), {}
    )


def _liger() -> Call:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    # It drops the last of three positions.
    logits = torch.zeros(1, 3, VOCABULARY, dtype=torch.bfloat16)
    labels = torch.zeros(1, 2, dtype=torch.int64)
    return Call("Liger", fused_selective_log_softmax, (logits, labels), {"temperature": 1.0})


def _ours_kl(direction: str = "reverse") -> Call:
    logits = _logits(), _logits(grad=False)
    return Call("ours", rk.kl_divergence, logits, {"direction": direction})


def _tokens(function: Callable[..., Any], differentiable: bool = True, **options: Any) -> Call:
    """A call of an operation over fp32 tokens, all of whose tensors are full, with a mask."""
    numbers = [torch.zeros(2, 4096, requires_grad=differentiable and i == 0) for i in range(3)]
    mask = torch.ones(2, 4096, dtype=torch.bool)
    return Call("ours", function, (*numbers, mask), options)


def _gae() -> Call:
    function = lambda rewards, values, _, mask: rk.gae(rewards, values, mask)  # noqa: E731
    return _tokens(function, differentiable=False)


_LOGPROB, _BOTH, _BACKWARD = (
    *("log-probability", "log-probability and entropy"),
    "backward of log-probability and entropy",
)
POINTS = (
    Point(
        _LOGPROB, "ours", "logprobs.partial_kernel", lambda: _ours(False), "TILE", False, 2,
        limit=(10.2, 80, 96),
    ),
    Point(_LOGPROB, "Liger", "grpo_loss._selective_log_softmax_kernel", _liger, "BLOCK_N", True, 2),
    Point(
        _BOTH, "ours", "logprobs.partial_kernel", lambda: _ours(True), "TILE", False, 2,
        limit=(12.7, 80, 96),
    ),
    Point(_BOTH, "TRL", "logprob_entropy._forward_kernel", _trl, "BLOCK_SIZE", True, 2),
    Point(
        "backward of log-probability", "ours", "logprobs_backward.backward_kernel",
        lambda: _ours(False), "TILE", False, 4,
        limit=(21.7, 32, 104),
    ),
    Point(
        _BACKWARD, "ours", "logprobs_backward.backward_kernel", lambda: _ours(True), "TILE", False,
        4,
        limit=(22.8, 36, 78),
    ),
    Point(_BACKWARD, "TRL", "logprob_entropy._backward_kernel", _trl, "BLOCK_SIZE", False, 4),
    Point(
        "KL divergence", "ours", "kl.partial_kernel", _ours_kl, "TILE", False, 4, "pair", 2,
        limit=(25.6, 80, 96),
    ),
    Point(
        "backward of KL divergence, reverse", "ours", "kl.backward_kernel", _ours_kl, "TILE", False,
        6, "pair",
        limit=(27.8, 40, 60),
    ),
    Point(
        "backward of KL divergence, forward", "ours", "kl.backward_kernel",
        lambda: _ours_kl("forward"), "TILE", False, 6, "pair", 2,
        limit=(32.8, 36, 80),
    ),
    Point(
        "policy loss with gradient", "ours", "policy.policy_kernel",
        lambda: _tokens(rk.policy_loss), "TILE", False, 17, "token", 0,
        (("LDG", 16), (r"STG", 4), ("FRND", 4)),
        limit=(219.8, 59, 16),
    ),
    Point(
        "value loss with gradient", "ours", "value.value_kernel",
        lambda: _tokens(rk.value_loss, clip_range=0.2), "TILE", False, 17, "token", 0,
        (("LDG", 16), ("STG", 4)),
        limit=(163.3, 40, 27),
    ),
    # An iteration scans a block of a tile.
    Point(
        "gae", "ours", "advantages.scan_kernel", _gae, "BLOCK", True, 17, "token", 0,
        (("LDG", 24), ("STG", 16), ("SHFL", 60)),
        limit=(148.5, 153, 34.5),
    ),
    Point(
        "backward of the losses", "ours", "policy_backward.backward_kernel",
        lambda: _tokens(rk.policy_loss), "TILE", False, 8, "token", 0,
        ((r"LDG\.E\.128", 4), (r"STG\.E\.128", 4)),
        limit=(6.0, 32, 144),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """Per unit of a fast path: instructions and exponentials; of a block: registers and warps."""

    instructions: float
    exponentials: float
    registers: int
    warps: int
    blocks: int
    # KiB of loads in flight on a multiprocessor.
    in_flight: float

    def problems(self, point: Point, arch: int) -> list[str]:
        """The figures that exceed the limit of a point."""
        if point.limit is None:
            return []
        issued, registers, in_flight = point.limit
        found = []
        if self.instructions > issued:
            found.append(f"{self.instructions:.2f} instructions per {point.unit}")
        if self.registers > registers:
            found.append(f"{self.registers} registers")
        if self.in_flight < in_flight:
            found.append(f"{self.in_flight:g} KiB of loads in flight")
        return [f"{point.name}, sm_{arch}: {text}, beyond {point.limit}" for text in found]


def installed(library: str) -> bool:
    return importlib.util.find_spec({"TRL": "trl", "Liger": "liger_kernel"}[library]) is not None


def instructions(cubin: bytes) -> list[cuda_code.Instruction]:
    """The instructions of the one kernel in a cubin."""
    tool = cuda_code.disassembler()
    assert tool is not None  # triton compiled the cubin
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        text = subprocess.run(
            [str(tool), "-sass", file.name],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PATH": path},
        ).stdout
    (code,) = cuda_code.listing(text).values()
    return code


def figures(point: Point, arch: int) -> Figures:
    """The figures of a point on sm_90 or sm_100.

    Raises:
        LookupError: the call launches no such kernel, or its code has no such path.
    """
    target = triton_record.TARGETS[f"sm_{arch}"]
    recorder, _ = triton_record.record(target, [point.call()])
    chosen = [v for v in recorder.variants.values() if v.kernel == point.kernel]
    if len(chosen) != 1:
        found = sorted(v.kernel for v in recorder.variants.values())
        raise LookupError(f"expected one {point.kernel}, found {found}")
    names = list(chosen[0].signature)
    constants = {names[i]: v for (i, *at), v in chosen[0].constants.items() if not at}
    binary = triton_aot.binary_of(chosen[0], target)
    columns, warps = constants[point.columns], binary.metadata.num_warps
    # A thread's columns of one row.
    units = columns // (32 * warps)
    code = instructions(binary.asm["cubin"])
    path_of = cuda_code.loop_path if point.loops else cuda_code.fast_path
    exponentials = {r"MUFU\.EX2": units * point.exponentials} if point.exponentials else {}
    path = path_of(code, exponentials | dict(point.holds))
    # Tiles of tokens have no padding.
    tiled = 1.0 if point.unit == "token" else -(-VOCABULARY // columns) * columns / VOCABULARY
    share = tiled / units
    usage = triton_aot.cubin_usage(binary.asm["cubin"])
    blocks = triton_aot.nvidia_blocks(target, usage["REG"], warps, binary.metadata.shared)
    flying, _ = cuda_code.memory(path)
    return Figures(
        instructions=len(path) * share,
        exponentials=sum(x.operation.startswith("MUFU") for x in path) * share,
        registers=usage["REG"],
        warps=warps,
        blocks=blocks,
        in_flight=flying * 32 * warps * blocks / 1024,
    )


def bounds(point: Point, f: Figures, gpu: cuda_sass.Gpu) -> tuple[float, float]:
    """The TB/s that instructions and exponentials allow, and that as a share of a copy's."""
    clocks = gpu.multiprocessors * gpu.clock * 1e9 * point.traffic / 1e12
    rate = clocks * cuda_sass.ISSUED / f.instructions
    # Those of a thread's preamble are too few to be a bound.
    if point.exponentials:
        rate = min(rate, clocks * cuda_sass.EXPONENTIALS / f.exponentials)
    return rate, min(1.0, rate / gpu.copy)


def markdown(found: dict[tuple[Point, int], Figures], missing: list[str], date: str) -> str:
    """The figures of every point, and the rates that they allow."""
    head = ["operation", "library", "target", "issued", "MUFU", "registers", "warps", "blocks"]
    head += ["KiB", *(f"{g.name}: TB/s, share" for g in cuda_sass.GPUS)]
    rows = []
    for (point, arch), f in found.items():
        cells = [point.name, point.library, f"sm_{arch}", f"{f.instructions:.1f}"]
        cells += [f"{f.exponentials:.2f}", str(f.registers), str(f.warps), str(f.blocks)]
        cells.append(f"{f.in_flight:.0f}")
        for gpu in cuda_sass.GPUS:
            rate, share = bounds(point, f, gpu)
            cells.append(f"{rate:.1f}, {share:.0%}" if gpu.arch == arch else "-")
        rows.append(cells)
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("triton", "trl", "liger-kernel")
        if importlib.util.find_spec(name.replace("-", "_"))
    )
    absent = f" Not installed: {', '.join(missing)}." if missing else ""
    return "\n".join(
        [
            "# Machine code of Triton kernels, ours and others'",
            "",
            f"Compiled on {date} by `make cuda-report` with {versions}.",
            f"Nothing was measured.{absent}",
            f"The logits are bf16, the vocabulary is {VOCABULARY:,}. Instructions and",
            "exponentials (MUFU) are per logit, for a divergence per pair, padding of tiles",
            "included, for losses and gae per fp32 token with a mask; if the kernel loops over its",
            "row, those of an iteration. KiB: loads in",
            "flight on a multiprocessor, in a loop those of an iteration. The rates are what",
            "instructions and exponentials allow, also as a share of a copy. Latency and barriers",
            "come on top.",
            "",
            *table(head, rows, left=3),
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ours", action="store_true", help="leave out other libraries")
    options = options_of_report(parser)
    missing = [name for name in ("TRL", "Liger") if options.ours or not installed(name)]
    found = {
        (point, arch): figures(point, arch)
        for point in POINTS
        if point.library not in missing
        for arch in ARCHS
    }
    text = markdown(found, missing, options.date or "a day not given")
    print(text)
    if options.report:
        options.report.write_text(text)
    problems = [text for (point, arch), f in found.items() for text in f.problems(point, arch)]
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
