"""The fuzzer: random calls of every operation on every backend, against float64.

    python -m tools.fuzz --seconds 600      what `make fuzz` runs
    python -m tools.fuzz --cases 500        a number of cases, from --first
    python -m tools.fuzz --seed 1234        one case again, in this process

The cases run in a child process, which prints each seed before the case starts. A crash, a hang or
a result out of bounds is a finding, which is printed with the command that repeats it. The exit
status is 1 if there are findings.
"""

import argparse
import os
import random
import select
import signal
import subprocess
import sys
import time

# Triton reads this when it is imported.
os.environ["TRITON_INTERPRET"] = "1"
# Limit of a case in seconds. Only interpreted kernels on a busy machine may come near it.
LIMIT = 120.0
PROGRAM = (sys.executable, "-m", "tools.fuzz")
# Weights of ten: the emulated and the interpreted kernels are slow.
BACKENDS = ("cpu",) * 8 + ("cuda", "triton")


def backend_of(seed: int) -> str:
    return random.Random(-1 - seed).choice(BACKENDS)


def run_case(seed: int, backends: list[str]) -> str | None:
    """A description of the failure of a case, or None."""
    import torch

    from tests.cases import fuzz as fuzz_cases
    from tests.kernels import emulated_cuda

    backend = backend_of(seed)
    if backend not in backends:
        return None
    torch.manual_seed(seed)
    case = fuzz_cases.make(seed, interpreted=backend == "triton")
    try:
        if backend == "cuda":
            with emulated_cuda.installed():
                fuzz_cases.check(case, backend)
        else:
            fuzz_cases.check(case, backend)
    except Exception as error:
        return f"{backend}: {case}: {type(error).__name__}: {error}".replace("\n", " ")
    return None


def work(first: int, backends: list[str]) -> None:
    """The child: runs cases from `first` on until it is killed. Prints "case N", "wrong N what"."""
    import torch

    from tests.kernels import quick_interpreter

    quick_interpreter.quicken()
    torch.set_num_threads(2)
    # Line buffering: the parent can read what was printed before a crash.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    seed = first
    while True:
        print("case", seed, file=out)
        wrong = run_case(seed, backends)
        if wrong is not None:
            print("wrong", seed, wrong, file=out)
        seed += 1


class Child:
    """A process that runs cases, and the lines that it prints."""

    def __init__(self, first: int, backends: list[str]) -> None:
        command = [*PROGRAM, "--work", str(first), "--backends", *backends]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        self._rest = b""

    def lines(self, seconds: float) -> list[str] | None:
        """Waits up to `seconds` for lines; returns None after the end of the process."""
        stream = self.process.stdout
        if not select.select([stream], [], [], seconds)[0]:
            return []
        read = os.read(stream.fileno(), 1 << 16)
        if not read:
            return None
        *lines, self._rest = (self._rest + read).split(b"\n")
        return [line.decode() for line in lines]

    def end(self) -> int:
        self.process.kill()
        return self.process.wait()


def fuzz(first: int, cases: int, seconds: float, backends: list[str], limit: float) -> int:
    """Runs cases until `cases` are done or the time is up; returns the number of findings."""
    found, done, seed = 0, 0, first
    until, child = time.monotonic() + seconds, Child(first, backends)
    last = time.monotonic()

    def finding(what: str) -> None:
        nonlocal found
        found += 1
        print(f"python -m tools.fuzz --seed {seed}\n    {what}", flush=True)

    while done < cases and time.monotonic() < until:
        lines = child.lines(1.0)
        for line in lines or []:
            kind, number, *what = line.split(" ", 2)
            if kind == "wrong":
                finding(what[0])
                continue
            done, seed, last = int(number) - first, int(number), time.monotonic()
            if done >= cases:
                break
        late = time.monotonic() - last > limit
        if lines is None or late:
            status = child.end() if late else child.process.wait()
            name = signal.Signals(-status).name if status < 0 else f"status {status}"
            finding(f"did not end within {limit:.0f} s" if late else f"crashed: {name}")
            seed, done, last = seed + 1, done + 1, time.monotonic()
            child = Child(seed, backends)
    child.end()
    print(f"{done} cases from {first}, {found} findings", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, help="run this case alone, in this process")
    parser.add_argument("--first", type=int, help="seed of the first case; by default of the time")
    parser.add_argument("--cases", type=int, default=1 << 62)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of a case")
    parser.add_argument("--backends", nargs="+", default=sorted(set(BACKENDS)))
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work, options.backends)
    if options.seed is not None:
        wrong = run_case(options.seed, options.backends)
        print(wrong or "nothing wrong")
        return wrong is not None
    if options.cases == 1 << 62 and options.seconds == float("inf"):
        parser.error("one of --seed, --cases and --seconds must be given")
    first = int(time.time()) * 1000 if options.first is None else options.first
    return bool(fuzz(first, options.cases, options.seconds, options.backends, options.limit))


if __name__ == "__main__":
    raise SystemExit(main())
