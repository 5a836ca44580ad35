"""The operations' tests under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

Builds the CPU kernels, and the CUDA kernels for the tests' emulator, with both sanitizers into
build/sanitized. It checks that each sanitizer reports an error on this machine, and then runs the
tests and some cases of the fuzzer. Needs GCC. The exit status is 1 if anything was reported or
failed.

Masked vector loads are single instructions that no compiler instruments; `guarded_memory.py` tests
them. Python and torch are not instrumented either. Accesses to their memory are checked, but leaks
are not, because they keep memory until the end.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "sanitized"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all"
# The emulator's threads switch stacks, which AddressSanitizer would report as an overflow.
EMULATOR_FLAGS = f"{FLAGS} --param=asan-stack=0"
# log_path gets the suffix ".<process>". GCC's UndefinedBehaviorSanitizer ignores it when combined
# with AddressSanitizer: it writes to stderr, and ends the process.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:log_path={report}",
    "UBSAN_OPTIONS": "print_stacktrace=1:log_path={report}",
}
TESTS = (
    *("ops/logprobs", "head/head", "head/cases", "head/blocks", "head/bounds", "head/shard"),
    *("ops/logprobs_rules", "ops/kl", "ops/policy", "ops/policy_rules", "ops/policy_masks"),
    *("ops/row_results", "head/policy_rows", "ops/mismatch"),
    *(
        "ops/many_labels",
        "ops/policy_gates",
        "ops/policy_weights",
        "ops/kl_options",
        "head/kl_options",
    ),
    *("ops/value", "ops/advantages", "ops/advantages_rules", "ops/preference"),
    *("ops/advantages_general", "ops/advantages_groups"),
    *("ops/support", "ops/support_rules"),
    *("kernels/backends", "kernels/memory", "package/registration"),
)
# torch's own arithmetic is not instrumented, nor are kernels that Python interprets.
LEFT_OUT = "not triton and not reference"
CASES = 300

# Calls a kernel directly with a row of one column more than its memory holds.
OVERRUN = """
import ctypes, sys, torch
from rlhf_kernels.core.row_options import RowOptions
from rlhf_kernels.kernels import native
from rlhf_kernels.kernels.native import boundary
kernels, cols = native.module("cpu"), int(sys.argv[1])
boundary.exec_builder(kernels)
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
memory = malloc(4 * 1000)
ctypes.memset(memory, 0, 4 * 1000)
# The tensor's shape may say more than there is.
x = torch.frombuffer((ctypes.c_float * cols).from_address(memory), dtype=torch.float32)
y, out, stats = torch.zeros(1, dtype=torch.int64), torch.zeros(1), torch.zeros(1, 3)
options = RowOptions(1.0, 0.0, False, -100)
kernels.token_logprobs(x.view(1, cols), y, None, options, out, None, stats, None, None, 1)
"""
# The compiler must not know the number.
OVERFLOW = """
int main(int count, char**) {
  volatile int most = 2147483647;
  return (most + count) & 1;
}
"""


UNDEFINED = "runtime error: "


def compiler() -> list[str]:
    return (os.environ.get("CXX") or "g++").split()


def build() -> None:
    """Builds the package with sanitized kernels in BUILD, and the emulator's kernels."""
    environment = {**os.environ, "CFLAGS": FLAGS, "CXXFLAGS": FLAGS, "RLHF_KERNELS_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(BUILD)]
    command += ["--build-temp", str(BUILD / "objects"), "build_ext", "--force"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    code = "from tests.kernels import emulated_cuda; emulated_cuda.build()"
    # This uses the ordinary kernels; sanitized ones need their libraries loaded before Python.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CXX": emulator_compiler()}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def emulator_compiler() -> str:
    return f"{compiler()[0]} {EMULATOR_FLAGS}"


def sanitized(report: Path) -> dict[str, str]:
    """The environment of a process with the sanitized build; reports go to `report`.<process>."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    found = [
        subprocess.run([*compiler(), f"-print-file-name={name}"], capture_output=True, text=True)
        for name in names
    ]
    libraries = [f.stdout.strip() for f in found]
    if not all(os.path.isabs(library) for library in libraries):
        raise SystemExit(f"make sanitize needs GCC with {', '.join(names)}; found {libraries}")
    # Python is not linked with these libraries, so they have to be preloaded.
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(BUILD), str(ROOT))),
        "CXX": emulator_compiler(),
        "LD_PRELOAD": " ".join(libraries),
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
        **{name: value.format(report=report) for name, value in OPTIONS.items()},
    }


def reports(folder: Path) -> list[Path]:
    """The reports with errors; the others only warn that the emulator switches stacks."""
    return [f for f in sorted(folder.glob("report.*")) if "ERROR: " in f.read_text()]


def prove(folder: Path) -> None:
    """Exits unless both sanitizers report a planted error, and nothing else."""

    def run(command: list[str], **environment: str) -> str:
        for old in reports(folder):
            old.unlink()
        variables = {**sanitized(folder / "report"), **environment}
        done = subprocess.run(command, env=variables, cwd=BUILD, capture_output=True, text=True)
        undefined = done.stderr if UNDEFINED in done.stderr else ""
        return undefined + "".join(r.read_text() for r in reports(folder))

    for isa in isas():
        for words, expected in ((1000, ""), (1001, "heap-buffer-overflow")):
            said = run([sys.executable, "-c", OVERRUN, str(words)], RLHF_KERNELS_CPU_ISA=isa)
            if expected not in said or bool(said) != bool(expected):
                raise SystemExit(f"{isa}, {words} of 1000 words: expected {expected!r}, got {said}")
    source, program = folder / "overflow.cpp", folder / "overflow"
    source.write_text(OVERFLOW)
    subprocess.run([*compiler(), *FLAGS.split(), str(source), "-o", str(program)], check=True)
    if "signed integer overflow" not in run([str(program)]):
        raise SystemExit("UndefinedBehaviorSanitizer did not report a signed overflow")
    for old in reports(folder):
        old.unlink()


def isas() -> list[str]:
    """The instruction sets that were built and that this machine supports."""
    code = "from rlhf_kernels.kernels import native; print(*native.module('cpu').isa_names())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=BUILD,
        env=sanitized(BUILD / "report"), check=True,
    )  # fmt: skip
    return done.stdout.split()


def run_tests(folder: Path, processes: str, cases: int) -> tuple[int, int]:
    """Runs tests and fuzzer: (how many of the two failed, number of undefined behaviours)."""
    environment = sanitized(folder / "report")
    # `python -m pytest` and pytest's usual imports would find the ordinary kernels first.
    pytest = Path(sysconfig.get_path("scripts"), "pytest")
    names = [str(ROOT / "tests" / f"{f.parent}/test_{f.name}.py") for f in map(Path, TESTS)]
    commands = [
        [str(pytest), *names, "-k", LEFT_OUT, "-m", "not slow", "-n", processes,
         "-p", "no:cacheprovider", "--import-mode=importlib"],
        [sys.executable, "-m", "tools.fuzz", "--first", "0", "--cases", str(cases),
         "--backends", "cpu", "cuda"],
    ]  # fmt: skip
    failed = undefined = 0
    for command in commands:
        run = subprocess.Popen(
            command, env=environment, cwd=BUILD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        for line in run.stdout:
            print(line, end="", flush=True)
            undefined += UNDEFINED in line
        failed += run.wait() != 0
    return failed, undefined


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", action="store_true", help="use what was built before")
    parser.add_argument("--processes", default="auto", help="of the tests")
    parser.add_argument("--cases", type=int, default=CASES, help="of the fuzzer")
    options = parser.parse_args()
    started, folder = time.monotonic(), BUILD / "reports"
    if not options.keep:
        build()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prove(folder)
    print(f"sanitizers: built and proven after {time.monotonic() - started:.0f} s", flush=True)
    failed, undefined = run_tests(folder, options.processes, options.cases)
    found = reports(folder)
    for report in found:
        print(report.read_text())
    seconds = time.monotonic() - started
    count = len(found) + undefined
    print(f"sanitizers: {count} reports, {failed} of 2 runs failed, {seconds:.0f} s")
    return bool(count or failed)


if __name__ == "__main__":
    raise SystemExit(main())
