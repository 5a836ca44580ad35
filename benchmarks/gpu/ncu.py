"""Hardware counters of the main kernels from Nsight Compute: the part `ncu` of `make gpu-check`."""

import csv
import io
import re
import sys
from typing import Any

from . import profiled
from .process import DONE, FAILED, SKIPPED, Result, Run, find_tool, kernel_backends, status

#: Metric -> its name in the report. A sector has 32 bytes.
METRICS = {
    "gpu__time_duration.sum": "ns",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue %",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "dram__bytes_read.sum": "DRAM read, B",
    "dram__bytes_write.sum": "DRAM written, B",
    "lts__t_sectors_op_read.sum": "L2 read sectors",
    "lts__t_sectors_op_write.sum": "L2 write sectors",
    "l1tex__t_requests_pipe_lsu_mem_global_op_st.sum": "store requests",
    "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum": "store sectors",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "smsp__inst_executed.sum": "warp instructions",
}
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis")
#: Calls of `profiled.py`. They run seven kernels, because two of them have a backward pass.
CALLS = ("token_logprobs", "policy_rows", "gae", "kl_divergence", "policy_loss")
# Messages of ncu on machines that do not permit counters.
_REFUSED = ("ERR_NVGPUCTRPERM", "LibraryNotLoaded", "Failed to initialize", "not supported")


def kernels(text: str) -> list[dict[str, Any]]:
    """The name and METRICS of each kernel in ncu's raw CSV; a missing metric is None."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found = []
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        # Skip the row of units, and messages after the table.
        if not (row["ID"] or "").isdigit() or row.get("Kernel Name") is None:
            continue
        values = {name: _number(row.get(metric)) for metric, name in METRICS.items()}
        found.append({"kernel": row["Kernel Name"], **values})
    return found


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def short_name(kernel: str) -> str:
    """The name of a kernel without types, templates and namespaces."""
    name = re.sub(r"<unnamed>::|\(anonymous namespace\)::", "", kernel)
    name = re.sub(r"[<(].*", "", name)
    return name.split()[-1].rpartition("::")[2] if name.split() else kernel


def _command(run: Run, tool: str | None, call: str, backend: str, table: str) -> list[str]:
    words = ["-m", "benchmarks.gpu.profiled", "--device", run.device]
    words += ["--call", call, "--backend", backend, *(["--small"] if run.dry else [])]
    if tool is None:
        return words
    counted = [tool, "--profile-from-start", "off", "--clock-control", "none"]
    counted += ["--csv", "--page", "raw", "--print-units", "base", "--log-file", table]
    counted += [w for s in SECTIONS for w in ("--section", s)]
    return [*counted, "--metrics", ",".join(METRICS), sys.executable, *words]


def part_ncu(run: Run) -> Result:
    """Memory workload, issue utilisation and L2 sectors of seven kernels; one process per call."""
    tool = find_tool(run, "ncu")
    backend = kernel_backends(run)[0]
    if run.device == "cpu":
        # A CPU has no counters, but the calls must work.
        words = _command(run, None, CALLS[-1], backend, "")
        code = run.python("ncu-plain.log", *words)
        if code != 0:
            return {"status": status(code), "failures": [run.tail("ncu-plain.log", 5)]}
    if tool is None or run.device == "cpu":
        return {"status": SKIPPED, "reason": "ncu is not here"}
    found: list[dict[str, Any]] = []
    failures: list[str] = []
    codes: list[int | None] = []
    for call in CALLS:
        if run.left() < 5:
            codes.append(None)
            continue
        table = run.out / f"ncu-{call}.csv"
        table.unlink(missing_ok=True)
        log = f"ncu-{call}.log"
        code = run.process(log, *_command(run, tool, call, backend, str(table)))
        text = table.read_text(errors="replace") if table.exists() else ""
        said = text + (run.out / log).read_text(errors="replace")
        rows = kernels(text)
        if not rows and any(word in said for word in _REFUSED):
            reason = " ".join(said.split())[-300:]
            return {"status": SKIPPED, "reason": f"ncu cannot count here: {reason}"}
        if code == 0 and profiled.ABSENT in said:
            continue
        if code != 0 or not rows:
            failures.append(f"{call}: " + ("\n".join(said.splitlines()[-5:]) or "no kernel"))
        codes.append(code)
        found += [{"call": call, "backend": backend, **row} for row in rows]
    outcome = status(*codes)
    if outcome == DONE and failures:
        outcome = FAILED
    return {"status": outcome, "failures": failures, "kernels": found}
