"""The doctor reports what is there, and notices kernels that are wrong; warmup runs everything."""

import contextlib
import dataclasses
import json

import pytest
import torch

from tests.run_python import BLOCK_EXTENSION, run_python

import rlhf_kernels as rk
from rlhf_kernels import __main__ as doctor
from rlhf_kernels.kernels import backends
from rlhf_kernels.ops import _calls

DOCTOR = "from rlhf_kernels.__main__ import main\nraise SystemExit(main({}))"


def test_json_report():
    report = json.loads(run_python("-m", "rlhf_kernels", "--json").stdout)
    assert report["ok"] is True
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["rlhf_kernels"] == rk.__version__
    assert report["backends"]["cpu"] == {"available": True, "reason": None}
    assert report["cpu_extension"]["isa"] == report["cpu_extension"]["isas"][-1]
    # Losses over a number per sequence, and a baseline of prefix sums, are a few lines of torch;
    # everything else has kernels.
    selected = report["selected"]["cpu"]
    plain = {"preference_loss", "kto_loss", "reward_model_loss", "sequence_logprobs"}
    plain |= {"optimal_token_baseline", "topk_divergence"}
    assert {name for name, backend in selected.items() if backend == "torch"} == plain
    assert {backend for name, backend in selected.items() if name not in plain} == {"cpu"}
    names = {c["operation"] for c in report["self_check"]}
    assert names == {f.__name__ for f in _calls.OPERATIONS}


def test_text_report_shows_what_is_forced():
    done = run_python("-m", "rlhf_kernels", RLHF_KERNELS_BACKEND="reference")
    assert "RLHF_KERNELS_BACKEND  reference" in done.stdout
    assert "FAIL" not in done.stdout
    assert done.stdout.rstrip().endswith("All is well.")


def test_missing_extension_is_explained():
    done = run_python("-c", BLOCK_EXTENSION + DOCTOR.format("[]"))
    assert "missing: extension _cpu could not be imported: blocked for this test" in done.stdout
    assert "token_logprobs" in done.stdout and "All is well." in done.stdout


def test_forced_backend_that_is_missing_fails():
    code = BLOCK_EXTENSION + DOCTOR.format("['--json']")
    done = run_python("-c", code, check=False, RLHF_KERNELS_BACKEND="cpu")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["ok"] is False
    assert "not available" in report["selected"]["cpu"]["token_logprobs"]


def _wrong(launcher):
    def run(*args):
        logprobs, *rest = launcher(*args)
        return (logprobs + 1e-3, *rest)

    return run


def _nan(launcher):
    def run(*args):
        logprobs, *rest = launcher(*args)
        return (logprobs * torch.nan, *rest)

    return run


def _raises(launcher):
    def run(*args):
        raise RuntimeError("broken on purpose")

    return run


@contextlib.contextmanager
def _cpu_launchers(**launchers):
    """The CPU backend with other launchers of these names."""
    cpu = backends.get("cpu")
    before = backends.install(dataclasses.replace(cpu, launchers={**cpu.launchers, **launchers}))
    try:
        yield
    finally:
        backends.install(before)


@pytest.mark.parametrize("fault", [_wrong, _nan, _raises])
def test_wrong_kernel_is_noticed(capsys, fault):
    launcher = backends.get("cpu").launchers["token_logprobs"]
    with _cpu_launchers(token_logprobs=fault(launcher)):
        assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and "self-check FAILED" in out
    if fault is _raises:
        assert "RuntimeError: broken on purpose" in out


def test_openmp_runtimes_are_found():
    maps = doctor.openmp_runtimes()
    if maps is None:
        pytest.skip("no /proc on this system")
    assert len(maps) == 1


def test_warmup_runs_every_kernel():
    called = set()
    table = backends.get("cpu").launchers

    def recorded(name, launcher):
        def record(*args):
            called.add(name)
            return launcher(*args)

        return record

    state = torch.get_rng_state()
    with _cpu_launchers(**{n: recorded(n, f) for n, f in table.items()}), torch.inference_mode():
        rk.warmup()
    # Variants for the head by way of the head, which overwrites its logits.
    assert called == set(table)
    assert torch.equal(torch.get_rng_state(), state)


def test_warmup_rejects_dtypes_without_kernels():
    with pytest.raises(TypeError, match=r"warmup: dtypes must be from float32.*float64"):
        rk.warmup(dtypes=(torch.float64,))
