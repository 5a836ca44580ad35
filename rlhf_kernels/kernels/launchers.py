"""The table of a backend's launchers; each family has the types of its own."""

from . import advantages, kl, logprobs, losses, mismatch, support


class Launchers(
    logprobs.Launchers,
    support.Launchers,
    kl.Launchers,
    advantages.Launchers,
    losses.Launchers,
    mismatch.Launchers,
    total=False,
):
    """Launchers by operator name; a backend without an operator lacks its entry."""
