"""The table of a backend's launchers; each family has the types of its own."""

from . import kl, logprobs, losses, mismatch, scans, support


class Launchers(
    logprobs.Launchers,
    support.Launchers,
    kl.Launchers,
    scans.Launchers,
    losses.Launchers,
    mismatch.Launchers,
    total=False,
):
    """Launchers by operator name; a backend without an operator lacks its entry."""
