"""Optional peers: what is installed gets measured, what is not is listed with the reason."""

import importlib
from collections.abc import Callable
from typing import Any

from .harness import Missing


def peer(module: str, name: str) -> Callable[..., Any] | Missing:
    """`module.name`, or Missing with the reason."""
    try:
        return getattr(importlib.import_module(module), name)
    # A peer may fail to import in any way (a missing driver, a wrong version of something).
    except Exception as error:
        return Missing(f"{type(error).__name__}: {str(error).splitlines()[0]}")


def verl_actor_config() -> Any:
    """verl's actor configuration with PPO's clip 0.2 and its dual clip out of reach."""
    config = peer("verl.workers.config", "ActorConfig")
    return config and config(
        strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio=0.2, clip_ratio_c=1e9
    )
