"""Errors that the user can correct, each with a message of one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import OutOfMemoryError


class UserError(ValueError):
    """An error in a setting, file, model or reward function; the message says what to correct.

    The command line prints the message without a traceback and exits with status 2. `shared` is
    true if all processes raised the error.
    """

    shared = False


def require(ok: bool, name: str, expected: str, found: object) -> None:
    """Raises a UserError that names the setting, the expected and the found value."""
    if not ok:
        raise UserError(f"{name}: expected {expected}, found {repr(found)[:80]}")


def one_line(error: BaseException) -> str:
    """Type and message of another library's error on one line of limited length."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:299] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; on a CPU torch has no class for it."""
    return isinstance(error, MemoryError | OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextmanager
def named_by(setting: str) -> Iterator[None]:
    """Errors inside that blame the setting "model" blame `setting` instead."""
    try:
        yield
    except UserError as error:
        text = str(error)
        if not text.startswith("model: "):
            raise
        raise UserError(f"{setting}: {text.removeprefix('model: ')}") from error


@contextmanager
def blamed_on(name: str, what: str) -> Iterator[None]:
    """Turns another library's errors inside into a UserError: `name: what: its message`.

    Use it only around calls that read what the user named. Out-of-memory errors pass unchanged.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        raise UserError(f"{name}: {what}: {one_line(error)}") from error
