"""What the parts of `make gpu-check` read and choose: counters, points, prebuilt extensions."""

import dataclasses
import json
import re
import subprocess
import sys
from unittest import mock

import pytest
import torch

from tests.benchmarks.test_gpu_check import options
from tests.head import gpu_way
from tests.kernels import emulated_cuda, gpu_faults

import rlhf_kernels as rk
from benchmarks import ROOT
from benchmarks.gpu import bench, check, ncu, prebuilt, process, profiled, smoke
from rlhf_kernels.kernels import backends
from rlhf_kernels.testing import check_operation

NAMES = ",".join(f'"{m}"' for m in ncu.METRICS)
UNITS = ",".join('"%"' for _ in ncu.METRICS)
KERNEL = "void rk::cuda::<unnamed>::forward_kernel<(int)16, float>(rk::Rows, float *)"
VALUES = ",".join(f'"{1000 + i:,}.5"' for i in range(len(ncu.METRICS)))
TABLE = f'''==PROF== Connected to process 12
"ID","Process ID","Kernel Name",{NAMES}
"","","",{UNITS}
"0","12","{KERNEL}",{VALUES}
"1","12","scan_kernel",{VALUES.replace("1,000.5", "n/a")}
==PROF== Disconnected
'''
TOOL = f"""#!{sys.executable}
import sys
words = sys.argv[1:]
assert "benchmarks.gpu.profiled" in words
assert words[words.index("--profile-from-start") + 1] == "off"
call = words[words.index("--call") + 1]
if "{{fails}}" == call:
    print("RuntimeError: of the call"); sys.exit(1)
if "{{fails}}" == "all":
    print("==ERROR== ERR_NVGPUCTRPERM"); sys.exit(1)
if "{{fails}}" == "" and call == "policy_rows":
    print({profiled.ABSENT!r}); sys.exit(0)
open(words[words.index("--log-file") + 1], "w").write({TABLE!r})
"""


def test_the_counters_of_kernels_are_read():
    one, other = ncu.kernels(TABLE)
    assert one["kernel"] == KERNEL and ncu.short_name(KERNEL) == "forward_kernel"
    assert one["ns"] == 1000.5 and one["L2 write sectors"] == 1006.5
    assert other["kernel"] == "scan_kernel" and other["ns"] is None and other["issue %"] == 1001.5
    assert ncu.short_name("scan_kernel") == "scan_kernel"
    assert ncu.kernels("==ERROR== no such device\n") == []


@pytest.mark.parametrize(
    "fails,outcome", [("", "done"), ("gae", "failed"), ("all", "skipped")], ids=str
)
def test_the_ncu_part(monkeypatch, tmp_path, fails, outcome):
    tool = tmp_path / "ncu"
    tool.write_text(TOOL.replace("{fails}", fails))
    tool.chmod(0o755)
    monkeypatch.setattr(ncu, "find_tool", lambda run, name: str(tool))
    monkeypatch.setattr(ncu, "kernel_backends", lambda run: ["cuda"])
    result = ncu.part_ncu(process.Run(options(tmp_path)))
    assert result["status"] == outcome
    if outcome == "skipped":
        assert "ERR_NVGPUCTRPERM" in result["reason"]
        return
    # Without a failure the tool says that the backend lacks this kernel.
    assert {k["call"] for k in result["kernels"]} == set(ncu.CALLS) - {fails or "policy_rows"}
    assert len(result["failures"]) == bool(fails)
    assert not fails or "RuntimeError: of the call" in result["failures"][0]


@pytest.mark.parametrize("call", ncu.CALLS)
def test_what_is_profiled_runs(call):
    assert set(ncu.CALLS) == set(profiled.CALLS)
    with rk.use_backend("cpu"):
        work = profiled.CALLS[call](torch.device("cpu"), small=True)
        assert (work is None) == (call == "policy_rows")
        if work is not None:
            work()


def test_the_kernel_of_large_vocabularies_is_smoked_profiled_and_sanitized(monkeypatch, capsys):
    """In the emulator: the doctor's size does not reach it."""
    device, function = torch.device("cpu"), rk.linear_policy_loss
    (size,) = smoke.FURTHER_SIZES[function.__name__]
    extension = emulated_cuda.load()
    kernel = mock.Mock(wraps=extension.policy_rows)
    monkeypatch.setattr(extension, "policy_rows", kernel)
    with emulated_cuda.installed(), gpu_way.taken(), rk.use_backend("cuda"):
        for dtype in smoke.DTYPES:
            assert check_operation(function, device, dtype, size=smoke.SIZE)["ok"]
            assert kernel.call_count == 0
            assert check_operation(function, device, dtype, size=size)["ok"]
            assert kernel.call_count == 1
            kernel.reset_mock()
        profiled.CALLS["policy_rows"](device, small=True)()
        assert kernel.call_count == 1
        kernel.reset_mock()
    with emulated_cuda.installed():
        assert gpu_faults.large_rows(device, "cuda") == kernel.call_count > 1
    assert gpu_faults.large_rows(device, "cpu") == 0


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_the_smoke_test_tells_wrong_from_right(monkeypatch, tmp_path, wrong):
    """In this process, by a backend of the CPU; the part itself reads what was written."""
    doubled = dict.fromkeys(["gae"] if wrong else [], lambda *a, **k: (a[0], a[0]))
    before = backends.get("cpu")
    backends.install(dataclasses.replace(before, launchers={**before.launchers, **doubled}))

    def in_process(run, log, *words):
        (run.out / log).write_text("")
        monkeypatch.setattr(sys, "argv", [words[1], *words[2:], "--only", "gae,kl_penalty"])
        return smoke.main()

    monkeypatch.setattr(process.Run, "python", in_process)
    monkeypatch.setattr(check, "kernel_backends", lambda run: ["cpu"])
    try:
        result = check.part_smoke(process.Run(options(tmp_path, device="cpu")))
    finally:
        backends.install(before)
    assert (result["status"], result["passed"]) == (("failed", 2) if wrong else ("done", 4))
    assert [f.split(": ")[0] for f in result["failures"]] == (
        ["gae cpu float32 size 1031", "gae cpu bfloat16 size 1031"] if wrong else []
    )


def test_the_shapes_that_matter_are_among_the_points(tmp_path):
    run = process.Run(options(tmp_path, device="cpu"))
    words = bench.command(run, bench.PEER_FILES, "reference", tmp_path / "points.jsonl")
    assert words[:2] == ["-m", "pytest"]
    # Without the peers, whose import is most of the time and chooses nothing.
    code = "import sys; sys.modules.update(trl=None, verl=None, transformers=None); "
    code += "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    words = ["-c", code, *words[2:], "-k", bench.PEER_POINTS, "--collect-only"]
    found = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    functions = set(re.findall(r"test_\w+", found.stdout)) - {"test_functions"}
    wanted = {"test_token_logprobs", "test_linear_policy_loss", "test_kl_divergence", "test_gae"}
    assert functions == wanted, found.stdout + found.stderr
    assert "16x131072" in found.stdout and "few-rows" not in found.stdout


def test_prebuilt_extensions_serve_only_what_they_were_built_for(tmp_path):
    root, folder = tmp_path / "root", tmp_path / "built"
    (root / "csrc").mkdir(parents=True), (root / prebuilt.PACKAGE).mkdir()
    (root / "setup.py").write_text("flags")
    (root / "csrc" / "a.cu").write_text("kernel")
    (folder / prebuilt.PACKAGE).mkdir(parents=True)

    def refusal(arch="90"):
        return prebuilt.refusal(arch, folder, root)

    assert "nothing prebuilt" in refusal()
    stamp = {"sources": prebuilt.sources_hash(root), "archs": ["90"]}
    (folder / "stamp.json").write_text(json.dumps(stamp))
    assert "another Python" in refusal()
    for name in prebuilt.file_names():
        assert name.endswith(".so") and f"{sys.version_info[0]}{sys.version_info[1]}" in name
        (folder / prebuilt.PACKAGE / name).write_text(f"code of {name}")
    assert refusal() is None
    assert "are for 90, the device is 100" in refusal("100") and refusal(None) is not None
    prebuilt.install(folder, root)
    installed = {f.name: f.read_text() for f in (root / prebuilt.PACKAGE).iterdir()}
    assert installed == {n: f"code of {n}" for n in prebuilt.file_names()}
    # A flag counts as much as a kernel, and so does a file that was added.
    for file, text in (("setup.py", "flag"), ("csrc/a.cu", "kernal"), ("csrc/b.h", "")):
        kept = (root / file).read_text() if (root / file).exists() else None
        (root / file).write_text(text)
        assert "other sources" in refusal()
        if kept is None:
            (root / file).unlink()
        else:
            (root / file).write_text(kept)
        assert refusal() is None
