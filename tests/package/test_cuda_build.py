"""The CUDA backend without a GPU: what nvcc makes of it, its build, its import."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels import emulated_cuda
from tests.run_python import run_python
from tools import cuda_resources

import rlhf_kernels as rk

ROOT = Path(__file__).parents[2]
ARCHS = (80, 90, 100)

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the source tree")
needs_nvcc = pytest.mark.skipif(cuda_resources.nvcc() is None, reason="nvcc is not installed")


def with_headers(source: Path) -> str:
    """A CUDA file and the local headers that it includes, once each."""
    files, text = [source], ""
    for file in files:
        text += file.read_text()
        for name in re.findall(r'#include "([^"]+)"', file.read_text()):
            if (header := (file.parent / name).resolve()) not in files:
                files.append(header)
    return text


@needs_nvcc
@pytest.mark.parametrize("source", cuda_resources.sources(), ids=lambda f: f.stem)
def test_kernels_compile_without_spills(source):
    found = cuda_resources.report(source, ARCHS)
    assert [p for r in found for p in r.problems()] == []
    declared = len(re.findall(r"\b__global__\b", with_headers(source)))
    kernels = {r.kernel.partition("<")[0] for r in found}
    assert len(kernels) == declared
    # Every kernel on every architecture.
    assert {(r.kernel, r.arch) for r in found} == {(r.kernel, a) for r in found for a in ARCHS}


# An array that must be indexed at run time, and more values alive than there are registers.
BAD = """
__global__ void stack_frame(float* x, const int* at) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[i] = x[i];
  values[at[0]] = 1.0f;
  for (int i = 0; i < 64; ++i) x[i] = values[at[i]];
}
__global__ void __launch_bounds__(1024, 2) spills(float* x) {
  float values[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) values[i] = x[i * 4096 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) x[threadIdx.x * 96 + i] = values[95 - i] * values[i];
}
__global__ void good(float* x) { x[threadIdx.x] *= 2.0f; }
"""


@needs_nvcc
def test_the_gate_refuses_bad_kernels(tmp_path):
    (tmp_path / "bad.cu").write_text(BAD)
    found = cuda_resources.parse(cuda_resources.compile_file(tmp_path / "bad.cu", (90,)))
    by_name = {re.sub(r"^_Z\d+(.*?)P.*$", r"\1", r.kernel): r for r in found}
    assert set(by_name) == {"stack_frame", "spills", "good"}
    assert by_name["good"].problems() == []
    assert any("stack frame" in p for p in by_name["stack_frame"].problems())
    assert any("spills" in p for p in by_name["spills"].problems())


def _build(out: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs setup.py's build of the extensions."""
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", str(out), "-t", str(out / "temp")],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("CUDA_")} | variables,
        capture_output=True,
        text=True,
    )


def test_a_build_that_must_have_cuda_fails_without_nvcc(tmp_path):
    # CUDA_HOME comes first, and here is nothing.
    done = _build(tmp_path, RLHF_KERNELS_CUDA="1", CUDA_HOME=str(tmp_path / "nowhere"))
    assert done.returncode != 0
    assert "RLHF_KERNELS_CUDA=1, but nvcc was not found" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_an_option_that_is_not_one_is_refused(tmp_path):
    done = _build(tmp_path, RLHF_KERNELS_CUDA="yes")
    assert done.returncode != 0
    assert "RLHF_KERNELS_CUDA: expected 0, 1 or nothing, got 'yes'" in done.stderr


@pytest.fixture(scope="module")
def setup_module():
    """setup.py's functions, without building anything."""
    source = (ROOT / "setup.py").read_text()
    namespace = {"__name__": "setup"}
    exec(compile(source, "setup.py", "exec"), namespace)
    return namespace


def _fake_nvcc(folder: Path, body: str) -> str:
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{body}\n")
    nvcc.chmod(0o755)
    return str(nvcc)


OLD_NVCC = "printf 'compute_70\\ncompute_80\\ncompute_86\\ncompute_90\\n'"


def test_architectures(setup_module, tmp_path, monkeypatch):
    archs, nvcc = setup_module["cuda_archs"], _fake_nvcc(tmp_path, OLD_NVCC)
    monkeypatch.delenv("RLHF_KERNELS_CUDA_ARCHS", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    # The default is those usual architectures that the compiler knows, and PTX of the newest.
    assert archs(nvcc) == ["sm_80", "sm_86", "sm_90", "compute_90"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX")
    assert archs(nvcc) == ["sm_80", "sm_90", "compute_90"]
    for value, expected in (("90", ["sm_90"]), ("8.6;sm_90", ["sm_86", "sm_90"])):
        monkeypatch.setenv("RLHF_KERNELS_CUDA_ARCHS", value)
        assert archs(nvcc) == expected
    for value in ("100", "70", "ninety", "90;;x"):
        monkeypatch.setenv("RLHF_KERNELS_CUDA_ARCHS", value)
        with pytest.raises(Exception, match=r"RLHF_KERNELS_CUDA_ARCHS: .* know 80, 86, 90; got"):
            archs(nvcc)


def test_fast_math_flags_of_the_environment_do_not_reach_nvcc(setup_module, tmp_path, monkeypatch):
    nvcc = _fake_nvcc(tmp_path, 'echo "$NVCC_PREPEND_FLAGS|$NVCC_APPEND_FLAGS"')
    monkeypatch.setenv("NVCC_PREPEND_FLAGS", "-use_fast_math -ccbin g++")
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "--threads 2 --use_fast_math --ftz=true")
    assert setup_module["run_nvcc"](nvcc).strip() == "-ccbin g++|--threads 2"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_failure_of_nvcc_leaves_the_cpu_extension(tmp_path):
    (tmp_path / "bin").mkdir()
    body = f'case "$*" in *list-gpu-arch*) {OLD_NVCC};; *) echo "no licence" >&2; exit 1;; esac'
    _fake_nvcc(tmp_path / "bin", body)
    done = _build(tmp_path, CUDA_HOME=str(tmp_path), RLHF_KERNELS_CUDA="")
    assert done.returncode == 0, done.stderr
    assert "no licence" in done.stdout + done.stderr
    assert [f.name.partition(".")[0] for f in tmp_path.glob("rlhf_kernels/*.so")] == ["_cpu"]


STAND_IN = """
import sys, types
sys.modules["rlhf_kernels._cuda"] = types.SimpleNamespace(
    __file__="_cuda.so", emulated=False, architectures=["sm_80", "sm_90"],
    driver_version=lambda: {driver}, runtime_version=lambda: 13000,
)
import rlhf_kernels as rk, torch
torch.version.cuda = None
try:
    rk.use_backend("cuda")
except RuntimeError as error:
    print(error)
from rlhf_kernels.__main__ import main
raise SystemExit(main([]))
"""


@pytest.mark.parametrize(
    "driver,reason",
    [
        (0, "built, no driver"),
        (12040, "built for CUDA 13, the driver supports CUDA 12 only"),
        (13010, "built, but this torch is not built for CUDA"),
    ],
)
@pytest.mark.skipif(torch.version.cuda is not None, reason="about a torch without CUDA")
def test_an_extension_that_cannot_run_is_explained(driver, reason):
    done = run_python("-c", STAND_IN.format(driver=driver))
    assert f"use_backend: 'cuda' is not available: {reason}" in done.stdout
    assert re.search(rf"^  cuda +{reason} \(CUDA 13\.0, sm_80 sm_90", done.stdout, re.M)
    assert "All is well." in done.stdout


@needs_nvcc
@pytest.mark.slow
def test_built_extension_needs_no_driver(tmp_path):
    done = _build(tmp_path, RLHF_KERNELS_CUDA="1", RLHF_KERNELS_CUDA_ARCHS="80;90;100+PTX")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "for sm_80, sm_90, sm_100, compute_100" in done.stderr
    [extension] = tmp_path.glob("rlhf_kernels/_cuda.*.so")
    linked = subprocess.check_output(["ldd", extension], text=True)
    # Addresses may read like a name.
    linked = re.sub(r"\(0x[0-9a-f]+\)", "", linked)
    assert not re.search(r"cudart|libcuda|torch|c10", linked)
    code = f"""
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("rlhf_kernels._cuda", {str(extension)!r})
sys.modules["rlhf_kernels._cuda"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from rlhf_kernels.__main__ import render, report
found = report()
print(json.dumps(found))
print(render(found), file=sys.stderr)
"""
    done = run_python("-c", code)
    found = json.loads(done.stdout)
    assert found["cuda_extension"]["architectures"] == ["sm_80", "sm_90", "sm_100", "compute_100"]
    assert found["ok"] is True
    if found["cuda_extension"]["driver"] is None:
        assert found["backends"]["cuda"]["reason"] == "built, no driver"
        assert re.search(r"^  cuda +built, no driver \(CUDA .*sm_80 sm_90", done.stderr, re.M)


def test_scratch_and_streams_of_the_caller(monkeypatch):
    """Every call names device, stream and scratch; here the emulated extension is told CPU ones."""
    with emulated_cuda.installed() as extension, rk.use_backend("cuda"):
        seen = []
        real = extension.token_logprobs
        monkeypatch.setattr(
            extension, "token_logprobs", lambda *a: seen.append(a[-1]) or real(*a), raising=True
        )
        emulated_cuda.refresh()
        rk.token_logprobs(torch.randn(3, 40_000), torch.zeros(3, dtype=torch.long))
        [(device, stream, address, scratch)] = seen
        assert (device, stream) == (0, 0) and address == scratch.data_ptr()
        assert scratch.numel() == extension.token_logprobs_scratch(3, 40_000, 4) > 0
