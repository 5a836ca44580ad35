"""Reward functions in TRL's signature: loading, calling and checking their results.

A reward function is `f(prompts, completions, completion_ids, **columns) -> list[float | None]`:
texts (or messages), token ids without padding, and one list per data column. `None` means that the
function does not score a sample. The trainer adds the column `finished` (whether the completion
ended with the end token) and, as TRL does, `trainer_state` (transformers' `TrainerState`),
`log_extra` and `log_metric`. All arguments are passed by keyword. A function without `**columns`
gets only the arguments that it names. `async` functions run concurrently.
"""

import asyncio
import copy
import functools
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch

from .errors import UserError
from .foreign import outside_inference_mode, undone
from .interrupts import Interrupted

Rewards = Sequence[float | None]
RewardFunction = Callable[..., Rewards | Awaitable[Rewards]]

# --- loading ---------------------------------------------------------------------------------


def is_function(path: str) -> bool:
    """Whether a value of `reward_funcs` names a function rather than a reward model."""
    return ":" in re.sub(r"\A[A-Za-z]:(?=[\\/])", "", path) and not Path(path).is_dir()


def check_path(path: str) -> None:
    """Raises UserError if the path of a reward model is a Python file without function name."""
    file = Path(path if path.endswith(".py") else f"{path}.py").expanduser()
    if file.is_file() and not Path(path).expanduser().is_dir():
        how = f"name the function, as in '{path}:score'"
        raise UserError(f"reward_funcs: expected 'module:function', found {path!r}; {how}")


def load_reward(path: str) -> RewardFunction:
    """The function at `package.module:name` or `path/to/file.py:name` (pytest's `::` too).

    The current folder is searched first, then Python's own search path. `name` may be dotted, to
    name a method of an object or a static method of a class.

    Raises:
        UserError: names what is missing, or what importing the module raised.
    """
    module, _, name = path.replace("::", ":").rpartition(":")
    if not (module and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name)):
        expected = "'module:function', 'path/to/file.py:function' or a reward model's path"
        raise UserError(f"reward_funcs: expected {expected}, found {path!r}")
    found = _imported(module, path)
    try:
        function = attrgetter(name)(found)
    except AttributeError:
        where = getattr(found, "__file__", None) or module
        raise UserError(f"reward_funcs: {path!r}: no {name!r} in {where}") from None
    if isinstance(function, type):
        text = f"the class {function.__name__}; name an object of it"
        raise UserError(f"reward_funcs: {path!r}: expected a function, found {text}")
    if not callable(function):
        text = f"{type(function).__name__} {repr(function)[:60]}"
        raise UserError(f"reward_funcs: {path!r}: expected a function, found {text}")
    named: RewardFunction = function
    return named


def _file(module: str) -> tuple[Path, bool]:
    """The file that a module has as a path or in the current folder; whether it is a path."""
    is_file = module.endswith(".py") or "/" in module or os.sep in module
    return Path(module if is_file else f"{module}.py").expanduser(), is_file


def source_of(path: str) -> Path | None:
    """The file of the module that `load_reward` has imported; None where none is known."""
    module = path.replace("::", ":").rpartition(":")[0]
    file, _ = _file(module)
    if file.is_file():
        return file
    found = getattr(sys.modules.get(module), "__file__", None)
    return None if found is None else Path(found)


def _imported(module: str, path: str) -> ModuleType:
    """Imports a module by its name or the path of its file."""
    file, is_file = _file(module)
    if is_file and not file.is_file():
        raise UserError(f"reward_funcs: {path!r}: no file {str(file)!r}")
    try:
        # A file in the current folder takes precedence over an installed module of that name.
        with undone(), outside_inference_mode():
            return _from_file(file.resolve()) if file.is_file() else _from_name(module)
    except (KeyboardInterrupt, Interrupted):
        raise
    except BaseException as error:  # A script that parses arguments raises SystemExit.
        name = error.name if isinstance(error, ModuleNotFoundError) else None
        if name is not None and (module == name or module.startswith(f"{name}.")):
            where = "in the current folder or among the installed packages"
            raise UserError(f"reward_funcs: {path!r}: no module {name!r} {where}") from error
        raise UserError(f"reward_funcs: {path!r}: importing it raised {_told(error)}") from error


def _from_name(module: str) -> ModuleType:
    # `python -m` puts the current folder first; a console script puts its own folder there.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    return importlib.import_module(module)


def _from_file(file: Path) -> ModuleType:
    """Imports a file once; it may import the modules beside it."""
    name = file.stem
    for known in (name, str(file)):
        module = sys.modules.get(known)
        if module is not None and getattr(module, "__file__", None) == str(file):
            return module
    # Use the plain name if it is free, because pickle and dataclasses look modules up by name.
    name = str(file) if name in sys.modules else name
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, ImportError) and "relative import" in str(error):
            return _from_package(file, error)
        raise
    return module


def _from_package(file: Path, error: ImportError) -> ModuleType:
    """Imports a file with relative imports under its full name in its package."""
    names, folder = [file.stem], file.parent
    while (folder / "__init__.py").is_file():
        names.insert(0, folder.name)
        folder = folder.parent
    if len(names) == 1:
        raise error
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    module = importlib.import_module(".".join(names))
    if getattr(module, "__file__", None) != str(file):
        # Another package has this name.
        raise error
    return module


def _told(error: BaseException) -> str:
    """An exception of the user's code in one line, with the place where it was raised."""
    text = " ".join("".join(traceback.format_exception_only(error)[-1:]).split())
    frames = traceback.extract_tb(error.__traceback__)
    # The last line of the user's own code tells more than the library code that it called.
    libraries = (sys.prefix, sys.base_prefix, os.path.dirname(__file__), "<frozen")
    own = [f for f in frames if not f.filename.startswith(libraries)]
    if isinstance(error, SyntaxError):
        text += f" ({Path(error.filename or '?').name}, line {error.lineno})"
    elif own:
        text += f" ({Path(own[-1].filename).name}, line {own[-1].lineno})"
    return text if len(text) <= 400 else text[:399] + "…"


# --- names and arguments ---------------------------------------------------------------------


def reward_name(function: Callable[..., Any]) -> str:
    """The name of a reward function in metrics and errors, the same as in TRL."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _parameters(function: Callable[..., Any]) -> tuple[dict[str, bool], bool] | None:
    """Parameter name -> whether it is required, and whether `**` is accepted; None if unknown."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        # Some functions written in C have no signature.
        return None
    named = {
        p.name: p.default is p.empty
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def accepted(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the function has parameters for; all if it has `**columns`."""
    found = _parameters(function)
    if found is None or found[1]:
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in found[0]}


def check_arguments(
    name: str, function: Callable[..., Any], own: Sequence[str], columns: Sequence[str]
) -> None:
    """Raises UserError if the function requires what is neither the trainer's own nor a column."""
    named, _ = _parameters(function) or ({}, True)
    given = {*own, *columns}
    missing = [
        parameter for parameter, needed in named.items() if needed and parameter not in given
    ]
    if missing:
        found = ", ".join(sorted(set(columns))) or "none beside what it trains on"
        raise UserError(
            f"{name}: expected a column {missing[0]!r} in the data, found {found}; the trainer's "
            f"own arguments are {', '.join(own)}"
        )


_PLAIN = frozenset({str, bytes, int, float, bool, type(None)})


def copied(value: Any) -> Any:
    """A copy of a value, which a function may change; faster than deepcopy."""
    if type(value) is list:
        return [v if type(v) in _PLAIN else copied(v) for v in value]
    if type(value) is dict:
        return {k: v if type(v) in _PLAIN else copied(v) for k, v in value.items()}
    return value if type(value) in _PLAIN or callable(value) else copy.deepcopy(value)


# --- calling ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Raised:
    """An exception in place of a result."""

    error: BaseException


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of asynchronous reward functions, in its own thread.

    The whole run uses one loop, because clients and locks belong to the loop that first used them.
    It cannot be the caller's loop, which may be running.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


def _awaited(waiting: Sequence[Awaitable[Any]]) -> list[Any]:
    """Awaits all awaitables concurrently; `_Raised` replaces the result of one that raised."""

    async def settled(one: Awaitable[Any]) -> Any:
        try:
            return await one
        except BaseException as error:  # It would end the loop, and the caller would wait forever.
            return _Raised(error)

    async def gather() -> list[Any]:
        return await asyncio.gather(*map(settled, waiting))

    return asyncio.run_coroutine_threadsafe(gather(), _loop()).result()


@undone()
def results(
    functions: Sequence[RewardFunction], arguments: Sequence[Mapping[str, Any]]
) -> list[Any]:
    """The result of each function, or `_Raised` with its exception.

    Working folder, threads, default dtype and device, gradient mode, autocast, the precision of
    products, modes and hooks of torch, the standard streams and the handlers of signals are
    restored afterwards.
    """
    found: list[Any] = []
    for function, given in zip(functions, arguments, strict=True):
        try:
            own = {name: copied(value) for name, value in given.items()}
            with outside_inference_mode():
                result = function(**accepted(function, own))
            found.append(result)
        except (Interrupted, KeyboardInterrupt):
            # These come from a signal of the user, not from the function.
            raise
        except BaseException as error:  # Also SystemExit and BaseExceptions of libraries.
            found.append(_Raised(error))
    waiting = [i for i, result in enumerate(found) if inspect.isawaitable(result)]
    if waiting:
        for i, result in zip(waiting, _awaited([found[i] for i in waiting]), strict=True):
            found[i] = result
    return found


def _rows(arguments: Mapping[str, Any], index: Sequence[int]) -> dict[str, Any]:
    """The arguments for a subset of the samples."""
    return {k: [v[i] for i in index] if isinstance(v, list) else v for k, v in arguments.items()}


def _blamed(function: RewardFunction, arguments: Mapping[str, Any], count: int) -> int | None:
    """The sample for which a function raises; None if no single sample does.

    Bisects, which takes about as long as the call that raised, and gives up after ten seconds
    because the function may wait for a server.
    """
    index, deadline = list(range(count)), time.monotonic() + 10

    def raises(part: list[int]) -> bool:
        return isinstance(results([function], [_rows(arguments, part)])[0], _Raised)

    while len(index) > 1 and time.monotonic() < deadline:
        half = index[: len(index) // 2]
        index = half if raises(half) else index[len(half) :]
    return index[0] if len(index) == 1 and raises(index) else None


def numbers(
    name: str, function: RewardFunction, result: Any, arguments: Mapping[str, Any], count: int
) -> list[float]:
    """A function's result as `count` numbers that are finite in fp32, with NaN for None.

    Raises:
        UserError: the function raised or returned something else; the message names it.
    """
    if isinstance(result, _Raised):
        if isinstance(result.error, UserError):
            raise result.error
        sample = _blamed(function, arguments, count)
        where = f"in a batch of {count}"
        if sample is not None:
            prompt, completion = (arguments[k][sample] for k in ("prompts", "completions"))
            where = f"at sample {sample}, prompt {repr(prompt)[-60:]}, "
            where += f"completion {repr(completion)[:60]}"
        raise UserError(f"{name}: raised {_told(result.error)} {where}") from result.error
    values = _as_list(name, result, count)
    if len(values) != count:
        raise UserError(f"{name}: expected {count} rewards, found {len(values)}")
    return [_number(name, i, value) for i, value in enumerate(values)]


def _as_list(name: str, result: Any, count: int) -> Sequence[Any]:
    if isinstance(result, torch.Tensor) and result.layout is torch.strided and not result.is_meta:
        if result.ndim == 1 and not result.is_quantized:
            return result.detach().cpu().tolist()
    elif isinstance(result, numpy.ndarray):
        if result.ndim == 1:
            values: list[Any] = result.tolist()
            return values
    elif isinstance(result, list | tuple):
        return result
    shape: Any = getattr(result, "shape", None)
    text = f"{type(result).__name__} {repr(result)[:60]}" if shape is None else ""
    found = "None" if result is None else text or f"{type(result).__name__} of {tuple(shape)}"
    raise UserError(f"{name}: expected a list of {count} rewards, found {found}")


def _number(name: str, i: int, value: Any) -> float:
    """A reward as a number, checked to be finite in fp32."""
    if value is None:
        return math.nan
    plain = value
    if isinstance(value, torch.Tensor | numpy.ndarray) and value.ndim == 0:
        plain = value.item()
    if not isinstance(plain, Real | Decimal | numpy.bool_):
        found = f"{type(value).__name__} {repr(value)[:60]}"
        raise UserError(f"{name}: expected numbers or None, found {found} for sample {i}")
    try:
        number = float(plain)
        # Larger numbers are infinite in fp32.
        held = torch.tensor(number, dtype=torch.float32).item()
    except (OverflowError, ValueError):
        held = math.inf
    except TypeError:
        # numpy's timedelta64 counts as an integer, but cannot be converted to a float.
        found = f"{type(value).__name__} {repr(value)[:60]}"
        raise UserError(f"{name}: expected numbers or None, found {found} for sample {i}") from None
    if not math.isfinite(held):
        raise UserError(f"{name}: expected finite rewards, found {str(plain)[:60]} for sample {i}")
    return number
