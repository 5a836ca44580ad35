"""The trainers' own functions, where they are installed."""

import importlib
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor

Theirs = Callable[[SimpleNamespace], Tensor]


def verl(
    loss_mode: str, agg: str = "token-mean", *, options: dict[str, Any] | None = None, **actor: Any
) -> Theirs | None:
    """verl's policy loss of that name; None without verl.

    Args:
        loss_mode: its name in verl's registry.
        agg: verl's loss_agg_mode.
        options: of verl's PolicyLossConfig.
        actor: options of verl's ActorConfig.
    """
    if importlib.util.find_spec("verl") is None:
        return None

    def loss(t: SimpleNamespace) -> Tensor:
        algorithms = importlib.import_module("verl.trainer.ppo.core_algos")
        workers = importlib.import_module("verl.workers.config")
        policy = workers.PolicyLossConfig(loss_mode=loss_mode, **(options or {}))
        config = workers.ActorConfig(
            strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, policy_loss=policy, **actor
        )
        function = algorithms.get_policy_loss_fn(loss_mode)
        mask = t.mask.to(t.logprobs.dtype)
        found: Tensor = function(t.old, t.logprobs, t.advantages, mask, agg, config)[0]
        return found

    return loss
