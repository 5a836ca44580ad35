"""tinker's losses. The advantages of its cookbook are `group_advantages(r, ids, scale="none")`."""

from typing import TYPE_CHECKING, Literal, get_args

from ..options import PolicyLossOptions
from ._common import Config, one_of, refuse, require

if TYPE_CHECKING:
    from typing_extensions import Unpack

LossFn = Literal["importance_sampling", "ppo", "cispo", "dro", "cross_entropy"]
#: The clip bounds where loss_fn_config has none.
_BOUNDS = {"ppo": (0.8, 1.2), "cispo": (0.0, 4.0)}


def tinker(
    cls: type[Config],
    /,
    loss_fn: LossFn = "importance_sampling",
    *,
    clip_low_threshold: float | None = None,
    clip_high_threshold: float | None = None,
    beta: float | None = None,
    **options: "Unpack[PolicyLossOptions]",
) -> Config:
    """A `loss_fn` of tinker's forward_backward; names of its `loss_fn_config`. From its
    documentation, and its SDK 0.38.

    The sampler's logprobs are the old_logprobs. Losses are sums over tokens, so the normalizer is
    1. tinker has no mask: its tokens outside of answers have advantages of 0. With dro all tokens
    count, because the penalty has no advantage.

        importance_sampling   -A r
        ppo                   clipped, to [0.8, 1.2] by default
        cispo                 -A sg(clip(r)) logprob, clipped to [0, 4] by default
        dro                   -A logprob + beta/2 (logprob - old)^2. Pass the same logprobs as
                              old_logprobs and as ref_logprobs
        cross_entropy         -w logprob. Pass tinker's weights w as advantages

    tinker's metric loss:sum is the loss.

    Args:
        cls: PolicyLossConfig.
        loss_fn: one of the above.
        clip_low_threshold: the lower bound of the ratio itself, with ppo and cispo.
        clip_high_threshold: the upper bound.
        beta: weight of dro's penalty, which has no documented default.
        **options: fields of PolicyLossConfig; they override the above.

    Returns:
        PolicyLossConfig.

    Raises:
        ValueError: an unknown loss_fn, stable_reinforce, or an option of another loss_fn.
    """
    why = "tinker does not publish its formula"
    refuse("tinker", "loss_fn", loss_fn, {"stable_reinforce": why})
    one_of("tinker", "loss_fn", loss_fn, get_args(LossFn))
    given = (clip_low_threshold, clip_high_threshold)
    if loss_fn not in _BOUNDS and given != (None, None):
        require("tinker", "clip_low_threshold and clip_high_threshold", f"None with {loss_fn!r}")
    if (beta is None) == (loss_fn == "dro"):
        require("tinker", "beta", "a number with 'dro'" if beta is None else "None without 'dro'")

    fields: PolicyLossOptions = {
        "log_ratio_clamp": None,
        "aggregation": "constant",
        "normalizer": 1.0,
    }
    if loss_fn in _BOUNDS:
        low, high = (
            default if bound is None else bound
            for bound, default in zip(given, _BOUNDS[loss_fn], strict=True)
        )
        fields |= {
            "objective": "cispo" if loss_fn == "cispo" else "clip",
            "clip_low": low,
            "clip_high": high,
            "clip_absolute": True,
        }
    elif loss_fn == "importance_sampling":
        fields |= {"clip_low": None, "clip_high": None}
    else:
        fields["objective"] = "reinforce"
    if beta is not None:
        fields |= {"kl_coef": beta, "kl_estimator": "k2"}
    return cls(**fields | options)
