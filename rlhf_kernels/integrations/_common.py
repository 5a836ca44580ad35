"""Checks whether our kernels can serve a call, and the LM head as all three trainers use it."""

import contextlib
import functools
import math
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk

from ._patch import Unsupported

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require_kernels(device: torch.device) -> None:
    """Raises Unsupported for a device that only the reference supports."""
    # A compiled graph has checked the device in the call that compiled it.
    if not torch.compiler.is_compiling() and not _has_kernels(device.type):
        raise Unsupported(f"no kernels for {device.type} tensors")


@functools.cache
def _has_kernels(device_type: str) -> bool:
    return len(rk.available_backends(device_type)) > 1


def require_floating(**tensors: Tensor | None) -> None:
    """Raises Unsupported unless each is float32, bfloat16 or float16, on a device with kernels."""
    for name, t in tensors.items():
        if t is None:
            continue
        if t.dtype not in DTYPES:
            raise Unsupported(f"{t.dtype} {name}")
        require_kernels(t.device)


def require_constant(**tensors: Tensor | None) -> None:
    """Raises Unsupported if a tensor that our kernels treat as constant requires grad."""
    for name, t in tensors.items():
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise Unsupported(f"{name} that wants a gradient")


def require_mask(mask: Tensor, shape: torch.Size) -> None:
    """Raises Unsupported unless the mask is bool or integer and has that shape."""
    if mask.is_floating_point():
        raise Unsupported("a mask of weights")
    if mask.shape != shape:
        raise Unsupported(f"a mask of shape {tuple(mask.shape)} for {tuple(shape)}")


def require_temperature(temperature: float) -> None:
    """Raises Unsupported unless it is a positive number; the trainers have their own messages."""
    if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        raise Unsupported("a temperature that is not a positive number")


def require_logits(logits: Tensor, labels: Tensor | None) -> None:
    """Raises Unsupported unless logits are [..., V] with V >= 1, and labels [...] are integers."""
    require_floating(logits=logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise Unsupported("logits without a vocabulary")
    if labels is None:
        return
    if labels.shape != logits.shape[:-1]:
        raise Unsupported("labels of another shape than the logits' rows")
    if labels.dtype not in (torch.int32, torch.int64):
        raise Unsupported(f"{labels.dtype} labels")


def logits_entropy(logits: Tensor) -> Tensor:
    """The entropy [...] of logits [..., V], float32."""
    require_logits(logits, None)
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return rk.token_logprobs(logits, labels, entropy=True).entropy


class CastHead:
    """Hidden states and an LM head in the dtype of the trainer's own product.

    This is the autocast dtype, or else that of the hidden states. Casts are part of the graph, so
    the gradient of the weight has the dtype of the weight.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        require_kernels(hidden.device)
        if hasattr(weight, "ds_id"):
            raise Unsupported("ZeRO-3 takes the weight away before the backward pass")
        if type(weight) not in (Tensor, torch.nn.Parameter):
            raise Unsupported(f"a weight that is a {type(weight).__name__}")
        self._device = hidden.device.type
        self._autocast = torch.is_autocast_enabled(self._device)
        dtype = torch.get_autocast_dtype(self._device) if self._autocast else hidden.dtype
        if dtype not in DTYPES:
            raise Unsupported(f"{dtype} hidden states")
        self.hidden, self.weight = hidden.to(dtype), weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)

    def no_autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Turns autocast off: operands are cast already, and products choose their precision."""
        if self._autocast:
            return torch.autocast(self._device, enabled=False)
        return contextlib.nullcontext()

    def token_logprobs(
        self,
        labels: Tensor,
        *,
        temperature: float,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        entropy: bool = False,
        collision: bool = False,
        argmax: bool = False,
        ignore_index: int = -100,
    ) -> rk.TokenLogprobs | rk.TokenLogprobsEntropy:
        """`rk.linear_token_logprobs` with this head."""
        require_temperature(temperature)
        if not 0 < logit_scale < math.inf:
            raise Unsupported(f"logit_scale {logit_scale}")
        with self.no_autocast():
            return rk.linear_token_logprobs(
                self.hidden,
                self.weight,
                labels,
                bias=self.bias,
                temperature=temperature,
                softcap=softcap,
                logit_scale=logit_scale,
                entropy=entropy,
                collision=collision,
                argmax=argmax,
                ignore_index=ignore_index,
            )
