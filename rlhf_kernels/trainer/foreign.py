"""Undoes what a user's code, such as a reward function, does to state of the whole process."""

import contextlib
import functools
import operator
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

# What torch has a precision of fp32 products for.
_PRECISIONS = (
    *("", "cuda.matmul", "cudnn", "cudnn.conv", "cudnn.rnn"),
    *("mkldnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"),
)
# What torch has switches for that change numbers: where, and their names.
_SUMS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
_SWITCHES = (
    ("mkldnn", ("enabled", "deterministic")),
    ("cudnn", ("enabled", "benchmark", "deterministic")),
    ("cuda.matmul", _SUMS),
)
_ATTENTIONS = ("flash", "mem_efficient", "math", "cudnn")


class _Lent:
    """A standard stream, or its buffer, that stays open whatever is done with it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._stream, name)
        # Another wrapper around it would close it when that goes.
        return _Lent(found) if name in ("buffer", "raw") else found

    def detach(self) -> "_Lent":
        found: _Lent = self.buffer if hasattr(self._stream, "buffer") else self.raw
        return found

    def close(self) -> None:
        self._stream.flush()

    def __enter__(self) -> "_Lent":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def undone() -> Iterator[None]:
    """Restores process-wide state that foreign code may change, because training depends on it."""
    values = [(get, set_, get()) for get, set_ in _states()]
    filters, folder = warnings.filters[:], None
    precision, precisions = _precision(), _precisions()
    device = torch.get_default_device()
    autocast = {
        d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")
    }
    nesting = _autocast_nesting()
    streams, handlers, hooks = (sys.stdout, sys.stderr), _handlers(), _hooks()
    with contextlib.suppress(OSError):
        # The current folder may have been deleted.
        folder = Path.cwd()
    sys.stdout, sys.stderr = (None if stream is None else _Lent(stream) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        if folder is not None:
            with contextlib.suppress(OSError):
                os.chdir(folder)
        for kind, (enabled, lower) in autocast.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, lower)
        # Only at depth 0 does torch drop its casts of the weights, which training changes.
        for _ in range(_autocast_nesting() - nesting):
            torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        if precision is not None and _precision() != precision:
            torch.set_float32_matmul_precision(precision)
        for holder, value in precisions:
            if holder.fp32_precision != value:
                holder.fp32_precision = value
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        for get, set_, value in values:
            if get() != value:
                set_(value)
        for held, entries in hooks:
            if held != entries:
                held.clear()
                held.update(entries)
        if warnings.filters != filters:
            warnings.filters[:] = filters
            with warnings.catch_warnings():
                pass  # So that Python asks them anew.


def _states() -> list[tuple[Callable[[], Any], Callable[[Any], object]]]:
    """How values of the whole process are asked for and set."""
    found: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
        (torch.get_num_threads, torch.set_num_threads),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        (_flushes, torch.set_flush_denormal),
    ]
    for path, names in _SWITCHES:
        holder = operator.attrgetter(path)(torch.backends)
        for name in names:
            if hasattr(holder, name):
                get = functools.partial(getattr, holder, name)
                found.append((get, functools.partial(setattr, holder, name)))
    for name in _ATTENTIONS:
        switch = getattr(torch.backends.cuda, f"enable_{name}_sdp", None)
        if switch is not None:
            found.append((getattr(torch.backends.cuda, f"{name}_sdp_enabled"), switch))
    return found


def _hooks() -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    """The tables of hooks that all modules call, each with its entries."""
    tables = vars(torch.nn.modules.module).items()
    return [(t, dict(t)) for name, t in tables if name.startswith("_global_") and t is not None]


def _flushes() -> bool:
    """Whether numbers below the smallest normal one become zero."""
    least = torch.tensor(torch.finfo(torch.float32).tiny, device="cpu", dtype=torch.float32)
    return not bool(least / 2)


def _handlers() -> dict[int, Any]:
    """Who handles the signals that end a run; only the main thread may ask and set."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    found = {number: signal.getsignal(number) for number in numbers}
    # None: it was not set from Python.
    return {number: handler for number, handler in found.items() if handler is not None}


def _autocast_nesting() -> int:
    """How many autocast contexts are open."""
    torch.autocast_increment_nesting()
    return int(torch.autocast_decrement_nesting())


def _precision() -> str | None:
    """The precision of products by its older name; None where a newer one forbids to ask for it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _precisions() -> list[tuple[Any, str]]:
    """What has a precision, with its precision; empty in a torch without these names."""
    found = []
    for path in _PRECISIONS:
        holder: Any = torch.backends
        with contextlib.suppress(AttributeError):
            for name in filter(None, path.split(".")):
                holder = getattr(holder, name)
            found.append((holder, holder.fp32_precision))
    return found
