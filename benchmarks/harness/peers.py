"""Optional peers: installed ones are measured, others are listed with the reason."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from .case import Missing


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


# Cached, because a failing import would otherwise be repeated for every point.
@functools.cache
def peer(module: str, name: str) -> Callable[..., Any] | Missing:
    """`module.name`, or Missing with the reason."""
    try:
        return getattr(importlib.import_module(module), name)
    # The import of a peer may fail in any way (a missing driver, a wrong version of a package).
    except Exception as error:
        return Missing(_line(error))


def kernel(device: torch.device, module: str, name: str) -> Callable[..., Any] | Missing:
    """`peer` for a kernel that runs only on a GPU."""
    return Missing("needs a GPU") if device.type == "cpu" else peer(module, name)


@functools.cache
def trl_kernel() -> Callable[..., Any] | Missing:
    """TRL's Triton kernel of log-probability and entropy, from the package or from the Hub."""
    found = peer("trl.kernels", "selective_log_softmax_and_entropy")
    if found:
        return found
    get_kernel = peer("kernels", "get_kernel")
    try:
        return get_kernel and get_kernel("trl-lib/trl-losses").selective_log_softmax_and_entropy
    # The kernel is not cached, there is no network, or a version does not fit.
    except Exception as error:
        return Missing(_line(error))


def verl_actor_config() -> Any:
    """verl's actor configuration with clip 0.2 and a dual clip that is never reached."""
    config = peer("verl.workers.config", "ActorConfig")
    options = {"strategy": "fsdp", "rollout_n": 1, "use_dynamic_bsz": True}
    try:
        return config and config(**options, clip_ratio=0.2, clip_ratio_c=1e9)
    # Another version may need other options.
    except Exception as error:
        return Missing(_line(error))
