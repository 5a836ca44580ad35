"""compute-sanitizer on invalid data and odd layouts: the part `sanitizer` of `make gpu-check`."""

import re
import sys

from .. import ROOT
from .process import CUT, DONE, FAILED, SKIPPED, Result, Run, find_tool, kernel_backends, status

SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck")


def part_sanitizer(run: Run) -> Result:
    tool = find_tool(run, "compute-sanitizer")
    script = [sys.executable, "-m", "tests.kernels.gpu_faults", "--device", run.device]
    # Triton's interpreter needs seconds for each case.
    script += [*(["--every", "40"] if run.dry else []), "--backend"]
    backends = kernel_backends(run)
    # A run without the sanitizer compiles and caches the kernels, and shows other failures.
    for backend in backends:
        plain = run.process("sanitizer-plain.log", *script, backend)
        if plain != 0:
            failure = f"{backend} without the sanitizer: " + run.tail("sanitizer-plain.log", 3)
            return {"status": status(plain), "failures": [failure]}
    if tool is None or run.device == "cpu":
        return {"status": SKIPPED, "reason": "compute-sanitizer is not here"}
    tools: dict[str, str] = {}
    failures: list[str] = []
    for kind in SANITIZER_TOOLS:
        for backend in backends:
            found = _sanitize(
                run, tool, kind, [*script, backend], f"sanitizer-{kind}-{backend}.log"
            )
            tools[f"{kind} {backend}"] = found
            if found.startswith(FAILED):
                failures.append(f"{kind} {backend}: {found.partition(': ')[2]}")
                tools[f"{kind} {backend}"] = FAILED
    result = {"tools": tools, "failures": failures}
    # memcheck is required; the other tools use the remaining time.
    first = [tools[f"{SANITIZER_TOOLS[0]} {b}"] for b in backends]
    if failures or CUT in first:
        return {"status": FAILED if failures else CUT, **result}
    if any(f.startswith(SKIPPED) for f in first):
        return {"status": SKIPPED, "reason": "memcheck does not work here", **result}
    return {"status": DONE, **result}


def _sanitize(run: Run, tool: str, kind: str, script: list[str], log: str) -> str:
    """Runs one tool of the sanitizer; returns its outcome."""
    if run.left() < 10:
        return CUT
    command = [tool, "--tool", kind, "--error-exitcode", "9", "--print-limit", "50"]
    if kind == "memcheck":
        # torch itself makes API calls that the driver rejects.
        command += ["--report-api-errors", "no"]
    # Without torch's caching allocator, an access beyond a tensor does not hit another tensor.
    code = run.process(log, *command, *script, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    text = (run.out / log).read_text(errors="replace")
    if code in (0, None):
        return status(code)
    if "ERROR SUMMARY" not in text or "Device not supported" in text:
        return f"{SKIPPED}: {run.tail(log, 2)}"
    if kind == "memcheck" or _names_ours(text):
        return f"{FAILED}: {run.tail(log, 3)}"
    return "done; it names kernels of torch only"


def _names_ours(log: str) -> bool:
    """Whether the sanitizer reported one of our kernels."""
    sources = (ROOT / "rlhf_kernels/kernels/triton").glob("*.py")
    names = {n for s in sources for n in re.findall(r"^def (\w+_kernel)\(", s.read_text(), re.M)}
    if "rk::cuda::" in log:
        return True
    return any(found in names for found in re.findall(r"\b(?:at|in) (\w+_kernel)\b", log))
