"""Ctrl-C, SIGTERM and SIGHUP end a run with a message, status 130 and valid checkpoints."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Interrupted(SystemExit):
    """Stops the program after a signal.

    `told` is true once the user knows where the run can be continued.
    """

    def __init__(self) -> None:
        super().__init__(130)
        self.told = False


class Interrupts:
    """Counts signals. While `patient`, the first signal is only counted: the step may finish.

    Otherwise, and from the second signal on, a signal raises Interrupted immediately.
    """

    def __init__(self) -> None:
        self.seen = 0
        self.patient = False

    def note(self, *_: object) -> None:
        self.seen += 1
        if not self.patient or self.seen > 1:
            raise Interrupted

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the first signal is only counted."""
        before, self.patient = self.patient, True
        try:
            yield
        finally:
            self.patient = before


@contextlib.contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Handles SIGINT, SIGTERM and SIGHUP in the main thread; others cannot install handlers."""
    found = Interrupts()
    numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
    # Under nohup SIGHUP is ignored, and the run goes on without its terminal.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers += (signal.SIGHUP,)
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    before = {number: signal.signal(number, found.note) for number in numbers}
    _before.append(before)
    try:
        yield found
    finally:
        _before.remove(before)
        _restore(before)


# What handled the signals before each `interrupts` that is open.
_before: list[dict[int, Any]] = []


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        # None: it was not set from Python.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _in_child() -> None:
    """A process that a reward function forks dies of a signal, as its parent may wait for it to."""
    while _before:
        _restore(_before.pop())


os.register_at_fork(after_in_child=_in_child)
