"""Kernels whose machine code `triton_sass` counts: ours with their limits, and those of others.

A limit is tightened when its kernel gets better, and never widened to pass.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import driver

from tools.cuda_budgets import VOCABULARY

import rlhf_kernels as rk

# The other libraries, and their modules.
MODULES = {"TRL": "trl", "Liger": "liger_kernel", "flash-attn": "flash_attn"}


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
    # Of our kernels: the most instructions per unit and registers, the least KiB in flight.
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


def _liger_cross_entropy() -> Call:
    from liger_kernel.ops import cross_entropy

    def function(logits: Tensor, labels: Tensor) -> Tensor:
        # The number of warps depends on the GPU, which Liger asks torch for.
        gpu = "blackwell" if driver.active.get_current_target().arch >= 100 else "hopper"
        with mock.patch.object(cross_entropy, "infer_device_arch", lambda: gpu):
            return cross_entropy.LigerCrossEntropyFunction.apply(logits, labels, None)[0]

    return Call("Liger", function, (_logits(), torch.zeros(2, dtype=torch.int64)), {})


def _liger_kl() -> Call:
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    def function(logprobs: Tensor, target: Tensor) -> Tensor:
        return LigerKLDivLossFunction.apply(logprobs, target, "batchmean", True)

    return Call("Liger", function, (_logits(), _logits(grad=False)), {})


def _liger_jsd() -> Call:
    from liger_kernel.ops.jsd import LigerJSDFunction

    return Call("Liger", LigerJSDFunction.apply, (_logits(), _logits(grad=False)), {})


def _flash_attn() -> Call:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    def function(logits: Tensor, labels: Tensor) -> Tensor:
        # It makes the logits' device the current one of torch, which may have none.
        with mock.patch.object(torch.cuda, "device", contextlib.nullcontext):
            losses, _ = cross_entropy_loss(logits, labels)
            losses.sum().backward()
        return losses.detach()

    return Call("flash-attn", function, (_logits(), torch.zeros(2, dtype=torch.int64)), {})


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


_LOGPROB, _BOTH = "log-probability", "log-probability and entropy"
_OF_LOGPROB, _BACKWARD = f"backward of {_LOGPROB}", f"backward of {_BOTH}"
POINTS = (
    Point(
        _LOGPROB, "ours", "logprobs.partial_kernel", lambda: _ours(False), "TILE", False, 2,
        limit=(10.2, 80, 96),
    ),
    Point(_LOGPROB, "Liger", "grpo_loss._selective_log_softmax_kernel", _liger, "BLOCK_N", True, 2),
    # Liger's cross entropy takes a second pass for the gradient, in the same kernel.
    Point(
        _LOGPROB, "Liger cross entropy", "cross_entropy.liger_cross_entropy_kernel",
        _liger_cross_entropy, "BLOCK_SIZE", True, 2, holds=(("SHFL", 5),),
    ),
    Point(
        _LOGPROB, "flash-attn", "cross_entropy.cross_entropy_fwd_kernel", _flash_attn, "BLOCK_SIZE",
        True, 2,
    ),
    Point(
        _BOTH, "ours", "logprobs.partial_kernel", lambda: _ours(True), "TILE", False, 2,
        limit=(12.7, 80, 96),
    ),
    Point(_BOTH, "TRL", "logprob_entropy._forward_kernel", _trl, "BLOCK_SIZE", True, 2),
    Point(
        _OF_LOGPROB, "ours", "logprobs_backward.backward_kernel",
        lambda: _ours(False), "TILE", False, 4,
        limit=(21.7, 32, 104),
    ),
    Point(
        _OF_LOGPROB, "Liger cross entropy", "cross_entropy.liger_cross_entropy_kernel",
        _liger_cross_entropy, "BLOCK_SIZE", True, 4, holds=(("STG", 1),),
    ),
    Point(
        _OF_LOGPROB, "flash-attn", "cross_entropy.cross_entropy_bwd_kernel", _flash_attn,
        "BLOCK_SIZE", False, 4,
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
    # Liger's divergences take log-probabilities, which other kernels have made of logits; its JSD
    # has another backend too, CuTe's, which it prefers where that is installed.
    Point(
        "KL divergence of log-probabilities", "Liger", "kl_div._kldiv_kernel_forward", _liger_kl,
        "BLOCK_SIZE", True, 4, "pair",
    ),
    Point(
        "backward of KL divergence of log-probabilities", "Liger", "kl_div._kldiv_kernel_backward",
        _liger_kl, "BLOCK_SIZE", True, 4, "pair",
    ),
    Point(
        "JSD of log-probabilities with gradient", "Liger", "jsd._jsd_kernel", _liger_jsd,
        "BLOCK_SIZE", True, 10, "pair", 4,
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
