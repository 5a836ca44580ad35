"""What times a call: the wall clock, or on a GPU events of the device."""

import time
from collections.abc import Callable
from typing import Any

import torch

# Read before each GPU measurement: more than any cache holds (MI300: 256 MiB).
FLUSH_BYTES = 1 << 29
# Clock cycles that a GPU waits for the host: 0.1 ms and the host's own time, 50 ms at most.
CYCLES_PER_SECOND, LEAST_CYCLES, MOST_CYCLES = 2e9, 200_000, 100_000_000


def synchronize(device: torch.device) -> None:
    """Waits for the work queued on `device`."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class WallClock:
    """Times a call from its start to the end of its work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self, ahead: float) -> None:
        """Begins; `ahead` is for devices."""
        synchronize(self.device)
        self._start = time.perf_counter()

    def stop(self) -> float:
        """Seconds since `start`, the queued work included."""
        synchronize(self.device)
        return time.perf_counter() - self._start


class DeviceEvents:
    """Times the device's work alone, from a cold cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module = getattr(torch, device.type)
        self._flush = torch.rand(FLUSH_BYTES // 4, device=device)

    def start(self, ahead: float) -> None:
        """Begins; the device waits about `ahead` seconds, in which the host queues its launches."""
        # A read leaves nothing to be written back, as a write would, while the call runs.
        self._flush.sum()
        if hasattr(self._module, "_sleep"):
            cycles = LEAST_CYCLES + int(1.5 * ahead * CYCLES_PER_SECOND)
            self._module._sleep(min(cycles, MOST_CYCLES))
        self._start, self._end = (self._module.Event(enable_timing=True) for _ in range(2))
        self._start.record()

    def stop(self) -> float:
        """Seconds of the device since `start`."""
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


Timer = WallClock | DeviceEvents


def timer(device: torch.device) -> Timer:
    """What times calls on `device`."""
    return WallClock(device) if device.type == "cpu" else DeviceEvents(device)


def once(
    prepare: Callable[[], tuple], run: Callable[..., Any], clock: Timer, ahead: float = 0.0
) -> float:
    """Seconds of `run(*prepare())`, of which only `run` is timed."""
    prepared = prepare()
    clock.start(ahead)
    # Bound to a name, so that freeing it is not timed.
    result = run(*prepared)  # noqa: F841
    return clock.stop()


def device_name(device: torch.device) -> str:
    """The device's model; "cpu" of a CPU."""
    return "cpu" if device.type == "cpu" else getattr(torch, device.type).get_device_name(device)
