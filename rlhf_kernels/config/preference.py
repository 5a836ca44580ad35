"""What the losses of preference_loss read: which inputs each needs, which options it has."""

from collections.abc import Mapping, Sequence
from typing import Any

from .enums import PREFERENCE_LOSSES, PreferenceLossName

NAMES: tuple[str, ...] = PREFERENCE_LOSSES

#: Losses that never read the reference.
REFERENCE_FREE: tuple[PreferenceLossName, ...] = ("cpo", "simpo", "alphapo", "orpo", "sft")
#: Losses that read it where it is given. Without it they are what CPO's trainers call by these
#: names.
REFERENCE_OPTIONAL: tuple[PreferenceLossName, ...] = ("sigmoid", "hinge", "ipo")
#: Losses of the means over the tokens of a sequence.
AVERAGED: tuple[PreferenceLossName, ...] = ("ipo", "sigmoid_norm", "simpo", "alphapo", "orpo")
#: Losses whose term of a pair depends on the other pairs of the batch.
SORTED: tuple[PreferenceLossName, ...] = ("aot", "aot_unpaired")
#: Functions of the difference of two rewards: in any other the unknown normaliser of an
#: f-divergence would stay. The last one has no reward.
OF_DIFFERENCES: tuple[PreferenceLossName, ...] = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm", "sft"),
)

SMOOTHED: tuple[PreferenceLossName, ...] = (
    *("sigmoid", "robust", "exo_pair", "cpo", "simpo", "alphapo"),
    *SORTED,
)

#: Option -> the value with which it does nothing, and the losses that have it.
OPTIONS: dict[str, tuple[Any, tuple[PreferenceLossName, ...]]] = {
    "label_smoothing": (0.0, SMOOTHED),
    "discopop_tau": (0.05, ("discopop",)),
    "gamma": (0.5, ("simpo", "alphapo")),
    "alpha": (0.25, ("alphapo",)),
}


def contradiction(losses: Sequence[str], options: Mapping[str, Any]) -> tuple[str, str] | None:
    """(option, what it must be) of the first option that goes with none of the losses, or None.

    Args:
        losses: names of losses.
        options: values of those of OPTIONS, f_divergence and f_alpha.
    """
    named = " and ".join(losses)
    for name, (default, having) in OPTIONS.items():
        if options[name] != default and not set(losses) & set(having):
            return name, f"{default:g} with loss {named}"
    divergence, others = options["f_divergence"], set(losses) - set(OF_DIFFERENCES)
    if divergence != "reverse_kl" and others:
        return "f_divergence", f"reverse_kl with loss {min(others)}"
    if divergence != "alpha_divergence" and options["f_alpha"] != 0.5:
        return "f_alpha", f"0.5 with f_divergence {divergence}"
    if "exo_pair" in losses and not options["label_smoothing"] > 0:
        return "label_smoothing", "> 0 with loss exo_pair, as 1e-3"
    return None
