"""Ctrl-C, SIGTERM, a lost terminal: a run ends in a line, with status 130 and whole checkpoints."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Interrupted(SystemExit):
    """A signal that stops what is going on at once.

    `told`: the user has been told where the run can be continued.
    """

    def __init__(self) -> None:
        super().__init__(130)
        self.told = False


class Interrupts:
    """Signals so far. While `patient`, the first is a wish that the step ends first.

    Otherwise, and from the second on, a signal raises Interrupted where the program is.
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
        """Lets what is inside end before a first signal counts."""
        before, self.patient = self.patient, True
        try:
            yield
        finally:
            self.patient = before


@contextlib.contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Takes SIGINT, SIGTERM and SIGHUP in the main thread; elsewhere they are not to be had."""
    found = Interrupts()
    numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
    # nohup lets a run go on without its terminal.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers += (signal.SIGHUP,)
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    before = {number: signal.signal(number, found.note) for number in numbers}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
