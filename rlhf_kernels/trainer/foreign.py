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
from torch import overrides
from torch.utils import _device, _python_dispatch

import rlhf_kernels as rk

# What torch has a precision of fp32 products for.
_PRECISIONS = (
    *("", "cuda.matmul", "cudnn", "cudnn.conv", "cudnn.rnn"),
    *("mkldnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"),
)
# Two older names, which set some of these too.
_OLDER: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (
        functools.partial(getattr, torch.backends.cudnn, "allow_tf32"),
        functools.partial(setattr, torch.backends.cudnn, "allow_tf32"),
    ),
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
    older = [(get, set_, _asked(get)) for get, set_ in _OLDER]
    precisions = _precisions()
    autocast = {
        d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")
    }
    nesting = _autocast_nesting()
    streams, handlers, hooks = (sys.stdout, sys.stderr), _handlers(), _hooks()
    functions, device = overrides._get_current_function_mode_stack(), _device.CURRENT_DEVICE
    default = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    dispatched, saved = torch._C._len_torch_dispatch_stack(), _saved_tensors_hooks()
    with contextlib.suppress(OSError):
        # The current folder may have been deleted.
        folder = Path.cwd()
    sys.stdout, sys.stderr = (None if stream is None else _Lent(stream) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        # First: a mode that was entered and not left changes what torch's own functions do below.
        while torch._C._len_torch_dispatch_stack() > dispatched:
            _python_dispatch._pop_mode()
        while torch._C._len_torch_function_stack():
            overrides._pop_mode()
        for mode in functions:
            overrides._push_mode(mode)
        # torch.device() is a mode too, and the default device one that torch keeps.
        _device.CURRENT_DEVICE, torch._GLOBAL_DEVICE_CONTEXT.device_context = device, default
        while _saved_tensors_hooks() not in (saved, None):
            torch._C._autograd._pop_saved_tensors_default_hooks()
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
        for get, set_, value in older:
            if value is not None and _asked(get) != value:
                set_(value)
        for holder, value in precisions:
            if holder.fp32_precision != value:
                holder.fp32_precision = value
        for get, set_, value in values:
            if get() != value:
                set_(value)
        for held, entries in hooks:
            if held != entries:
                held.clear()
                held.update(entries)
        if warnings.filters != filters:
            own: Any = warnings.filters  # A list, which its stubs hide.
            own[:] = filters
            with warnings.catch_warnings():
                pass  # So that Python asks them anew.


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Raises where foreign code leaves inference mode on, which no other code can switch off."""
    before = torch.is_inference_mode_enabled()
    yield
    if torch.is_inference_mode_enabled() != before:
        raise RuntimeError(
            "it entered torch.inference_mode() and did not leave it, so nothing can be trained; "
            "use it in a with statement"
        )


def _states() -> list[tuple[Callable[[], Any], Callable[[Any], object]]]:
    """How values of the whole process are asked for and set."""
    found: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
        (rk.use_backend.current, rk.use_backend),
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


def _saved_tensors_hooks() -> tuple[Any, Any] | None:
    """The innermost pair of hooks for what autograd saves."""
    found: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return found


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


def _asked(get: Callable[[], Any]) -> Any:
    """A precision of products by its older name; None where a newer one forbids to ask for it."""
    try:
        return get()
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
