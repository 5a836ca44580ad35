"""The benchmark suite measures what it says: gate, records, report. Figures are not judged here."""

import copy
import importlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.harness")


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.report")


def square_case(harness, **providers):
    x = torch.arange(1.0, 9.0).requires_grad_()
    exact = x.detach().double()
    return harness.Case(
        op="square",
        label="8",
        mode="forward+backward",
        inputs=(x,),
        providers={"ours": lambda x: x * x, **providers},
        oracle=lambda: (exact**2, 2 * exact),
        moved=64,
    )


@pytest.mark.parametrize("mode", ["forward", "backward", "forward+backward"])
def test_a_provider_that_overwrites_its_input_gets_a_copy(harness, mode):
    def spoils(x):
        result = x * x
        x.data.fill_(torch.nan)
        return result

    class Spoiling(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            gradient, result = 2 * x, x * x
            x.data.copy_(gradient)
            ctx.gradient = x.data
            return result

        @staticmethod
        def backward(ctx, upstream):
            return ctx.gradient * upstream

    case = square_case(harness)
    case.mode = mode
    if mode == "forward":
        full = case.oracle
        case.oracle = lambda: full()[:1]
    provider = harness.Overwriting(spoils if mode == "forward" else Spoiling.apply)
    before = case.inputs[0].detach().clone()
    for _ in range(2):
        assert harness.gate(case, provider, case.oracle()) < 1
        prepare, run = harness._steps(case, provider)
        results = run(*prepare())
        torch.testing.assert_close(results[-1].double(), case.oracle()[-1])
    assert torch.equal(case.inputs[0], before)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x * x + 0.1,
        lambda x: x.detach() ** 2 + 1.9 * (x - x.detach()),
        lambda x: x * x * torch.where(x > 7.5, torch.nan, 1.0),
        lambda x: (x * x)[:-1],
    ],
    ids=["value", "gradient", "nan", "shape"],
)
def test_gate_refuses_a_wrong_provider(harness, wrong):
    case = square_case(harness)
    expected = case.oracle()
    assert harness.gate(case, case.providers["ours"], expected) < 1
    with pytest.raises((harness.GateError, RuntimeError)):
        harness.gate(case, wrong, expected)


def test_only_providers_that_pass_are_timed(harness, benchmark):
    calls = []

    def broken(x):
        calls.append(1)
        raise OSError("no such kernel\ndetails")

    case = square_case(
        harness,
        eager=torch.square,
        wrong=lambda x: x * x * 1.01,
        broken=broken,
        absent=harness.Missing("not installed"),
    )
    settings = harness.Settings(device=CPU, quick=True, providers=None)
    failures = []
    harness.measure(benchmark, settings, failures, case)
    record = benchmark.extra_info["providers"]
    assert failures == []
    assert "off by" in record["wrong"]["error"]
    assert record["broken"] == {"error": "OSError: no such kernel"} and len(calls) == 1
    assert record["absent"] == {"skipped": "not installed"}
    for name in ("wrong", "broken", "absent"):
        assert "median" not in record[name]
    # Under xdist pytest-benchmark measures nothing.
    if benchmark.enabled:
        for name in ("ours", "eager", "copy", "read"):
            assert record[name]["rounds"] == harness.QUICK_ROUNDS
            assert 0 < record[name]["p20"] <= record[name]["median"] <= record[name]["p80"]
        assert record["eager"]["ours_over"]["rounds"] == harness.QUICK_ROUNDS


def test_a_wrong_result_of_ours_fails_the_point(harness):
    case = square_case(harness, ours=lambda x: x * x + 1)
    settings = harness.Settings(device=CPU, quick=True, providers=None)
    failures = []
    with pytest.raises(pytest.fail.Exception, match="ours: result 0 is off"):
        harness.measure(None, settings, failures, case)
    assert failures[0]["op"] == "square" and "median" not in failures[0]["providers"]["ours"]


@pytest.mark.skipif(platform.system() != "Linux", reason="resident high-water mark is Linux's")
def test_peak_memory_sees_a_temporary(harness):
    size = 1 << 26
    peak = harness.peak_extra_bytes(lambda: torch.ones(size // 4).sum(), CPU)
    assert size * 0.9 < peak < size * 1.5


def test_report_judges_targets(report):
    entry = {
        "limit": "copy",
        "targets": {"eager": 5, "compile": 2, "copy": 0.6},
        "providers": {
            name: {"median": t} for name, t in {"ours": 2.0, "eager": 12.0, "copy": 1.0}.items()
        },
    }
    assert report.of_limit(entry) == 0.5
    assert report.target_text(entry, quick=False) == "missed: copy 60%"
    assert report.target_text(entry, quick=True) == ""
    entry["providers"]["copy"]["median"] = 1.3
    # compile was not measured, so it cannot be met either.
    assert report.target_text(entry, quick=False) == "met; not measured: compile"
    entry["providers"]["compile"] = {"median": 4.0}
    assert report.target_text(entry, quick=False) == "met"


def test_suite_writes_json_table_and_picture(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/run.py"), "smoke", "--quick"]
    command += ["--providers", "eager", "--out", str(tmp_path)]
    # One point of each file.
    points = "(fp32-logprobs-forward and not backward) or (kl_divergence and fp32)"
    points += " or gae_packed or (policy and 64x) or (value and 64x)"
    run = subprocess.run([*command, "--", "-k", points], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    text = (tmp_path / "smoke.json").read_text()
    data = json.loads(text)
    assert {b["extra_info"]["op"] for b in data["benchmarks"]} == {
        "token_logprobs",
        "kl_divergence",
        "gae packed",
        "policy_loss",
        "value_loss",
    }
    assert data["failures"] == [] and data["machine_info"]["backend"] == "cpu"
    for entry in data["benchmarks"]:
        providers = entry["extra_info"]["providers"]
        assert set(providers) >= {"ours", "eager", "copy", "read"}
        assert all(p["median"] > 0 for p in providers.values()), entry["name"]
    # Nothing that names this machine or its user.
    for secret in (str(ROOT), str(tmp_path), str(Path.home()) + "/", platform.node()):
        assert secret not in text
    assert "| kl_divergence, forward | fp32 two 24×1000 |" in (tmp_path / "smoke.md").read_text()
    assert (tmp_path / "smoke.png").read_bytes().startswith(b"\x89PNG")


def timed(median, spread=0.02, **more):
    return {"median": median, "p20": median * (1 - spread), "p80": median * (1 + spread), **more}


def run_of(**ours):
    """A run of points, each 10 times as fast as eager: name -> seconds of ours."""
    return {
        "machine_info": {"device": "cpu", "backend": "cpu", "quick": False, "cpu": "a"},
        "failures": [],
        "benchmarks": [
            {
                "name": f"test_{name}",
                "extra_info": {
                    "op": name,
                    "label": "8",
                    "mode": "forward",
                    "limit": "copy",
                    "providers": {
                        "ours": timed(seconds),
                        "eager": timed(1.0),
                        "copy": timed(0.05),
                    },
                },
            }
            for name, seconds in ours.items()
        ],
    }


def compared(tmp_path, base, new, *options):
    for name, data in (("base", base), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    command = [sys.executable, str(ROOT / "benchmarks/compare.py"), str(tmp_path / "base.json")]
    command += ["--new", str(tmp_path / "new.json"), *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_compare_finds_the_point_that_got_worse_whatever_the_clock(tmp_path):
    base, new = run_of(gae=0.1, kl=0.1), run_of(gae=0.1, kl=0.12)
    # The whole machine at half its speed is no regression.
    for point in new["benchmarks"]:
        for p in point["extra_info"]["providers"].values():
            p.update({k: 2 * v for k, v in p.items()})
    done = compared(tmp_path, base, new)
    assert done.returncode == 1, done.stderr
    worse = [line for line in done.stdout.splitlines() if "WORSE" in line and line[0] == "|"]
    assert len(worse) == 2 and all("kl, 8" in line and "+20%" in line for line in worse)
    assert done.stdout.count("| gae, 8 |") == 2
    assert compared(tmp_path, base, new, "--tolerance", "0.3").returncode == 0
    done = compared(tmp_path, new, base)
    assert done.returncode == 0 and done.stdout.count("| better |") == 2


def test_compare_allows_what_the_rounds_leave_open_and_says_so(tmp_path):
    base, new = run_of(gae=0.1), run_of(gae=0.13)
    new["benchmarks"][0]["extra_info"]["providers"]["ours"] = timed(0.13, spread=0.3)
    done = compared(tmp_path, base, new)
    assert done.returncode == 0 and done.stdout.count("| unsure |") == 2
    # The rounds were slowed, ours and the others alike: the ratios of each round say more.
    for run, ratio in ((base, 1.0), (new, 1.3)):
        providers = run["benchmarks"][0]["extra_info"]["providers"]
        providers["eager"]["ours_over"] = timed(0.1 * ratio)
    done = compared(tmp_path, base, new)
    assert done.returncode == 1 and done.stdout.count("| WORSE |") == 1


def test_compare_names_what_only_one_run_has_and_what_fails(tmp_path):
    base, new = run_of(gae=0.1, old=0.1), run_of(gae=0.1, fresh=0.1)
    del new["benchmarks"][0]["extra_info"]["providers"]["eager"]
    done = compared(tmp_path, base, new)
    assert done.returncode == 0
    assert "Only in base: old, 8" in done.stdout and "Only in new: fresh, 8" in done.stdout
    assert "One ratio missing: gae, 8: ÷ eager only in base" in done.stdout
    failed = copy.deepcopy(new["benchmarks"][1]["extra_info"])
    failed["providers"]["ours"] = {"error": "result 0 is off"}
    new["failures"] = [failed]
    done = compared(tmp_path, base, new)
    assert done.returncode == 1 and "Fails now: fresh 8 forward" in done.stdout


def test_compare_refuses_runs_that_are_not_alike(tmp_path):
    base, new = run_of(gae=0.1), run_of(gae=0.1)
    new["machine_info"].update(quick=True, cpu="b")
    done = compared(tmp_path, base, new)
    assert done.returncode == 2 and "quick: base False, new True" in done.stderr
    assert "Not the same cpu: base a, new b" in done.stdout
    done = compared(tmp_path, run_of(gae=0.1), run_of(kl=0.1))
    assert done.returncode == 2 and "no point is in both runs" in done.stderr


def test_compare_runs_the_suite_as_the_base_was_run(tmp_path):
    base = run_of(x=1.0)
    base["machine_info"]["quick"] = True
    name = "test_policy_loss[64x2048]"
    base["benchmarks"][0] |= {"name": name}
    base["benchmarks"][0]["extra_info"]["label"] = "fp32 4×50"
    # So slow a base that today is better whatever the machine.
    base["benchmarks"][0]["extra_info"]["providers"]["ours"] = timed(1e6)
    (tmp_path / "base.json").write_text(json.dumps(base))
    command = [sys.executable, str(ROOT / "benchmarks/compare.py"), str(tmp_path / "base.json")]
    done = subprocess.run(
        [*command, "--", "-k", "test_policy_loss and 64x"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| better |") == 2
