"""OpenRLHF: `Actor.forward` without logits, its losses, KL estimates and advantages.

    from rlhf_kernels.integrations import openrlhf
    openrlhf.patch()

OpenRLHF computes in Ray workers, so every process has to be patched:

    ray job submit --runtime-env-json \
        '{"worker_process_setup_hook": "rlhf_kernels.integrations.openrlhf.setup"}' -- ...

setup() imports nothing of OpenRLHF itself: it patches each module when the process imports it, so
vLLM's workers do not load OpenRLHF.
"""

import contextlib
import functools
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

import rlhf_kernels as rk

from ._common import (
    logits_entropy,
    require_constant,
    require_floating,
    require_logits,
    require_mask,
    require_temperature,
)
from ._openrlhf_actor import actor_forward
from ._openrlhf_gate import clipped, gated_weights, gates_by_another_statistic, masked_mean
from ._patch import Hook, IncompatibleError, Integration, Report, Unsupported

__all__ = ["IncompatibleError", "Report", "patch", "patched", "report", "setup", "unpatch"]

_INTEGRATION = Integration("openrlhf", ("0.11", "0.12"))


def _log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    require_logits(logits, labels)
    require_temperature(temperature)
    return rk.token_logprobs(logits, labels, temperature=temperature).logprobs


def _compute_entropy(logits: Tensor) -> Tensor:
    return logits_entropy(logits)


def _compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: Literal["k1", "k2", "k3"] = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    if kl_estimator not in ("k1", "k2", "k3"):
        raise Unsupported(f"the estimator {kl_estimator!r}")
    require_floating(log_probs=log_probs, log_probs_base=log_probs_base)
    require_constant(log_probs_base=log_probs_base)
    if log_probs.shape != log_probs_base.shape:
        raise Unsupported("log-probabilities of two shapes")
    x, base = log_probs, log_probs_base
    if kl_estimator == "k3":
        # Below -10 the estimate exceeds its upper bound of 10, and its gradient could overflow.
        x = (log_probs.float() - log_probs_base.float()).clamp(min=-10)
        base = torch.zeros_like(x)
    value = rk.kl_penalty(x, base, estimator=kl_estimator).clamp(-10, 10)
    if not unbiased_gradient:
        return value
    slope = rk.kl_penalty(log_probs, log_probs_base, estimator="k2")
    if log_probs_old is not None:
        ratio = (log_probs.detach().float() - log_probs_old.detach().float()).exp()
        slope = ratio.clamp(max=10.0) * slope
    return value.detach() + slope - slope.detach()


@functools.lru_cache(maxsize=64)
def _policy_config(policy_loss_type: Literal["ppo", "gspo"], **options: Any) -> rk.PolicyLossConfig:
    return rk.PolicyLossConfig.openrlhf(policy_loss_type, **options)


def _normalizer(
    by_token: bool, dp_size: int, tokens: float | None, sequences: float | None
) -> float | Tensor | None:
    """The divisor of OpenRLHF's aggregate_loss; None means this batch's own count."""
    count = tokens if by_token else sequences
    if isinstance(count, int | float) and not count > 0:
        raise Unsupported(f"a global count of {count}")
    return None if count is None else count / dp_size


def _require_tokens(action_mask: Tensor | None, first: Tensor, **others: Tensor) -> Tensor:
    if action_mask is None:
        raise Unsupported("no action mask")
    require_floating(**others)
    require_mask(action_mask, first.shape)
    if first.dim() != 2 or any(t.shape != first.shape for t in others.values()):
        raise Unsupported("tensors that are not all [B, T]")
    return action_mask


def _policy_loss(
    self: Any,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    constants = {"old_log_probs": old_log_probs, "advantages": advantages}
    corrected = self.is_correction_level != "off"
    if corrected:
        if rollout_log_probs is None:
            raise Unsupported("no rollout_log_probs")
        constants["rollout_log_probs"] = rollout_log_probs
    mask = _require_tokens(action_mask, log_probs, log_probs=log_probs, **constants)
    require_constant(**constants)
    options = {"clip_eps_low": self.clip_eps_low, "clip_eps_high": self.clip_eps_high}
    options |= {"dual_clip": self.dual_clip, "token_level_loss": self.token_level_loss}
    gspo = self.policy_loss_type == "gspo"
    gated = corrected and not gspo and gates_by_another_statistic(self)
    filtered = clip_ratio = None
    if gated:
        assert rollout_log_probs is not None  # A correction has been found to have them.
        clip_ratio = masked_mean(clipped(self, log_probs - old_log_probs, advantages), mask)
        weights, filtered = gated_weights(self, old_log_probs, rollout_log_probs, mask)
        # Every objective is linear in the magnitude of an advantage, and weights are >= 0.
        advantages = advantages * weights
    elif corrected and not gspo:
        options |= {
            "is_correction_level": self.is_correction_level,
            "is_correction_mode": self.is_correction_mode,
            "is_correction_gating": self.is_correction_gating,
            "is_correction_threshold": tuple(self.is_correction_threshold),
        }
    try:
        config = _policy_config(self.policy_loss_type, **options)
    except ValueError as error:
        raise Unsupported(str(error)) from error
    loss, metrics = rk.policy_loss(
        log_probs,
        # With a correction, OpenRLHF's gspo uses the ratio to the rollout policy.
        rollout_log_probs if corrected and gspo else old_log_probs,
        advantages,
        mask=mask,
        rollout_logprobs=rollout_log_probs if corrected and not gspo and not gated else None,
        normalizer=_normalizer(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size),
        config=config,
    )
    if clip_ratio is None:
        clip_ratio = metrics["clip_frac_low"] + metrics["clip_frac_high"]
    if not corrected or gspo:
        kl = metrics["k1_old"]
        if gspo:
            kl = masked_mean(old_log_probs - log_probs.detach(), mask)
        return loss, clip_ratio, kl, None, None
    assert rollout_log_probs is not None  # A correction has been found to have them.
    difference = old_log_probs - rollout_log_probs
    if filtered is None:
        low, high = self.is_correction_threshold
        weight = difference.exp()
        filtered = masked_mean(((weight < low) | (weight > high)).float(), mask)
    return loss, clip_ratio, metrics["k1_old"], masked_mean(-difference, mask), filtered


def _value_loss(
    self: Any,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    action_mask: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> Tensor:
    constants = {"old_values": old_values, "returns": returns}
    mask = _require_tokens(action_mask, values, values=values, **constants)
    require_constant(**constants)
    if self.clip_eps is not None and not self.clip_eps > 0:
        raise Unsupported("a clip range that is not positive")
    return rk.value_loss(
        values,
        old_values,
        returns,
        mask=mask,
        clip_range=self.clip_eps,
        aggregation="token-mean" if self.token_level_loss else "seq-mean-token-mean",
        normalizer=_normalizer(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size),
    ).loss


def _advantages(
    self: Any,
    values: Tensor,
    rewards: Tensor,
    action_mask: Tensor | None,
    gamma: float,
    lambd: float,
) -> tuple[Tensor, Tensor]:
    require_floating(values=values, rewards=rewards)
    require_constant(values=values, rewards=rewards)
    if action_mask is not None:
        require_mask(action_mask, rewards.shape)
    found = rk.gae(rewards, values, mask=action_mask, gamma=gamma, lam=lambd, masked="zero")
    return found.advantages, found.returns


def _returns(self: Any, rewards: Tensor, action_mask: Tensor | None, gamma: float) -> Tensor:
    require_floating(rewards=rewards)
    require_constant(rewards=rewards)
    if action_mask is not None:
        require_mask(action_mask, rewards.shape)
    return rk.discounted_returns(rewards, mask=action_mask, gamma=gamma, masked="zero")


_UTILS, _LOSS = "openrlhf.models.utils", "openrlhf.models.loss"
_MAKER = "openrlhf.trainer.ppo_utils.experience_maker"
_GLOBAL = "dp_size, batch_num_tokens, global_batch_size"
_HOOKS = (
    Hook(
        "openrlhf.models.actor",
        "Actor.forward",
        (
            "self, sequences, action_mask, attention_mask, return_output, allgather_logits, "
            "return_logprobs, ring_attn_group, packed_seq_lens, return_entropy, **mm_inputs",
        ),
        actor_forward,
        everywhere=False,
        makes_ours=True,
    ),
    Hook(
        _UTILS,
        "log_probs_from_logits",
        ("logits, labels, temperature",),
        _log_probs_from_logits,
    ),
    Hook(_UTILS, "compute_entropy", ("logits",), _compute_entropy),
    Hook(
        _UTILS,
        "compute_approx_kl",
        ("log_probs, log_probs_base, log_probs_old, kl_estimator, unbiased_gradient",),
        _compute_approx_kl,
    ),
    Hook(
        _LOSS,
        "PolicyLoss.forward",
        (f"self, log_probs, old_log_probs, advantages, action_mask, rollout_log_probs, {_GLOBAL}",),
        _policy_loss,
        everywhere=False,
    ),
    Hook(
        _LOSS,
        "ValueLoss.forward",
        (f"self, values, old_values, returns, action_mask, {_GLOBAL}",),
        _value_loss,
        everywhere=False,
    ),
    Hook(
        _MAKER,
        "RemoteExperienceMaker.get_advantages_and_returns",
        ("self, values, rewards, action_mask, gamma, lambd",),
        _advantages,
        everywhere=False,
    ),
    Hook(
        _MAKER,
        "RemoteExperienceMaker.get_cumulative_returns",
        ("self, rewards, action_mask, gamma",),
        _returns,
        everywhere=False,
    ),
)


def patch() -> Report:
    """Replaces OpenRLHF's functions in this process, and imports the modules that have them.

    Idempotent. Raises IncompatibleError, with nothing replaced, for an unknown version or
    signature.
    """
    return _INTEGRATION.patch(_HOOKS)


def unpatch() -> Report:
    """Restores OpenRLHF's own functions, and ends the patching of setup()."""
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    return _INTEGRATION.unpatch()


def patched() -> contextlib.AbstractContextManager[None]:
    """A context in which OpenRLHF is patched in this process."""
    return _INTEGRATION.patched(patch, unpatch)


def report() -> Report:
    """What is replaced or could be, and how many calls were served or passed on."""
    return _INTEGRATION.report(_HOOKS)


def setup() -> None:
    """The setup hook of Ray workers: patches OpenRLHF's modules when the process imports them."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    _patch_imported()


def _patch_imported() -> None:
    hooks = [hook for hook in _HOOKS if hook.module in sys.modules]
    if hooks:
        _INTEGRATION.patch(hooks)


class _Loader(importlib.abc.Loader):
    """Runs a module's own loader, then patches the module."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _patch_imported()


class _Finder(importlib.abc.MetaPathFinder):
    # When these have been imported, so have all modules below them that have hooks.
    modules = ("openrlhf.models", _MAKER)

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.modules:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


_FINDER = _Finder()
