"""Measures how long a step spends in operations of `rlhf_kernels`."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Stopwatch:
    """Adds up the time of function calls; uses events on a GPU, so the host never waits."""

    def __init__(self) -> None:
        self.spans: list[tuple[Any, Any]] = []

    def __call__(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        start = self._now()
        result = function(*args, **kwargs)
        self.spans.append((start, self._now()))
        return result

    @staticmethod
    def _now() -> Any:
        if not torch.cuda.is_initialized():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Time of all calls since the last call of this method."""
        spans, self.spans = self.spans, []
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            return float(sum(start.elapsed_time(end) for start, end in spans) / 1e3)
        return float(sum(end - start for start, end in spans))


#: Every call of an operation of `rlhf_kernels` in a step goes through this stopwatch.
timed = Stopwatch()
