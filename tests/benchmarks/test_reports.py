"""Runs of the benchmarks and what is made of them: merging, reports, comparisons, studies."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tools import tables

from benchmarks import ROOT
from benchmarks.harness.measure import GateError
from benchmarks.reports import compare, machines, suite
from benchmarks.reports import growth as growth_report
from benchmarks.run import merged
from benchmarks.studies import growth


def program(name, *words):
    """Output of a program of the benchmarks, which must succeed."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def timed(median, spread=0.02, **more):
    ends = {"p20": median * (1 - spread), "p80": median * (1 + spread)}
    return {"median": median, **ends, "rounds": 20, **more}


def beside(times):
    """Providers of an entry: name -> seconds, ours among them."""
    over = {n: {"ours_over": timed(times["ours"] / t)} for n, t in times.items() if n != "ours"}
    return {n: timed(t, **over.get(n, {})) for n, t in times.items()}


def entry(op, targets, providers, limit="copy", **more):
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


def run_of(entries, **machine):
    """The JSON of a run of these entries, by test name."""
    info = {"cpu": "a", "threads": 2, "cores": 2, "cpu_capability": "AVX512", "device": "cpu"}
    info |= {"backend": "cpu", "torch": "2", "python": "3", "peers": {}, "quick": False} | machine
    return {
        "machine_info": info,
        "commit_info": {"id": "c" * 40},
        "datetime": "2026-01-01",
        "benchmarks": [{"name": n, "extra_info": e} for n, e in entries.items()],
        "failures": [],
    }


def times_of(**ours):
    """A run of points, each of which eager has 1 s for: name -> seconds of ours."""
    return run_of(
        {
            f"test_{n}": entry(n, {}, {"ours": s, "eager": 1.0, "copy": 0.05})
            for n, s in ours.items()
        }
    )


def providers(run, index=0):
    return run["benchmarks"][index]["extra_info"]["providers"]


def test_tables_have_a_cell_for_each_column():
    lines = tables.table(["a", "b", "c"], [["x", "1", "y"]], right=1)
    assert lines == ["| a | b | c |", "|---|---:|---|", "| x | 1 | y |"]
    with pytest.raises(ValueError, match="2 cells in a table of 3 columns"):
        tables.table(["a", "b", "c"], [["x", "1"]])


def test_report_judges_targets():
    targets = {"eager": 5, "compile": 2, "copy": 0.6}
    point = entry("square", targets, {"ours": 2.0, "eager": 12.0, "copy": 1.0})
    assert suite.of_limit(point) == 0.5
    assert suite.target_text(point, quick=False) == "missed: copy 60%"
    assert suite.target_text(point, quick=True) == ""
    point["providers"] = beside({"ours": 2.0, "eager": 12.0, "copy": 1.3})
    # compile was not measured, so it cannot be met either.
    assert suite.target_text(point, quick=False) == "met; not measured: compile"
    point["providers"]["compile"] = beside({"ours": 2.0, "compile": 4.0})["compile"]
    assert suite.target_text(point, quick=False) == "met"
    # A bound on memory that this system cannot measure is not met.
    point["at_most"] = {"extra_bytes": 8}
    assert suite.target_text(point, quick=False) == "met; not measured: memory"
    # In the rounds that both ran in, whatever each took over all of its own.
    point["providers"]["eager"]["ours_over"] = timed(0.25)
    assert suite.ratio(point, "eager") == 4
    # Rounding never hides a miss.
    assert suite._against("GEMMs", 1 / 1.15, 0.8695) == "**86.95% < 86.96%**"
    assert suite._against("eager", 5, 4.97) == "**4.97× < 5×**"
    assert suite._against("eager", 5, 5.03) == "5× ≥ 5×"


def test_report_sets_each_target_beside_what_was_measured(tmp_path, capsys):
    rates = {"copy": 0.1, "read": 0.1}
    head = entry(
        "linear_policy_loss",
        {"eager": 1.4, "trl": 2, "GEMMs": 0.9},
        {"ours": 1.0, "eager": 1.3, "trl": 3.0, "GEMMs": 0.95, **rates},
        "GEMMs",
        at_most={"extra_bytes": 1 << 20},
        flops=19e9,
    )
    head["providers"]["ours"] |= {"extra_bytes": 3 << 20, "peak_bytes": 4 << 20, "fresh": True}
    head["providers"]["trl"]["peak_bytes"] = 9 << 20
    gae = entry(
        "gae",
        {"eager": 100, "vectorized": 5, "compile": 5},
        {"ours": 1.0, "eager": 200.0, "vectorized": 4.0, "compile": 6.0, "copy": 1.0, "read": 1.0},
    )
    group = entry("group_advantages", {}, {"ours": 1.0, "eager": 0.5, **rates})
    names = ("test_linear_policy_loss[fp32]", "test_gae[512x4096]", "test_group_advantages")
    file = tmp_path / "r.json"
    file.write_text(json.dumps(run_of(dict(zip(names, (head, gae, group), strict=True)))))
    suite.main([str(file)])
    text = (tmp_path / "r.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    rows = [line for line in text.partition("## Targets")[2].splitlines() if line[:1] == "|"]
    row = next(r for r in rows if "linear_policy_loss, " in r)
    for cell in ("**1.3× < 1.4×**", "95% ≥ 90% GEMMs", "TRL: 3× ≥ 2×", "**3 > 1 MiB**", "missed"):
        assert cell in row, row
    # Any vectorised form: the faster of the two.
    assert "| 200× ≥ 100× | **4× < 5×** |" in next(r for r in rows if "gae, " in r)
    # The short form leaves out what it does not measure, and says how much that is.
    targets = text.partition("## Targets")[2].partition("##")[0]
    assert "linear_policy_loss[bf16]" not in targets and "not measured" not in targets
    assert f"`make bench-full` has {len(suite.TARGETED) - 2} more." in text
    for line in (
        "| group_advantages, forward+backward | 8 | 1000 | 980–1020 | **0.5×** |",
        "- group_advantages, forward+backward, 8: eager 0.5×",
        # Products of ours beside the bare ones; else bytes.
        "| 95% GEMMs | 19 of 20 GFLOP/s | missed",
        "| 10% copy | 6.4e-08 GB/s |",
        "- linear_policy_loss, 8: ours 4*, TRL 9\n",
    ):
        assert line in text, line
    picture = (tmp_path / "r.svg").read_text()
    assert "limit: GEMMs" in picture and "1300 ms, 73%" in picture
    (tmp_path / "r.md").unlink()
    suite.main([str(file), "--readme"])
    first, second = capsys.readouterr().out.split("\n\n")[:2]
    assert "| group_advantages, forward+backward | 8 | 1000 | **0.5×** |" in first
    # The head's table has the memory too: of ours, eager and TRL.
    assert "| 95% GEMMs | 4, –, 9 |" in second.splitlines()[2]
    assert not (tmp_path / "r.md").exists()


def test_a_busy_machine_is_told(tmp_path, capsys):
    run = times_of(**{f"gae{i}": 0.1 for i in range(12)})
    found = [b["extra_info"] for b in run["benchmarks"]]
    for i, e in enumerate(found):
        e |= {"copy_rate": 10e9 if i < 8 else 8e9, "disagreement": 1.3 if i == 3 else 1.1}
    assert suite.drift(found) == pytest.approx(1.25)
    assert suite.drift(found[:8]) is None
    file = tmp_path / "r.json"
    file.write_text(json.dumps(run))
    suite.main([str(file)])
    text = capsys.readouterr().out
    assert "**The machine was busy: its copy rate differed by 25% between thirds" in text
    assert "1 of 12 points, marked ~, differ by more than 15%" in text
    assert text.count("| 8 ~ |") == 1
    for e in found:
        e |= {"copy_rate": 10e9, "disagreement": 1.1}
    assert suite.busy_lines(found) == []


def test_machines_side_by_side(tmp_path):
    """Shows ratios within each run, and a dash for a point that a machine lacks."""
    one, two = times_of(gae=0.1, kl=2.0), times_of(gae=0.25)
    two["machine_info"] = {**two["machine_info"], "cpu": "Other CPU"}
    for name, run in (("one", one), ("two", two)):
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    page = tmp_path / "machines.md"
    machines.main([str(tmp_path / f"{n}.json") for n in ("one", "two")] + ["--out", str(page)])
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        "| gae, forward+backward | 8 | 10× | – | 50% copy | 4× | – | 20% copy |",
        "| kl, forward+backward | 8 | **0.5×** | – | 2% copy | – | – | – |",
    ]
    assert "- B: Other CPU" in page.read_text()


def compared(tmp_path, capsys, base, new, *options):
    """(exit status, output, errors) of a comparison."""
    for name, data in (("base", base), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    files = [str(tmp_path / "base.json"), "--new", str(tmp_path / "new.json")]
    return compare.main([*files, *options]), *capsys.readouterr()


def test_compare_finds_the_point_that_got_worse_whatever_the_clock(tmp_path, capsys):
    base, new = times_of(gae=0.1, kl=0.1), times_of(gae=0.1, kl=0.12)
    # The whole machine at half its speed is no regression.
    for i in range(2):
        for p in providers(new, i).values():
            p["median"] *= 2
    status, out, _ = compared(tmp_path, capsys, base, new)
    worse = [line for line in out.splitlines() if "WORSE" in line and line[0] == "|"]
    assert status == 1 and len(worse) == 2 and out.count("| gae, 8 |") == 2
    assert all("kl, 8" in line and "+20%" in line for line in worse)
    assert compared(tmp_path, capsys, base, new, "--tolerance", "0.3")[0] == 0
    status, out, _ = compared(tmp_path, capsys, new, base)
    assert status == 0 and out.count("| better |") == 2


def test_compare_allows_what_the_rounds_leave_open_and_says_so(tmp_path, capsys):
    base, new = times_of(gae=0.1), times_of(gae=0.13)
    providers(new)["eager"]["ours_over"] = timed(0.13, spread=0.3)
    status, out, _ = compared(tmp_path, capsys, base, new)
    assert status == 1 and out.count("| unsure |") == 1 == out.count("| WORSE |")
    # A few rounds judge nothing.
    providers(new)["copy"]["ours_over"] |= {"rounds": 1}
    status, out, _ = compared(tmp_path, capsys, base, new)
    assert status == 0 and out.count("| unsure |") == 2


def test_compare_names_what_only_one_run_has_and_what_fails(tmp_path, capsys):
    base, new = times_of(gae=0.1, old=0.1), times_of(gae=0.1, fresh=0.1)
    del providers(new)["eager"]
    status, out, _ = compared(tmp_path, capsys, base, new)
    assert status == 0 and "Only in base: old, 8" in out and "Only in new: fresh, 8" in out
    assert "One ratio missing: gae, 8: ÷ eager only in base" in out
    # A point that raised while it was timed is in neither list.
    assert compare.compare(base, new, 0.1, status=1) == 1
    assert "Fails now: the run, with exit status 1" in capsys.readouterr().out
    failed = dict(new["benchmarks"][1]["extra_info"])
    new["failures"] = [failed | {"providers": {"ours": {"error": "result 0 is off"}}}]
    status, out, _ = compared(tmp_path, capsys, base, new)
    assert status == 1 and "Fails now: fresh 8 forward" in out


def test_compare_refuses_runs_that_are_not_alike(tmp_path, capsys):
    base, new = times_of(gae=0.1), times_of(gae=0.1)
    new["machine_info"].update(quick=True, cpu="b")
    status, out, errors = compared(tmp_path, capsys, base, new)
    assert status == 2 and "quick: base False, new True" in errors
    assert "Not the same cpu: base a, new b" in out
    status, _, errors = compared(tmp_path, capsys, base, times_of(kl=0.1))
    assert status == 2 and "no point is in both runs" in errors


def test_results_of_another_machine_are_not_added():
    old, new = times_of(gae=0.1), times_of(gae=0.2, kl=0.1)
    for run in (old, new):
        run["commit_info"] = {"id": "c", "dirty": run is old}
    old["machine_info"]["full"] = True
    whole = merged(old, new)
    assert [providers(whole, i)["ours"]["median"] for i in range(2)] == [0.2, 0.1]
    assert whole["commit_info"]["dirty"] and whole["machine_info"]["full"]
    new["machine_info"]["cpu"] = "b"
    with pytest.raises(ValueError, match="cpu was a, now b"):
        merged(old, new)


def test_a_run_writes_json_table_and_picture_and_what_follows_adds_to_them(tmp_path):
    words = ["smoke", "--quick", "--out", tmp_path]
    # A point of each kind; what needs a GPU is named.
    points = "(fp32-logprobs-forward and not backward) or (kl_divergence and fp32) or gae_packed"
    points += " or (policy_loss and 64x) or (value and 64x) or support and fp32"
    points += " or preference_loss or sequence"
    program("run", *words, "--providers", "eager,trl kernel,liger,quack", "--", "-k", points)
    text = (tmp_path / "smoke.json").read_text()
    data = json.loads(text)
    ops = {"token_logprobs", "kl_divergence", "gae packed", "policy_loss", "value_loss"}
    ops |= {"mismatch_weights"}
    ops |= {"token_logprobs, support", "preference_loss", "sequence_logprobs"}
    assert {b["extra_info"]["op"] for b in data["benchmarks"]} == ops
    assert data["failures"] == [] and data["machine_info"]["backend"] == "cpu"
    for b in data["benchmarks"]:
        for name in ("ours", "eager", "copy", "read"):
            assert b["extra_info"]["providers"][name]["median"] > 0, b["name"]
    # Nothing that names this machine or its user.
    for secret in (str(ROOT), str(tmp_path), str(Path.home()) + "/", platform.node()):
        assert secret not in text
    report = (tmp_path / "smoke.md").read_text()
    assert "| kl_divergence, forward | fp32 two 24×1000 |" in report
    for name in ("trl kernel", "liger", "quack"):
        assert f"- {name} skipped: needs a GPU" in report
    assert (tmp_path / "smoke.svg").read_text().count("ours") >= 2
    # A part measured anew takes the place of its own earlier figures, and of no other's. So slow an
    # earlier figure that it is better now, whatever the machine.
    providers(data)["ours"] |= {"median": 1e6}
    name = data["benchmarks"][0]["name"]
    (tmp_path / "smoke.json").write_text(json.dumps(data))
    program("run", *words, "--add", "--providers", "eager", "--", "-k", name.partition("[")[0])
    added = json.loads((tmp_path / "smoke.json").read_text())["benchmarks"]
    before = {b["name"]: b for b in data["benchmarks"]}
    now = {b["name"]: b for b in added if b["name"] in before}
    assert now.keys() == before.keys() and now[name] != before[name]
    others = [n for n in before if n.partition("[")[0] != name.partition("[")[0]]
    assert len(others) >= 5 and all(now[n] == before[n] for n in others)
    assert not (tmp_path / "smoke.part.json").exists()


def test_compare_runs_the_suite_as_the_base_was_run(tmp_path):
    base = times_of(x=1e6)
    base["machine_info"]["quick"] = True
    base["benchmarks"][0]["name"] = "test_policy_loss[64x2048]"
    base["benchmarks"][0]["extra_info"]["label"] = "fp32 4×50"
    (tmp_path / "base.json").write_text(json.dumps(base))
    words = [tmp_path / "base.json", "--", "-k", "test_policy_loss and 64x"]
    assert program("reports.compare", *words).count("| better |") == 2


def test_every_point_that_a_report_names_exists():
    command = [sys.executable, "-m", "pytest", "benchmarks/points", "--collect-only", "--full"]
    command += ["-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = {line.partition("::")[2] for line in done.stdout.splitlines()}
    assert {*suite.TARGETED, *suite.README, *suite.README_HEAD} <= names, done.stdout


@pytest.mark.skipif(platform.system() != "Linux", reason="resident high-water mark is Linux's")
def test_memory_in_a_fresh_process_goes_into_the_results(tmp_path):
    points = "(bf16-entropy-forward+backward and not 2048x) or kl_penalty"
    words = ["--quick", "--providers", "eager", "--out", tmp_path]
    program("run", "r", *words, "--", "-k", points)
    file = tmp_path / "r.json"
    for _ in range(2):
        out = program("studies.memory", file)
        found = {b["name"]: b["extra_info"] for b in json.loads(file.read_text())["benchmarks"]}
        logits = found.pop("test_token_logprobs[bf16-entropy-forward+backward]")["providers"]
        assert logits["ours"]["fresh"] and logits["eager"]["fresh"]
        # The gradient at least: 24×1000 of two bytes.
        assert logits["eager"]["peak_bytes"] >= 24 * 1000 * 2
        assert not any("fresh" in p for e in found.values() for p in e["providers"].values())
    # What is there is not measured again.
    assert out == ""


def test_growth_fits_slopes():
    xs = [1, 2, 4, 8]
    assert growth_report.fit(xs, [3.0 * x for x in xs]) == pytest.approx((1, 0), abs=1e-6)
    assert growth_report.slope_text(xs, [5.0] * 4) == "0.00 ± 0.00"
    assert growth_report.fit([1, 2], [3.0, 12.0]) == pytest.approx((2, 0))
    # Computed from the sums of the formulas.
    noisy = [1.0, 5.0, 3.0, 20.0]
    assert growth_report.fit(xs, noisy) == pytest.approx((1.2228819, 0.4665784), abs=1e-6)
    # Of squares it is 2, and that is not what was expected of a linear operation.
    squares = [float(x * x) for x in xs]
    assert growth_report.verdict(xs, squares, 2) == "as expected"
    assert "not" in growth_report.verdict(xs, squares, 1)
    assert growth_report.verdict(xs, noisy, 1) == "unsure"
    assert "not" in growth_report.verdict(xs, noisy, -1)


def test_growth_times_all_in_the_same_rounds(monkeypatch):
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


def bare_run(file):
    """A run of that name, whose report takes in what lies beside it."""
    point = entry("gae", {}, {"ours": 1.0, "copy": 1.0, "read": 1.0})
    file.write_text(json.dumps(run_of({"test_gae[512x4096]": point})))


def test_growth_writes_curves_into_the_report(tmp_path):
    bare_run(tmp_path / "r.json")
    # These curves are another machine's, so the program drops them.
    (tmp_path / "r-growth.json").write_text(json.dumps({"cpu": "a", "curves": {"gae": []}}))
    for op in ("policy", "kl"):
        program("studies.growth", "r", "--quick", "--out", tmp_path, "--only", op)
    data = json.loads((tmp_path / "r-growth.json").read_text())
    # The second run kept the first one's curves.
    assert [op.partition(",")[0] for op in data["curves"]] == ["policy_loss", "kl_divergence"]
    for curve in (c for parts in data["curves"].values() for c in parts):
        assert len(curve["seconds"]) == len(curve["xs"])
        assert all(t > 0 for p in curve["seconds"] for t in p.values())
        assert (curve["bytes"] is None) == (curve["axis"] == "threads")
    # The report of that name has them at once.
    text = (tmp_path / "r.md").read_text()
    rows = [r for r in text.partition("## Growth")[2].splitlines() if "| time | 1 |" in r]
    assert {r.split(",")[0] for r in rows} == {"| policy_loss", "| kl_divergence"}
    for name in ("r-growth-policy-loss.svg", "r-growth-kl-divergence.svg"):
        assert name in text and "expected of ours: slope 1" in (tmp_path / name).read_text()


def test_a_whole_step_is_the_sum_of_its_parts(tmp_path, monkeypatch):
    step = pytest.importorskip("benchmarks.studies.whole_step")
    found = {name: step.measure(name, True) for name in ("ppo", "grpo")}
    for name, critics in (("ppo", 3), ("grpo", 0)):
        seconds = found[name]["seconds"]
        assert {"eager", "ours"} <= seconds.keys()
        assert seconds["ours"].keys() == seconds["eager"].keys()
        assert sum("critic" in part for part in seconds["ours"]) == critics
    # Known times: 6 of 10 seconds are the model's own, ours saves 3 of the other 4.
    parts = {"old: layers": 2.0, "advantages": 4.0, "policy update: layers backward": 3.0}
    parts["optimizer"] = 1.0
    known = {**found["ppo"], "seconds": {"eager": parts, "ours": parts | {"advantages": 1.0}}}
    stamp = {"torch": "2", "threads": 2, "quick": False, "steps": {"ppo": known}}
    (tmp_path / "r-step.json").write_text(json.dumps(stamp))
    bare_run(tmp_path / "r.json")
    suite.main([str(tmp_path / "r.json")])
    section = (tmp_path / "r.md").read_text().partition("## A whole step")[2]
    assert "| advantages | 4000 | 1000 | 40.0% | 30.0% |" in section
    assert "| **model's own** | 6000 | 6000 | 60.0% | nothing can be |" in section
    assert "would make it 1.7× as fast; ours makes it 1.4×" in section

    def wrong():
        ops = step.eager()
        return ops._replace(value=lambda *tensors: 1.01 * ops.value(*tensors))

    monkeypatch.setattr(step, "PROVIDERS", {"eager": step.eager, "ours": wrong})
    with pytest.raises(GateError, match="ours: a"):
        step.measure("ppo", True)
