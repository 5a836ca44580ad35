"""The fuzzer itself: fixed cases find nothing, and it finds what is wrong, ends or does not."""

import re
import sys

import pytest
import torch

from tests.cases import fuzz as fuzz_cases
from tools import fuzz

import rlhf_kernels as rk

FIRST, CASES = 5100, 70
# Operations without gradients.
CONSTANT = ("gae", "mismatch_weights", "optimal_token_baseline")


def test_fixed_cases_find_nothing():
    found = [fuzz.run_case(seed, ["cpu"]) for seed in range(FIRST, FIRST + CASES)]
    assert [w for w in found if w is not None] == []


def test_fixed_cases_of_other_backends_find_nothing():
    seeds = [s for s in range(FIRST, FIRST + CASES) if fuzz.backend_of(s) != "cpu"]
    assert {fuzz.backend_of(s) for s in seeds} == {"cuda", "triton"}
    found = [fuzz.run_case(seed, ["cuda", "triton"]) for seed in seeds]
    assert [w for w in found if w is not None] == []


def test_every_operation_has_cases():
    computing = {n for n in rk.__all__ if n[0].islower()}
    computing -= {"available_backends", "supports", "use_backend", "warmup"}
    assert {c.__name__ for c in fuzz_cases.CASES} == computing


def cases_of(op, count):
    """Seeds of cases of this operation on the CPU kernels; where inputs may want gradients, do."""
    found, seed = [], FIRST
    while len(found) < count:
        if fuzz.backend_of(seed) == "cpu":
            case = fuzz_cases.make(seed, interpreted=False)
            given = [v for v in case.arguments.values() if isinstance(v, torch.Tensor)]
            wanted = given if op in CONSTANT else [t for t in given if t.requires_grad]
            if case.op == op and any(t.numel() > 8 for t in wanted):
                found.append(seed)
        seed += 1
    return found


@pytest.mark.parametrize(
    "op", ["token_logprobs", "kl_divergence", "value_loss", "policy_loss", *CONSTANT]
)
def test_a_wrong_digit_is_found(monkeypatch, op):
    run = fuzz_cases.run

    def wrong(case, arguments):
        """Calls in float64 are the oracle's; others are off by a thousandth, 16 bits by a tenth."""
        results, upstream = run(case, arguments)
        given = [v for v in arguments.values() if isinstance(v, torch.Tensor)]
        if any(t.dtype == torch.float64 for t in given):
            return results, upstream
        return [r * (1.001 if r.dtype == torch.float32 else 1.1) for r in results], upstream

    seeds = [seed for seed in cases_of(op, 5) if fuzz.run_case(seed, ["cpu"]) is None]
    assert len(seeds) >= 4
    monkeypatch.setattr(fuzz_cases, "run", wrong)
    found = [fuzz.run_case(seed, ["cpu"]) or "" for seed in seeds]
    # Where all is masked there is nothing to find.
    assert sum("beyond theirs" in f for f in found) >= 2, found


def test_crashes_and_hangs_are_findings(monkeypatch, tmp_path, capfd):
    """A child that dies, and one that does not go on, are named and the next cases run."""
    program = tmp_path / "child.py"
    program.write_text(
        "import os, signal, sys, time\n"
        "first = int(sys.argv[sys.argv.index('--work') + 1])\n"
        "for seed in range(first, 100):\n"
        "    print('case', seed, flush=True)\n"
        "    if seed == 3: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if seed == 5: print('wrong', seed, 'by much', flush=True)\n"
        "    if seed == 7: time.sleep(600)\n"
    )
    monkeypatch.setattr(fuzz, "PROGRAM", (sys.executable, str(program)))
    assert fuzz.fuzz(0, 12, float("inf"), ["cpu"], limit=2.0) == 3
    said = capfd.readouterr().out
    assert re.findall(r"--seed (\d+)\n +(\w+)", said) == [
        ("3", "crashed"),
        ("5", "by"),
        ("7", "did"),
    ]
    assert "SIGSEGV" in said and "12 cases from 0, 3 findings" in said


def test_findings_end_with_a_status(monkeypatch, capsys):
    def broken(*_):
        raise KeyError("of a kernel")

    seed = str(cases_of("token_logprobs", 1)[0])
    monkeypatch.setattr(fuzz_cases, "run", broken)
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--seed", seed])
    assert fuzz.main() == 1 and "KeyError" in capsys.readouterr().out
