"""Optional peers: what is installed gets measured, what is not is listed with the reason."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from .case import Missing


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


# Cached: what fails half way through its import would do so again at every point.
@functools.cache
def peer(module: str, name: str) -> Callable[..., Any] | Missing:
    """`module.name`, or Missing with the reason."""
    try:
        return getattr(importlib.import_module(module), name)
    # A peer may fail to import in any way (a missing driver, a wrong version of something).
    except Exception as error:
        return Missing(_line(error))


def kernel(device: torch.device, module: str, name: str) -> Callable[..., Any] | Missing:
    """`peer` of what runs on a GPU alone."""
    return Missing("needs a GPU") if device.type == "cpu" else peer(module, name)


@functools.cache
def trl_kernel() -> Callable[..., Any] | Missing:
    """TRL's own Triton kernel of log-probability and entropy: in the package, or from the Hub."""
    found = peer("trl.kernels", "selective_log_softmax_and_entropy")
    if found:
        return found
    get_kernel = peer("kernels", "get_kernel")
    try:
        return get_kernel and get_kernel("trl-lib/trl-losses").selective_log_softmax_and_entropy
    # Not cached, no network, a wrong version.
    except Exception as error:
        return Missing(_line(error))


def verl_actor_config() -> Any:
    """verl's actor configuration with PPO's clip 0.2 and its dual clip out of reach."""
    config = peer("verl.workers.config", "ActorConfig")
    options = {"strategy": "fsdp", "rollout_n": 1, "use_dynamic_bsz": True}
    try:
        return config and config(**options, clip_ratio=0.2, clip_ratio_c=1e9)
    # Another version may want others.
    except Exception as error:
        return Missing(_line(error))
