"""The benchmark suite measures what it says: gate, records, report. Figures are not judged here."""

import copy
import importlib
import itertools
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.harness.measure")


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.reports.suite")


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
    turns = itertools.repeat(harness.Operands(case.inputs, case.upstream))
    for _ in range(2):
        assert harness.gate(case, provider, case.oracle()) < 1
        prepare, run = harness._steps(case, provider, turns)
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

    passes = iter([torch.square])

    case = square_case(
        harness,
        once=lambda x: next(passes)(x),
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
    assert record["once"] == {"error": "StopIteration: "}
    for name in ("wrong", "broken", "absent", "once"):
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


def test_report_judges_targets(report):
    entry = {
        "limit": "copy",
        "targets": {"eager": 5, "compile": 2, "copy": 0.6},
        "providers": beside({"ours": 2.0, "eager": 12.0, "copy": 1.0}),
    }
    assert report.of_limit(entry) == 0.5
    assert report.target_text(entry, quick=False) == "missed: copy 60%"
    assert report.target_text(entry, quick=True) == ""
    entry["providers"] = beside({"ours": 2.0, "eager": 12.0, "copy": 1.3})
    # compile was not measured, so it cannot be met either.
    assert report.target_text(entry, quick=False) == "met; not measured: compile"
    entry["providers"]["compile"] = beside({"ours": 2.0, "compile": 4.0})["compile"]
    assert report.target_text(entry, quick=False) == "met"
    # A bound on memory that this system cannot measure is not met.
    entry["at_most"] = {"extra_bytes": 8}
    assert report.target_text(entry, quick=False) == "met; not measured: memory"
    # In the rounds that both ran in, whatever each took over all of its own.
    entry["providers"]["eager"]["ours_over"] = timed(0.25)
    assert report.ratio(entry, "eager") == 4
    # Rounding never hides a miss.
    assert report._against("GEMMs", 1 / 1.15, 0.8695) == "**86.95% < 86.96%**"
    assert report._against("eager", 5, 4.97) == "**4.97× < 5×**"
    assert report._against("eager", 5, 5.03) == "5× ≥ 5×"


def test_suite_writes_json_table_and_picture(tmp_path):
    command = [sys.executable, "-m", "benchmarks.run", "smoke", "--quick"]
    command += ["--providers", "eager", "--out", str(tmp_path)]
    # A point of each kind.
    points = "(fp32-logprobs-forward and not backward) or (kl_divergence and fp32)"
    points += " or gae_packed or (policy and 64x) or (value and 64x)"
    run = subprocess.run([*command, "--", "-k", points], cwd=ROOT, capture_output=True, text=True)
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
    assert (tmp_path / "smoke.svg").read_text().count("ours") >= 2
    # A part measured anew takes the place of its own earlier figures, and of no other's.
    again = subprocess.run(
        [*command, "--add", "--", "-k", "policy and 64x"], cwd=ROOT, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stdout + again.stderr
    added = {b["name"]: b for b in json.loads((tmp_path / "smoke.json").read_text())["benchmarks"]}
    before = {b["name"]: b for b in data["benchmarks"]}
    assert added.keys() == before.keys()
    assert {n for n in added if added[n] != before[n]} == {"test_policy_loss[64x2048]"}
    assert not (tmp_path / "smoke.part.json").exists()


def beside(times):
    """Providers of an entry: name -> seconds, ours among them."""
    over = {n: {"ours_over": timed(times["ours"] / t)} for n, t in times.items() if n != "ours"}
    return {n: timed(t, **over.get(n, {})) for n, t in times.items()}


def timed(median, spread=0.02, **more):
    ends = {"p20": median * (1 - spread), "p80": median * (1 + spread)}
    return {"median": median, **ends, "rounds": 20, **more}


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
    command = [sys.executable, "-m", "benchmarks.reports.compare", str(tmp_path / "base.json")]
    command += ["--new", str(tmp_path / "new.json"), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_compare_finds_the_point_that_got_worse_whatever_the_clock(tmp_path):
    base, new = run_of(gae=0.1, kl=0.1), run_of(gae=0.1, kl=0.12)
    # The whole machine at half its speed is no regression.
    for point in new["benchmarks"]:
        for p in point["extra_info"]["providers"].values():
            p.update({k: 2 * p[k] for k in ("median", "p20", "p80")})
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


def test_compare_does_not_judge_by_a_few_rounds(tmp_path):
    base, new = run_of(gae=0.1), run_of(gae=0.2)
    for run in (base, new):
        providers = run["benchmarks"][0]["extra_info"]["providers"]
        providers["eager"]["ours_over"] = timed(providers["ours"]["median"])
    providers["eager"]["ours_over"] |= {"p20": 0.2, "p80": 0.2, "rounds": 1}
    providers["copy"]["rounds"] = 4
    done = compared(tmp_path, base, new)
    assert done.returncode == 0 and done.stdout.count("| unsure |") == 2


def test_compare_fails_where_its_own_run_did(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    compare = importlib.import_module("benchmarks.reports.compare").compare
    # A point that raised while it was timed is in neither list.
    base, new = run_of(gae=0.1, kl=0.1), run_of(gae=0.1)
    assert compare(base, new, 0.1, 0) == 0
    capsys.readouterr()
    assert compare(base, new, 0.1, 1) == 1
    out = capsys.readouterr().out
    assert "Fails now: the run, with exit status 1" in out and "Only in base: kl, 8" in out


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
    command = [sys.executable, "-m", "benchmarks.reports.compare", str(tmp_path / "base.json")]
    done = subprocess.run(
        [*command, "--", "-k", "test_policy_loss and 64x"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| better |") == 2


def report_entry(op, targets, providers, limit="copy", **more):
    return {
        "op": op,
        "label": "8",
        "mode": "forward+backward",
        "limit": limit,
        "moved": 64,
        "targets": targets,
        "providers": beside(providers),
        "at_most": {},
        **more,
    }


def report_of(tmp_path, entries, **machine):
    """The JSON of a run of these entries, by test name."""
    info = {"cpu": "a", "threads": 2, "cores": 2, "cpu_capability": "AVX512", "device": "cpu"}
    info |= {"backend": "cpu", "torch": "2", "python": "3", "peers": {}, "quick": False} | machine
    benchmarks = [{"name": n, "extra_info": e} for n, e in entries.items()]
    data = {
        "machine_info": info,
        "commit_info": {"id": "c" * 40},
        "datetime": "2026-01-01",
        "benchmarks": benchmarks,
        "failures": [],
    }
    file = tmp_path / "r.json"
    file.write_text(json.dumps(data))
    return file


def run_report(*arguments):
    command = [sys.executable, "-m", "benchmarks.reports.suite", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_report_sets_each_target_beside_what_was_measured(tmp_path):
    head = report_entry(
        "linear_policy_loss",
        {"eager": 1.4, "trl": 2, "GEMMs": 0.9},
        {"ours": 1.0, "eager": 1.3, "trl": 3.0, "GEMMs": 0.95, "copy": 0.1, "read": 0.1},
        "GEMMs",
        at_most={"extra_bytes": 1 << 20},
        flops=19e9,
    )
    head["providers"]["ours"] |= {"extra_bytes": 3 << 20, "peak_bytes": 4 << 20, "fresh": True}
    head["providers"]["trl"]["peak_bytes"] = 9 << 20
    gae = report_entry(
        "gae",
        {"eager": 100, "vectorized": 5, "compile": 5},
        {"ours": 1.0, "eager": 200.0, "vectorized": 4.0, "compile": 6.0, "copy": 1.0, "read": 1.0},
    )
    group = report_entry(
        "group_advantages", {}, {"ours": 1.0, "eager": 0.5, "copy": 0.1, "read": 0.1}
    )
    names = ("test_linear_policy_loss[fp32]", "test_gae[512x4096]", "test_group_advantages")
    file = report_of(tmp_path, dict(zip(names, (head, gae, group), strict=True)))
    text = run_report(file)
    assert (tmp_path / "r.md").read_text() == text.removesuffix("\n")
    rows = [line for line in text.partition("## Targets")[2].splitlines() if line[:1] == "|"]
    row = next(r for r in rows if "linear_policy_loss, " in r)
    for cell in ("**1.3× < 1.4×**", "95% ≥ 90% GEMMs", "TRL: 3× ≥ 2×", "**3 > 1 MiB**", "missed"):
        assert cell in row, row
    # Any vectorised form: the faster of the two.
    assert "| 200× ≥ 100× | **4× < 5×** |" in next(r for r in rows if "gae, " in r)
    # A row of the design that was not measured stays in its place and says so.
    assert any("linear_policy_loss[bf16]" in r and "not measured" in r for r in rows)
    assert "| group_advantages, forward+backward | 8 | 1000 | 980–1020 | **0.5×** |" in text
    assert "- group_advantages, forward+backward, 8: eager 0.5×" in text
    # Products of ours beside the bare ones; else bytes.
    assert "| 95% GEMMs | 19 of 20 GFLOP/s | missed" in text
    assert "| 10% copy | 6.4e-08 GB/s |" in text
    assert "- linear_policy_loss, 8: ours 4*, TRL 9\n" in text
    picture = (tmp_path / "r.svg").read_text()
    assert "limit: GEMMs" in picture and "1300 ms, 73%" in picture
    before = (tmp_path / "r.md").stat().st_mtime_ns
    first, second = run_report(file, "--readme").split("\n\n")[:2]
    assert "| group_advantages, forward+backward | 8 | 1000 | **0.5×** |" in first
    # The head's table has the memory too: of ours, eager and TRL.
    assert "| 95% GEMMs | 4, –, 9 |" in second.splitlines()[2]
    assert (tmp_path / "r.md").stat().st_mtime_ns == before


def test_report_knows_every_point_it_names(report):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/points",
        "--collect-only",
        "--full",
        "-q",
    ]
    command += ["-o", "addopts=", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = {line.partition("::")[2] for line in done.stdout.splitlines()}
    assert {*report.TARGETED, *report.README, *report.README_HEAD} <= names, done.stdout


def test_results_of_another_machine_are_not_added(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    merged = importlib.import_module("benchmarks.run").merged
    old, new = run_of(gae=0.1), run_of(gae=0.2, kl=0.1)
    for run in (old, new):
        run["commit_info"] = {"id": "c", "dirty": run is old}
    whole = merged(old, new)
    times = [b["extra_info"]["providers"]["ours"]["median"] for b in whole["benchmarks"]]
    assert times == [0.2, 0.1] and whole["commit_info"]["dirty"]
    # Some points anew, of a full run.
    old["machine_info"]["full"], new["machine_info"]["full"] = True, False
    assert merged(old, new)["machine_info"]["full"]
    new["machine_info"]["cpu"] = "b"
    with pytest.raises(ValueError, match="cpu was a, now b"):
        merged(old, new)


def test_growth_fits_slopes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    growth_report = importlib.import_module("benchmarks.reports.growth")
    xs = [1, 2, 4, 8]
    assert growth_report.fit(xs, [3.0 * x for x in xs]) == pytest.approx((1, 0), abs=1e-12)
    assert growth_report.fit(xs, [5.0, 5.0, 5.0, 5.0]) == pytest.approx((0, 0), abs=1e-12)
    # Of squares it is 2, and that is not what was expected of a linear operation.
    squares = [float(x * x) for x in xs]
    assert growth_report.verdict(xs, squares, 2) == "as expected"
    assert "not" in growth_report.verdict(xs, squares, 1)
    noisy = [1.0, 5.0, 3.0, 20.0]
    assert growth_report.verdict(xs, noisy, 1) == "unsure"
    assert "not" in growth_report.verdict(xs, noisy, -1)


def test_growth_times_all_in_the_same_rounds(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    growth = importlib.import_module("benchmarks.studies.growth")
    order, clock = [], iter(range(1000))

    class Clock:
        def start(self, ahead):
            pass

        def stop(self):
            return {"ours": 0.1, "eager": 1.0}[order[-1]] + 1e-3 * next(clock)

    monkeypatch.setattr(growth.clocks, "timer", lambda device: Clock())
    calls = {n: (lambda n=n: order.append(n)) for n in ("ours", "eager")}
    for budget, rounds in ((0.0, growth.LEAST_ROUNDS), (5.5, 5), (1e9, growth.MOST_ROUNDS)):
        order.clear()
        growth.seconds(calls, budget)
        assert order == ["ours", "eager"] * rounds


def test_growth_writes_curves_into_the_report(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.studies.growth",
        "r",
        "--quick",
        "--out",
        str(tmp_path),
    ]
    entry = report_entry("gae", {}, {"ours": 1.0, "copy": 1.0, "read": 1.0})
    report_of(tmp_path, {"test_gae[512x4096]": entry})
    # Of another machine: it goes.
    (tmp_path / "r-growth.json").write_text(json.dumps({"cpu": "a", "curves": {"gae": []}}))
    for op in ("policy", "kl"):
        done = subprocess.run([*command, "--only", op], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "r-growth.json").read_text())
    # The second run kept the first one's curves.
    assert [op.partition(",")[0] for op in data["curves"]] == ["policy_loss", "kl_divergence"]
    for parts in data["curves"].values():
        for curve in parts:
            assert len(curve["seconds"]) == len(curve["xs"])
            assert all(t > 0 for p in curve["seconds"] for t in p.values())
            assert (curve["bytes"] is None) == (curve["axis"] == "threads")
    # The report of that name has them at once.
    text = (tmp_path / "r.md").read_text()
    rows = [r for r in text.partition("## Growth")[2].splitlines() if "| time | 1 |" in r]
    assert {r.split(",")[0] for r in rows} == {"| policy_loss", "| kl_divergence"}
    for file in ("r-growth-policy-loss.svg", "r-growth-kl-divergence.svg"):
        assert file in text and "expected of ours: slope 1" in (tmp_path / file).read_text()


def test_a_whole_step_is_the_sum_of_its_parts(tmp_path):
    command = [sys.executable, "-m", "benchmarks.studies.whole_step", "r", "--quick"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    steps = json.loads((tmp_path / "r-step.json").read_text())["steps"]
    assert steps.keys() == {"ppo", "grpo"}
    for name, critics in (("ppo", 3), ("grpo", 0)):
        seconds = steps[name]["seconds"]
        assert {"eager", "ours"} <= seconds.keys()
        assert seconds["ours"].keys() == seconds["eager"].keys()
        assert sum("critic" in part for part in seconds["ours"]) == critics
    # Known times: 6 of 10 seconds are the model's own, ours saves 3 of the other 4.
    parts = {"old: layers": 2.0, "advantages": 4.0, "policy update: layers backward": 3.0}
    parts["optimizer"] = 1.0
    step = {**steps["ppo"], "seconds": {"eager": parts, "ours": parts | {"advantages": 1.0}}}
    stamp = {"torch": "2", "threads": 2, "quick": False}
    (tmp_path / "r-step.json").write_text(json.dumps({**stamp, "steps": {"ppo": step}}))
    entry = report_entry("gae", {}, {"ours": 1.0, "copy": 1.0, "read": 1.0})
    text = run_report(report_of(tmp_path, {"test_gae[512x4096]": entry}))
    section = text.partition("## A whole step")[2]
    assert "| advantages | 4000 | 1000 | 40.0% | 30.0% |" in section
    assert "| **model's own** | 6000 | 6000 | 60.0% | nothing can be |" in section
    assert "would make it 1.7× as fast; ours makes it 1.4×" in section


def test_a_whole_step_refuses_a_wrong_provider(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    step = importlib.import_module("benchmarks.studies.whole_step")

    def wrong():
        ops = step.eager()
        return ops._replace(value=lambda *tensors: 1.01 * ops.value(*tensors))

    monkeypatch.setattr(step, "PROVIDERS", {"eager": step.eager, "ours": wrong})
    with pytest.raises(
        importlib.import_module("benchmarks.harness.measure").GateError, match="ours: a"
    ):
        step.measure("ppo", True)
