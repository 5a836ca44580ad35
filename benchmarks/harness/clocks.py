"""Timers of a call: the wall clock, or device events on a GPU."""

import time
from collections.abc import Callable
from typing import Any

import torch

# Bytes read before each GPU measurement to empty the caches; MI300 has the largest, 256 MiB.
FLUSH_BYTES = 1 << 29
# Clock cycles that a GPU waits while the host queues work: 0.1 ms plus its time, at most 50 ms.
CYCLES_PER_SECOND, LEAST_CYCLES, MOST_CYCLES = 2e9, 200_000, 100_000_000


def synchronize(device: torch.device) -> None:
    """Waits for the work queued on `device`."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class WallClock:
    """Times a call from its start until its work is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self, ahead: float) -> None:
        """Starts the clock; `ahead` is only for devices."""
        synchronize(self.device)
        self._start = time.perf_counter()

    def stop(self) -> float:
        """Seconds since `start`, including queued work."""
        synchronize(self.device)
        return time.perf_counter() - self._start


class DeviceEvents:
    """Times only the device's work, starting with a cold cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module = getattr(torch, device.type)
        self._flush = torch.rand(FLUSH_BYTES // 4, device=device)

    def start(self, ahead: float) -> None:
        """Starts the clock after about `ahead` seconds, in which the host queues its launches."""
        # A read, unlike a write, leaves no dirty cache lines to write back during the call.
        self._flush.sum()
        if hasattr(self._module, "_sleep"):
            cycles = LEAST_CYCLES + int(1.5 * ahead * CYCLES_PER_SECOND)
            self._module._sleep(min(cycles, MOST_CYCLES))
        self._start, self._end = (self._module.Event(enable_timing=True) for _ in range(2))
        self._start.record()

    def stop(self) -> float:
        """Seconds of device time since `start`."""
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


Timer = WallClock | DeviceEvents


def timer(device: torch.device) -> Timer:
    """The timer for calls on `device`."""
    return WallClock(device) if device.type == "cpu" else DeviceEvents(device)


def once(
    prepare: Callable[[], tuple], run: Callable[..., Any], clock: Timer, ahead: float = 0.0
) -> float:
    """Seconds of `run(*prepare())`; only `run` is timed."""
    prepared = prepare()
    clock.start(ahead)
    # The name keeps the result alive, so that freeing it is not timed.
    result = run(*prepared)  # noqa: F841
    return clock.stop()


def device_name(device: torch.device) -> str:
    """The model of a device; "cpu" for the CPU."""
    return "cpu" if device.type == "cpu" else getattr(torch, device.type).get_device_name(device)


def host_once(prepare: Callable[[], tuple], run: Callable[..., Any], device: Any) -> float:
    """Seconds until the call returns, while the device may still work."""
    prepared = prepare()
    synchronize(device)
    start = time.perf_counter()
    # The name keeps the result alive, so that freeing it is not timed.
    result = run(*prepared)  # noqa: F841
    seconds = time.perf_counter() - start
    synchronize(device)
    return seconds
