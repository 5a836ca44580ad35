"""Which backend and instruction set serve a call, and that every instruction set is right."""

import re
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.run_python import BLOCK_EXTENSION, run_python

import rlhf_kernels as rk
from rlhf_kernels.kernels import backends, native
from rlhf_kernels.ops import _calls
from rlhf_kernels.testing import (
    DTYPES,
    RAGGED_SIZES,
    assert_bitwise_equal,
    assert_within_budget,
    to_float64,
)

CPU = native.module("cpu")
# Where the extension is missing the tests below fail instead of vanishing.
ISAS = tuple(CPU.isa_names()) if CPU is not None else ("missing",)
TESTS = Path(__file__).parents[1]
# Files whose tests run once per backend.
OPERATION_TESTS = [
    file
    for file in sorted(TESTS.rglob("test_*.py"))
    if re.search(r"^def test_\w+\([^)]*\bbackend\b", file.read_text(), re.M)
]
KERNELS = [f for f in _calls.OPERATIONS if f.__name__ in native.launchers("cpu")]

CALL = """
import torch, rlhf_kernels as rk
logits = torch.randn(3, 50)
labels = torch.tensor([1, 2, 3])
def call():
    return rk.token_logprobs(logits, labels).logprobs
"""


@pytest.fixture
def isa(request):
    previous = CPU.isa()
    CPU.select_isa(request.param)
    yield request.param
    CPU.select_isa(previous)


@pytest.mark.parametrize("name", ["gpu", "CPU", "", None])
def test_unknown_backend_is_refused(name):
    with pytest.raises(ValueError, match="expected one of auto, reference, cpu"):
        rk.use_backend(name)


def test_use_backend_nests_and_restores():
    before = backends.current_backend()
    with rk.use_backend("reference"):
        with rk.use_backend("cpu"):
            assert backends.current_backend() == "cpu"
        assert backends.current_backend() == "reference"
        with pytest.raises(KeyError), rk.use_backend("auto"):
            raise KeyError
        assert backends.current_backend() == "reference"
    assert backends.current_backend() == before


def test_named_backend_refuses_other_devices_and_operations():
    with rk.use_backend("cpu"):
        with pytest.raises(RuntimeError, match="'cpu' does not serve meta tensors"):
            backends.select("token_logprobs", torch.device("meta"))
        with pytest.raises(RuntimeError, match="'cpu' does not have this operation"):
            backends.select("no_such_operation", torch.device("cpu"))
    assert rk.available_backends("meta") == ("reference",)
    assert rk.available_backends() == ("cpu", "reference")


def test_environment_forces_the_backend():
    code = (
        CALL
        + "from rlhf_kernels.kernels import backends\n"
        + "print(backends.select('token_logprobs', logits.device))"
    )
    for name in ("reference", "cpu", " CPU "):
        done = run_python("-c", code, RLHF_KERNELS_BACKEND=name)
        assert done.stdout.strip() == name.strip().lower()


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        (
            "RLHF_KERNELS_BACKEND",
            "RLHF_KERNELS_BACKEND: expected one of auto, reference, cpu, cuda, triton, got",
        ),
        ("RLHF_KERNELS_CPU_ISA", "RLHF_KERNELS_CPU_ISA: expected one of baseline"),
    ],
)
def test_bad_environment_variable_is_refused(variable, message):
    done = run_python("-c", "import rlhf_kernels", check=False, **{variable: "nonsense"})
    assert done.returncode == 1
    assert "ValueError: " + message in done.stderr and "'nonsense'" in done.stderr


def test_missing_extension_warns_once_and_uses_the_reference():
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first, second = call(), call()
ours = [w for w in caught if "rlhf_kernels" in str(w.message)]
assert len(ours) == 1, ours
assert "blocked for this test" in str(ours[0].message)
# The warning points at the caller, not into the package.
assert ours[0].filename == "<string>", ours[0].filename
assert rk.available_backends() == ("reference",)
torch.testing.assert_close(first, logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0])
try:
    rk.use_backend("cpu")
except RuntimeError as error:
    assert "'cpu' is not available: extension _cpu" in str(error), error
else:
    raise SystemExit("use_backend('cpu') did not raise")
with rk.use_backend("reference"):
    call()
"""
    run_python("-c", BLOCK_EXTENSION + CALL + code)


@pytest.mark.parametrize(
    "call",
    (
        "rk.linear_token_logprobs(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([1, 2]))",
        "rk.whiten(torch.randn(2, 4))",
    ),
)
def test_the_warning_points_at_the_caller_of_any_operation(call):
    code = f"""
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {call}
[warned] = [w for w in caught if "blocked for this test" in str(w.message)]
assert warned.filename == "<string>", warned.filename
"""
    run_python("-c", BLOCK_EXTENSION + CALL + code)


def test_missing_extension_that_was_named_raises_at_the_call():
    code = BLOCK_EXTENSION + CALL + "call()"
    done = run_python("-c", code, check=False, RLHF_KERNELS_BACKEND="cpu")
    assert done.returncode == 1
    assert "RuntimeError: token_logprobs: backend 'cpu' is not available" in done.stderr


@pytest.mark.parametrize("isa", ISAS)
def test_environment_selects_the_instruction_set(isa):
    code = (
        "from rlhf_kernels import __main__ as doctor\n"
        "from rlhf_kernels.kernels import native\n"
        "print(native.module('cpu').isa())\n"
        "raise SystemExit(doctor.main([]))"
    )
    done = run_python("-c", code, RLHF_KERNELS_CPU_ISA=isa)
    assert done.stdout.splitlines()[0] == isa
    assert f"[{isa}]" in done.stdout


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", KERNELS, ids=lambda f: f.__name__)
def test_every_instruction_set_is_within_budget(isa, function, dtype):
    for size in RAGGED_SIZES:
        generator = torch.Generator().manual_seed(size)
        inputs = _calls.Inputs(3, size, dtype, torch.device("cpu"), generator)
        call = _calls.example(function, inputs)
        with rk.use_backend("cpu"):
            actual = _calls.results(call)
        with rk.use_backend("reference"):
            torch_results = _calls.results(call)
            oracle = _calls.results(call._replace(tensors=to_float64(call.tensors)))
        assert len(actual) == len(oracle) > 0
        for a, o, t in zip(actual, oracle, torch_results, strict=True):
            # Twice the budget of the operation's own tests, which know how large its intermediate
            # values are. The floor is for gradients that are zero, as with a vocabulary of one.
            scale = max(1e-6, float(o.abs().max()))
            assert_within_budget(a, o, t, scale=scale, factor=4.0)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS[:-1])
@pytest.mark.parametrize("file", OPERATION_TESTS, ids=lambda p: str(p.relative_to(TESTS)))
def test_operation_tests_pass_with_lesser_instruction_sets(file, isa):
    options = ["-k", "cpu", "-m", "not slow", "-p", "no:cacheprovider"]
    # Fails also where no test was selected.
    run_python("-m", "pytest", str(file), *options, RLHF_KERNELS_CPU_ISA=isa)


@pytest.mark.parametrize("function", KERNELS, ids=lambda f: f.__name__)
def test_concurrent_calls_give_the_same_bits(function):
    calls = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        inputs = _calls.Inputs(7, 515, torch.float32, torch.device("cpu"), generator)
        calls.append(_calls.example(function, inputs))
    expected = [_calls.results(call) for call in calls]
    failures = []

    def work(index):
        try:
            for _ in range(20):
                for a, e in zip(_calls.results(calls[index]), expected[index], strict=True):
                    assert_bitwise_equal(a, e)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def _steps_during_a_call() -> int:
    """How often this thread comes round its loop while another is inside one native call."""
    logits, labels = torch.zeros(512, 32768), torch.zeros(512, dtype=torch.long)
    steps, span = 0, []

    def work():
        span.append(steps)
        rk.token_logprobs(logits, labels)
        span.append(steps)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        steps += 1
        # Gives the GIL away.
        time.sleep(0)
    thread.join()
    return span[1] - span[0]


def test_native_calls_release_the_gil():
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    # With this interval no thread is forced to release the GIL: while a call holds it, the other
    # thread makes no step.
    sys.setswitchinterval(1e6)
    try:
        with rk.use_backend("cpu"):
            # A core that is busy elsewhere may leave no time for a step during one call.
            steps = [_steps_during_a_call() for _ in range(20)]
    finally:
        torch.set_num_threads(threads)
        sys.setswitchinterval(interval)
    assert max(steps) > 10, steps
