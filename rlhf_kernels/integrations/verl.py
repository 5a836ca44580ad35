"""verl: advantages in the driver, log-probabilities and entropy in the workers, policy losses.

verl computes in Ray workers, so every process has to be patched. verl's plug-in hook does this:

    export VERL_USE_EXTERNAL_MODULES=rlhf_kernels.integrations.verl_plugin

If this package is installed, RLHF_KERNELS_VERL=1 does it through the entry point "verl.plugins".
patch() patches one process.

The policy losses are registered as rk_vanilla, rk_gspo, rk_sapo, rk_gpg and rk_cispo
(`actor.policy_loss.loss_mode=rk_vanilla`); patch(losses=True) or RLHF_KERNELS_VERL=losses also
replaces verl's policy losses and its value loss.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk

from ._common import (
    CastHead,
    logits_entropy,
    require_constant,
    require_floating,
    require_logits,
    require_mask,
)
from ._patch import Hook, IncompatibleError, Integration, Report, Unsupported

__all__ = ["IncompatibleError", "Report", "patch", "patched", "report", "unpatch"]

_INTEGRATION = Integration("verl", ("0.9", "0.10"))
_ALGORITHMS = "verl.trainer.ppo.core_algos"
_FUNCTIONS = "verl.utils.torch_functional"


def _spread(per_sequence: Tensor, mask: Tensor) -> Tensor:
    """Values [B] of sequences, copied to the kept tokens of mask [B, T]; 0 elsewhere."""
    return torch.where(mask != 0, per_sequence.unsqueeze(-1), 0)


def _require_rewards(rewards: Tensor, mask: Tensor) -> None:
    if rewards.dim() != 2:
        raise Unsupported(f"rewards of {rewards.dim()} dimensions")
    require_floating(rewards=rewards)
    require_mask(mask, rewards.shape)


def _gae(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    _require_rewards(token_level_rewards, response_mask)
    require_floating(values=values)
    # verl passes numbers or tensors.
    gamma, lam = float(gamma), float(lam)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise Unsupported("gamma or lam outside [0, 1]")
    found = rk.gae(
        token_level_rewards, values, mask=response_mask, gamma=gamma, lam=lam, whiten=True
    )
    return found.advantages, found.returns


def _group_ids(index: Any, device: torch.device) -> Tensor:
    """Numbers the groups, [B]; `index` holds hashable labels, which are strings in verl."""
    numbers: dict[Any, int] = {}
    labels = index.tolist() if isinstance(index, Tensor) else index
    ids = [numbers.setdefault(label, len(numbers)) for label in labels]
    return torch.tensor(ids, dtype=torch.int64, device=device)


def _group_scores(
    rewards: Tensor, mask: Tensor, index: Any, alone: float = 1.0, **options: Any
) -> Tensor:
    """Advantages [B, T] of the summed rewards; `alone` divides the score of a group of one.

    A group of one has no baseline. Our operation gives it advantage 0, verl its score.
    """
    _require_rewards(rewards, mask)
    if len(index) != rewards.shape[0]:
        raise Unsupported(f"{len(index)} groups' labels for {rewards.shape[0]} sequences")
    scores = rewards.detach().sum(-1)
    ids = _group_ids(index, scores.device)
    advantages = rk.group_advantages(scores, ids, **options)
    single = torch.bincount(ids)[ids] == 1
    return _spread(torch.where(single, scores / alone, advantages), mask)


def _grpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"scale": "none"}
    if norm_adv_by_std_in_grpo:
        options = {"scale": "group", "alone": 1 + epsilon}
    groups = (token_level_rewards, response_mask, index)
    advantages = _group_scores(*groups, eps=epsilon, **options)
    return advantages, advantages


def _rloo(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6, **_: Any
) -> tuple[Tensor, Tensor]:
    groups = (token_level_rewards, response_mask, index)
    advantages = _group_scores(*groups, baseline="leave-one-out", scale="none")
    return advantages, advantages


def _reinforce_plus_plus_baseline(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6, **_: Any
) -> tuple[Tensor, Tensor]:
    centred = _group_scores(token_level_rewards, response_mask, index, scale="none")
    advantages = rk.whiten(centred, mask=response_mask)
    return advantages, advantages


def _reinforce_plus_plus(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    _require_rewards(token_level_rewards, response_mask)
    if config is None:
        raise Unsupported("no config")
    returns = rk.discounted_returns(
        token_level_rewards, mask=response_mask, gamma=float(config.gamma)
    )
    return rk.whiten(returns, mask=response_mask), returns


def _logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    require_logits(logits, labels)
    # verl sets inplace_backward whenever nothing else needs the logits. They are then overwritten
    # on a GPU with flash-attn, but nowhere else.
    inplace = (
        inplace_backward
        and logits.is_cuda
        and logits.requires_grad
        and not logits.is_leaf
        and logits.is_contiguous()
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )
    return rk.token_logprobs(logits, labels, inplace_backward=inplace).logprobs


def _entropy_from_logits(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    return logits_entropy(logits)


def _fused_linear(
    self: torch.nn.Module,
    hidden_states: Tensor,
    vocab_weights: Tensor,
    input_ids: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    if input_ids.shape != hidden_states.shape[:-1]:
        raise Unsupported("labels of another shape than the hidden states' rows")
    head = CastHead(hidden_states, vocab_weights, None)
    found = head.token_logprobs(input_ids.long(), temperature=temperature, entropy=True)
    assert found.entropy is not None  # As it was asked for.
    return found.logprobs, found.entropy


_PolicyOptions = tuple[tuple[str, Any], ...]


@functools.lru_cache(maxsize=64)
def _policy_config(loss_mode: Any, options: _PolicyOptions) -> rk.PolicyLossConfig:
    return rk.PolicyLossConfig.verl(loss_mode, **dict(options))  # It refuses other names.


def _normalizer(loss_agg_mode: str, mask: Tensor, info: dict[str, Any]) -> float | Tensor | None:
    """The divisor of verl's agg_loss: the whole step's if verl knows it, else this batch's."""
    dp_size = info.get("dp_size") or 1
    if loss_agg_mode == "token-sum":
        return 1 / dp_size
    name = "batch_num_tokens" if loss_agg_mode == "token-mean" else "global_batch_size"
    count = info.get(name)
    if count is None and dp_size > 1:
        raise Unsupported(f"no {name} with several ranks")
    if not isinstance(count, Tensor | None) and not count > 0:
        raise Unsupported(f"{name} of {count}")
    if loss_agg_mode != "seq-mean-token-sum-norm":
        return None if count is None else count / dp_size
    if count is None:
        count = (mask != 0).any(-1).sum().clamp(min=1)
    return count * (info.get("loss_scale_factor") or mask.shape[-1]) / dp_size


def _policy_loss(loss_mode: str) -> Callable[..., Any]:
    def compute_policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "seq-mean-token-mean"
        if loss_mode in ("gspo", "sapo")
        else "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        if config is None:
            raise Unsupported("no config")
        tensors = {"old_log_prob": old_log_prob, "advantages": advantages}
        if rollout_is_weights is not None:
            tensors["rollout_is_weights"] = rollout_is_weights
        require_floating(log_prob=log_prob, **tensors)
        require_constant(**tensors)
        require_mask(response_mask, log_prob.shape)
        if log_prob.dim() != 2 or any(t.shape != log_prob.shape for t in tensors.values()):
            raise Unsupported("tensors that are not all [B, T]")
        options = {
            "loss_agg_mode": loss_agg_mode,
            "clip_ratio": config.clip_ratio,
            "clip_ratio_low": config.clip_ratio_low,
            "clip_ratio_high": config.clip_ratio_high,
            "clip_ratio_c": config.get("clip_ratio_c", 3.0),
            "tau_pos": config.tau_pos,
            "tau_neg": config.tau_neg,
        }
        if rollout_is_weights is not None:
            # Every objective is linear in the magnitude of an advantage, and weights are >= 0.
            advantages = advantages * rollout_is_weights
        try:
            preset = _policy_config(loss_mode, tuple(options.items()))
        except ValueError as error:
            raise Unsupported(str(error)) from error
        aggregation = "seq-mean-token-mean" if loss_mode == "sapo" else loss_agg_mode
        loss, metrics = rk.policy_loss(
            log_prob,
            old_log_prob,
            advantages,
            mask=response_mask,
            normalizer=_normalizer(aggregation, response_mask, config.global_batch_info),
            config=preset,
        )
        if loss_mode == "gpg":
            return loss, {}
        # This is the only host synchronisation; verl has three.
        m = metrics.as_dict()
        return loss, {
            "actor/pg_clipfrac": m["clip_frac_low"] + m["clip_frac_high"],
            "actor/ppo_kl": m["k1_old"],
            "actor/pg_clipfrac_lower": m["dual_clip_frac"],
        }

    return compute_policy_loss


_AGGREGATIONS = {"token-sum": "constant", "seq-mean-token-sum-norm": "constant"}


def _value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[Tensor, Tensor]:
    require_floating(vpreds=vpreds, returns=returns, values=values)
    require_constant(returns=returns, values=values)
    require_mask(response_mask, vpreds.shape)
    if vpreds.dim() != 2 or returns.shape != vpreds.shape or values.shape != vpreds.shape:
        raise Unsupported("tensors that are not all [B, T]")
    if not cliprange_value > 0:
        raise Unsupported("a clip range that is not positive")
    info = {
        "dp_size": dp_size,
        "batch_num_tokens": batch_num_tokens,
        "global_batch_size": global_batch_size,
        "loss_scale_factor": loss_scale_factor,
    }
    # The operation refuses other names.
    aggregation: Any = _AGGREGATIONS.get(loss_agg_mode, loss_agg_mode)
    loss, metrics = rk.value_loss(
        vpreds,
        values,
        returns,
        mask=response_mask,
        clip_range=float(cliprange_value),
        aggregation=aggregation,
        normalizer=_normalizer(loss_agg_mode, response_mask, info),
    )
    return loss, metrics["clip_frac"]


_GROUPS = "token_level_rewards, response_mask, index, epsilon"
_algorithm = functools.partial(Hook, _ALGORITHMS)
_HOOKS = (
    _algorithm(
        "compute_gae_advantage_return",
        ("token_level_rewards, values, response_mask, gamma, lam",),
        _gae,
        required=True,
    ),
    # These estimators loop over sequences or tokens in verl. Its others are as fast as ours.
    _algorithm(
        "compute_grpo_outcome_advantage",
        (f"{_GROUPS}, norm_adv_by_std_in_grpo, config",),
        _grpo,
    ),
    _algorithm("compute_rloo_outcome_advantage", (f"{_GROUPS}, config, **kwargs",), _rloo),
    _algorithm(
        "compute_reinforce_plus_plus_baseline_outcome_advantage",
        (f"{_GROUPS}, config, **kwargs",),
        _reinforce_plus_plus_baseline,
    ),
    _algorithm(
        "compute_reinforce_plus_plus_outcome_advantage",
        ("token_level_rewards, response_mask, config, **kwargs",),
        _reinforce_plus_plus,
    ),
    Hook(
        _FUNCTIONS,
        "logprobs_from_logits",
        ("logits, labels, inplace_backward",),
        _logprobs_from_logits,
        required=True,
    ),
    Hook(_FUNCTIONS, "entropy_from_logits", ("logits",), _entropy_from_logits),
    Hook(
        _FUNCTIONS,
        "entropy_from_logits_with_chunking",
        ("logits, chunk_size",),
        _entropy_from_logits,
    ),
    Hook(
        "verl.utils.experimental.torch_functional",
        "FusedLinearForPPO.forward",
        ("self, hidden_states, vocab_weights, input_ids, temperature",),
        _fused_linear,
        everywhere=False,
    ),
)
_POLICY_LOSS = (
    "old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights"
)
_VALUE_LOSS = (
    "vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode, dp_size, "
    "batch_num_tokens, global_batch_size, loss_scale_factor"
)
_MODES = ("vanilla", "gspo", "sapo", "gpg", "cispo")
_LOSS_HOOKS = (
    *(_algorithm(f"compute_policy_loss_{m}", (_POLICY_LOSS,), _policy_loss(m)) for m in _MODES),
    _algorithm("compute_value_loss", (_VALUE_LOSS,), _value_loss),
)


def _hooks(losses: bool) -> Sequence[Hook]:
    return (*_HOOKS, *_LOSS_HOOKS) if losses else _HOOKS


def patch(*, losses: bool = False) -> Report:
    """Replaces verl's functions in this process and registers our policy losses.

    Idempotent. Raises IncompatibleError, with nothing replaced, for an unknown version or
    signature.

    Args:
        losses: also replace verl's own policy losses and its value loss.
    """
    _INTEGRATION.patch(_hooks(losses))
    algorithms = importlib.import_module(_ALGORITHMS)
    registry = algorithms.POLICY_LOSS_REGISTRY
    for mode in _MODES:
        name = f"rk_{mode}"
        # verl's own function, from before any replacement, serves the calls that ours cannot.
        original = _INTEGRATION.original(f"{_ALGORITHMS}.compute_policy_loss_{mode}")
        ours = _INTEGRATION.dispatcher(name, original, _policy_loss(mode))
        _INTEGRATION.add(f"{_ALGORITHMS}.POLICY_LOSS_REGISTRY[{name!r}]", registry, name, ours)
    return report()


def unpatch() -> Report:
    """Restores verl's own functions and removes our policy losses from its registry."""
    return _INTEGRATION.unpatch()


def patched(*, losses: bool = False) -> contextlib.AbstractContextManager[None]:
    """A context in which verl is patched in this process."""
    return _INTEGRATION.patched(lambda: patch(losses=losses), unpatch)


def report() -> Report:
    """What is replaced or could be, and how many calls were served or passed on."""
    return _INTEGRATION.report(_hooks(True))
