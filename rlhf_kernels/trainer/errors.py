"""Errors that the user can correct, each told in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import OutOfMemoryError


class UserError(ValueError):
    """An error in a setting, file, model or reward function; the message says what to correct.

    The command line prints its message without a traceback and exits with status 2. `shared`: all
    processes are known to have raised it.
    """

    shared = False


def require(ok: bool, name: str, expected: str, found: object) -> None:
    """Raises UserError naming the setting, what it should be and what it is."""
    if not ok:
        raise UserError(f"{name}: expected {expected}, found {repr(found)[:80]}")


def one_line(error: BaseException) -> str:
    """Kind and message of another library's error, without line breaks and not too long."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:299] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, of a GPU, of torch on a CPU (which has no class for it)."""
    return isinstance(error, MemoryError | OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextmanager
def named_by(setting: str) -> Iterator[None]:
    """Errors inside that begin with "model" begin with the setting that names this one."""
    try:
        yield
    except UserError as error:
        text = str(error)
        if not text.startswith("model: "):
            raise
        raise UserError(f"{setting}: {text.removeprefix('model: ')}") from error


@contextmanager
def blamed_on(name: str, what: str) -> Iterator[None]:
    """Turns what another library raises inside into a UserError: `name: what: its message`.

    For calls that do nothing but read what the user named; memory that runs out stays as it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        raise UserError(f"{name}: {what}: {one_line(error)}") from error
