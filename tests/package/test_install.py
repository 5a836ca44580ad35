"""The package as users get it: sdist, wheel, a fresh environment, and no side effects of import."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.run_python import run_python

import rlhf_kernels as rk
from rlhf_kernels.kernels import native

ROOT = Path(__file__).parents[2]
LINUX_X86 = sys.platform == "linux" and platform.machine() == "x86_64"

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the source tree")

# torch cannot be imported here: as in an isolated build environment without it.
BUILD = """
import sys
sys.modules["torch"] = None
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def _build(tree: Path, hook: str, out: Path, **variables: str) -> Path:
    done = subprocess.run(
        [sys.executable, "-c", BUILD, hook, str(out)],
        cwd=tree,
        # Minutes of nvcc; test_cuda_build.py has what is to be said about them.
        env=os.environ | {"RLHF_KERNELS_CUDA": "0"} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.splitlines()[-1]


def _build_sdist(tmp_path: Path) -> Path:
    junk = shutil.ignore_patterns(
        ".*", "build", "dist", "outputs", "*.egg-info", "*.so", "__pycache__"
    )
    shutil.copytree(ROOT, tmp_path / "tree", ignore=junk)
    (tmp_path / "sdist").mkdir()
    return _build(tmp_path / "tree", "build_sdist", tmp_path / "sdist")


def test_sdist_has_what_the_repository_has_and_nothing_else(tmp_path):
    with tarfile.open(_build_sdist(tmp_path)) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.[hc]*")}
    assert sources and sources <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "rlhf_kernels/py.typed"} <= names
    made = {n for n in names if n in ("PKG-INFO", "setup.cfg") or ".egg-info/" in n}
    assert made
    assert names - made == _files_of_the_repository()


def _files_of_the_repository() -> set[str]:
    """Paths of the files that git has or would add, but for those of the repository alone."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs the repository and git")
    command = [
        "git",
        "-c",
        "safe.directory=*",
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {n for n in listed.splitlines() if not n.startswith(".") and (ROOT / n).is_file()}


@pytest.fixture
def tree(tmp_path) -> Path:
    """The unpacked sdist."""
    with tarfile.open(_build_sdist(tmp_path)) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    [found] = (tmp_path / "unpacked").iterdir()
    return found


@pytest.fixture
def wheel(tree, tmp_path) -> Path:
    """A wheel built from the unpacked sdist."""
    (tmp_path / "wheel").mkdir()
    return _build(tree, "build_wheel", tmp_path / "wheel")


def _check_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    folders = {n.partition("/")[0] for n in names}
    assert folders == {"rlhf_kernels", f"rlhf_kernels-{rk.__version__}.dist-info"}
    assert "rlhf_kernels/py.typed" in names
    assert [n for n in names if re.fullmatch(r"rlhf_kernels/_cpu\.[^/]+\.so", n)]
    python = {str(p.relative_to(ROOT)) for p in (ROOT / "rlhf_kernels").rglob("*.py")}
    assert python <= set(names)
    assert wheel.stat().st_size < 4 << 20


def _install(wheel: Path, folder: Path) -> None:
    """A new environment with the wheel in it; torch comes from the one that runs the tests."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps"]
    subprocess.run([*command, "--no-index", wheel], check=True)
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = subprocess.check_output([python, "-c", show], text=True).strip()
    # A path line: unlike a site folder, it brings no editable install with it.
    Path(purelib, "torch-of-the-tests.pth").write_text(sysconfig.get_path("purelib") + "\n")


def _run(home: Path, *command: str, cwd: Path, **variables: str) -> str:
    """Output of a program of the environment `home`, without this one's variables."""
    ignored = ("RLHF_KERNELS", "PYTHON")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ignored)}
    done = subprocess.run(
        [home / "bin" / command[0], *command[1:]],
        cwd=cwd,
        env=kept | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_without_a_compiler_the_package_installs_pure_and_says_so(tree, tmp_path):
    nothing = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++", "RLHF_KERNELS_CPU": ""}
    command = [sys.executable, "-c", BUILD, "build_wheel", str(tmp_path)]
    variables = os.environ | {"RLHF_KERNELS_CUDA": "0"} | nothing

    def build(**more: str) -> subprocess.CompletedProcess:
        env = variables | more
        return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)

    done = build(RLHF_KERNELS_CPU="1")
    assert done.returncode != 0 and not list(tmp_path.glob("*.whl"))
    assert "needs GCC 9+ or Clang 12+ with C++17" in done.stderr
    assert "RLHF_KERNELS_CPU: expected 0, 1 or nothing, got 'yes'" in (
        build(RLHF_KERNELS_CPU="yes").stderr
    )
    # A full disk is no missing compiler.
    full = tmp_path / "c++"
    full.write_text("#!/bin/sh\necho 'error writing to x.o: No space left on device' >&2; exit 1\n")
    full.chmod(0o755)
    done = build(CXX=str(full))
    assert done.returncode != 0 and "No space left on device" in done.stderr
    assert not list(tmp_path.glob("*.whl"))
    done = build()
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("rlhf_kernels: ")]
    assert "built without rlhf_kernels._cpu (RLHF_KERNELS_CPU=1 makes this an error)" in line
    assert "apt install g++" in line and "Traceback" not in done.stderr
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "rlhf_kernels/reference/policy.py" in names and not [n for n in names if ".so" in n]

    home = tmp_path / "venv"
    _install(wheel, home)
    report = json.loads(_run(home, "python", "-m", "rlhf_kernels", "--json", cwd=tmp_path))
    assert report["ok"] and report["selected"]["cpu"]["token_logprobs"] == "reference"
    reason = report["backends"]["cpu"]["reason"]
    assert "was not built" in reason and "RLHF_KERNELS_CPU=1 pip install" in reason
    code = (
        "import torch, rlhf_kernels as rk; "
        "print(rk.token_logprobs(torch.zeros(2, 4), torch.tensor([1, 2])).logprobs.tolist())"
    )
    assert "-1.386" in _run(home, "python", "-c", code, cwd=tmp_path)


# One test: building takes 15 s, and each worker of pytest-xdist would build its own.
def test_wheel_from_sdist_works_in_a_fresh_environment(wheel, tmp_path):
    _check_contents(wheel)
    home = tmp_path / "venv"
    _install(wheel, home)

    def run(*command: str) -> str:
        return _run(home, *command, cwd=tmp_path / "wheel")

    report = json.loads(run("python", "-m", "rlhf_kernels", "--json"))
    assert report["backends"]["cpu"]["available"]
    assert Path(report["cpu_extension"]["file"]).is_relative_to(home)
    assert report["versions"]["rlhf_kernels"] == rk.__version__
    assert "usage: rlhf-kernels" in run("rlhf-kernels", "--help")


def test_extension_links_no_torch():
    file = native.module("cpu").__file__
    tool = {"linux": ["ldd"], "darwin": ["otool", "-L"]}.get(sys.platform)
    if tool is None or shutil.which(tool[0]) is None:
        pytest.skip("no tool here that lists the libraries of a module")
    linked = subprocess.check_output([*tool, file], text=True)
    # Where libraries were loaded to may read like a name.
    linked = re.sub(r"\(0x[0-9a-f]+\)", "", linked)
    assert "libc." in linked or "libSystem" in linked
    assert not re.search(r"torch|c10|libmkl|libcudart", linked)


@pytest.mark.skipif(not LINUX_X86, reason="x86-64 has the levels that are compiled separately")
def test_x86_build_has_every_level():
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    expected = ["baseline"]
    if {"avx2", "fma", "f16c"} <= flags:
        expected.append("avx2")
        if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
            expected.append("avx512")
    assert list(native.module("cpu").isa_names()) == expected


def test_baseline_kernels_compile_for_aarch64(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no cross-compiler (Debian: g++-aarch64-linux-gnu)")
    namespace = {"__name__": "not main"}
    exec((ROOT / "setup.py").read_text(), namespace)
    command = [compiler, *namespace["COMPILE_FLAGS"], "-Werror", "-fopenmp", "-c"]
    out = tmp_path / "baseline.o"
    subprocess.run([*command, ROOT / "csrc/cpu/isa_baseline.cpp", "-o", out], check=True)
    assert b"kernels_baseline" in out.read_bytes()


SIDE_EFFECTS = """
import random, sys, torch
def settings():
    return torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
before = settings()
state, python_state = torch.get_rng_state(), random.getstate()
tiny = 1e-310
import rlhf_kernels
assert tiny * 0.5 != 0.0, "subnormals are flushed to zero"
assert torch.full((64,), 1e-40).mul(0.5).ne(0).all(), "torch flushes subnormals to zero"
assert settings() == before, (before, settings())
assert torch.equal(state, torch.get_rng_state()) and python_state == random.getstate()
heavy = {"transformers", "accelerate", "datasets", "matplotlib", "pandas"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the flags are those of GCC on Linux")
def test_fast_math_flags_of_the_environment_do_not_get_in(tmp_path, monkeypatch):
    flags = dict.fromkeys(
        ("CFLAGS", "CXXFLAGS", "LDFLAGS"), "-Ofast -ffast-math -ffinite-math-only"
    )
    _build_sdist(tmp_path)
    wheel = _build(tmp_path / "tree", "build_wheel", tmp_path / "sdist", **flags)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    # `python -c` looks in the working directory first.
    monkeypatch.chdir(tmp_path)
    where = "print(rlhf_kernels.__file__)"
    done = run_python("-c", SIDE_EFFECTS + where, PYTHONPATH=str(tmp_path / "site"))
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "site")


def test_import_changes_nothing():
    run_python("-c", SIDE_EFFECTS)
    run_python("-c", SIDE_EFFECTS, RLHF_KERNELS_BACKEND="cpu")


CALL = """
import torch, rlhf_kernels as rk
from rlhf_kernels.kernels import native
logits, labels = torch.randn(64, 999), torch.arange(64)
def call():
    return rk.token_logprobs(logits, labels, entropy=True)[:2]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "first", ["import torch", "import rlhf_kernels", "import rlhf_kernels._cpu"]
)
def test_one_openmp_runtime(first):
    show = "from rlhf_kernels.__main__ import openmp_runtimes\nprint(*openmp_runtimes())"
    done = run_python("-c", f"{first}\n{CALL}call()\n{show}")
    assert len(done.stdout.split()) == 1, done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_after_a_parallel_call_works_with_one_thread():
    # libgomp's threads do not survive a fork: neither torch nor we can start a team in the child.
    code = """
import os, signal
torch.set_num_threads(2)
expected = call()
child = os.fork()
if child == 0:
    signal.alarm(60)
    torch.set_num_threads(1)
    result = call()
    os._exit(0 if all(map(torch.equal, result, expected)) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    run_python("-W", "ignore::DeprecationWarning", "-c", CALL + code)


def test_versions_agree():
    for file, pattern in (
        ("CITATION.cff", r"^version: (.+)$"),
        ("CHANGELOG.md", r"^## \[([\d.]+)\]"),
    ):
        found = re.search(pattern, (ROOT / file).read_text(), re.M)
        assert found and found[1] == rk.__version__, file
