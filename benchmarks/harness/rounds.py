"""Rounds of a point: every provider once, in random order, then ours; and whether they agree."""

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .clocks import DeviceEvents, host_once, once, synchronize, timer

# The factor by which the two halves of a point's rounds may differ. Beyond it the machine was busy
# or its clock moved.
STEADY = 1.15
# How often a point is measured again that was not steady.
REPEATS = 2

# The copy that tells whether the machine stays the same during a run.
_PROBE_BYTES, _PROBES = 64 << 20, 5

# Name -> (prepare, run).
Steps = dict[str, tuple[Callable[[], tuple], Callable[..., Any]]]


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy between two buffers that exist already.

    Unlike the copy of a point it is the same work at every point, so a run can be held to it.
    """
    source, target = (torch.ones(_PROBE_BYTES // 4, device=device) for _ in range(2))
    clock = timer(device)
    times = [once(lambda: (source,), target.copy_, clock) for _ in range(_PROBES)]
    return 2 * _PROBE_BYTES / statistics.median(times)


def disagreement(values: Sequence[float]) -> float:
    """The larger of the medians of both halves over the smaller; 1 for fewer than four values."""
    if len(values) < 4:
        return 1.0
    middle = len(values) // 2
    first, second = statistics.median(values[:middle]), statistics.median(values[middle:])
    return max(first, second) / min(first, second)


class Rounds:
    """Times all providers of a point, round by round.

    Args:
        steps: the other providers, the machine's rates and the bare products.
        ours: (prepare, run) of ours.
        clock: times a call.
        host: seconds of a call's host part, by name.
        stride: a provider runs in every so many rounds, by name.
        device: device of the tensors.
    """

    def __init__(
        self,
        steps: Steps,
        ours: tuple[Callable[[], tuple], Callable[..., Any]],
        clock: Any,
        host: dict[str, float],
        stride: dict[str, int],
        device: torch.device,
    ) -> None:
        self.steps, self.ours, self.clock, self.host = steps, ours, clock, host
        self.stride, self.device = stride, device
        self.is_gpu = isinstance(clock, DeviceEvents)
        self.shuffler = random.Random(0)
        self.clear()

    def clear(self) -> None:
        """Forgets all rounds."""
        self.count = 0
        self.times: dict[str, list[float]] = {name: [] for name in (*self.steps, "ours")}
        self.hosts: dict[str, list[float]] = {name: [] for name in self.times}

    def others(self) -> tuple[tuple, dict]:
        """Times all but ours; the operands of ours."""
        prepare, run = self.ours
        for name in self.shuffler.sample(list(self.steps), len(self.steps)):
            if self.count % self.stride[name] == 0:
                self.times[name].append(once(*self.steps[name], self.clock, self.host[name]))
                if self.is_gpu:
                    self.hosts[name].append(host_once(*self.steps[name], self.device))
        self.count += 1
        if self.is_gpu:
            self.hosts["ours"].append(host_once(prepare, run, self.device))
        prepared = prepare()
        synchronize(self.device)
        return prepared, {}

    def timed(self, *prepared: Any) -> Any:
        """Times ours."""
        self.clock.start(self.host["ours"])
        result = self.ours[1](*prepared)
        self.times["ours"].append(self.clock.stop())
        return result

    def again(self, count: int) -> None:
        """Measures `count` new rounds in place of those there are."""
        self.clear()
        for _ in range(count):
            prepared, _ = self.others()
            self.timed(*prepared)

    def ours_over(self, name: str) -> list[float]:
        """Ours over a provider in the rounds of both, free of what slows a whole round."""
        pairs = zip(self.times["ours"][:: self.stride[name]], self.times[name], strict=True)
        return [o / s for o, s in pairs]

    def disagreement(self, limit: str) -> float:
        """How far the halves differ: in the copy, and in ours over its limit."""
        return max(disagreement(self.times["copy"]), disagreement(self.ours_over(limit)))
