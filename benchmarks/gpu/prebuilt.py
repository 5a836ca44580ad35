"""Builds the native extensions for another machine: `make gpu-extensions`.

    python -m benchmarks.gpu.prebuilt [--archs 90]

compiles `_cpu` and `_cuda` for the running Python into build/gpu-extensions, and adds a hash of
their sources. `make gpu-check` copies the extensions instead of compiling, if their sources, the
version of Python and the architecture of the device match. This needs setuptools, pybind11, GCC or
Clang and nvcc, but neither torch nor a GPU.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from .. import ROOT, make_parser

FOLDER = ROOT / "build" / "gpu-extensions"
PACKAGE = "rlhf_kernels"
NAMES = ("_cpu", "_cuda")


def sources_hash(root: Path = ROOT) -> str:
    """The SHA-256 hash of names and contents of all files that the extensions are compiled from."""
    found = hashlib.sha256()
    for file in [root / "setup.py", *sorted((root / "csrc").rglob("*"))]:
        if file.is_file():
            found.update(f"{file.relative_to(root).as_posix()}\0{file.stat().st_size}\0".encode())
            found.update(file.read_bytes())
    return found.hexdigest()


def file_names() -> list[str]:
    """The file names of both extensions for this Python, with its version and platform."""
    return [name + sysconfig.get_config_var("EXT_SUFFIX") for name in NAMES]


def build(archs: str, folder: Path = FOLDER) -> None:
    """Compiles both extensions; the hash is written last, so that a failed build is ignored.

    Raises:
        subprocess.CalledProcessError: the compiler failed and has printed the reason.
    """
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    command += ["--build-temp", str(folder / "temp")]
    variables = {"RLHF_KERNELS_CUDA": "1", "RLHF_KERNELS_CUDA_ARCHS": archs}
    subprocess.run(command, cwd=ROOT, env=os.environ | variables, check=True)
    shutil.rmtree(folder / "temp")
    missing = [n for n in file_names() if not (folder / PACKAGE / n).is_file()]
    if missing:
        raise FileNotFoundError(f"not built: {', '.join(missing)}")
    stamp = {"sources": sources_hash(), "archs": archs.split(";")}
    (folder / "stamp.json").write_text(json.dumps(stamp))


def refusal(arch: str | None, folder: Path = FOLDER, root: Path = ROOT) -> str | None:
    """Why the extensions in `folder` cannot be used here, or None.

    arch: compute capability of the device, as in "90"; None without a CUDA device.
    """
    file = folder / "stamp.json"
    if not file.is_file():
        return "nothing prebuilt is here"
    stamp = json.loads(file.read_text())
    if stamp["sources"] != sources_hash(root):
        return "the prebuilt extensions are of other sources"
    absent = [n for n in file_names() if not (folder / PACKAGE / n).is_file()]
    if absent:
        return f"the prebuilt extensions are of another Python or platform: no {absent[0]}"
    if arch not in stamp["archs"]:
        return f"the prebuilt extensions are for {', '.join(stamp['archs'])}, the device is {arch}"
    return None


def install(folder: Path = FOLDER, root: Path = ROOT) -> None:
    """Copies both extensions beside the Python files."""
    for name in file_names():
        target = root / PACKAGE / name
        part = target.with_name(name + ".part")
        shutil.copyfile(folder / PACKAGE / name, part)
        # Renaming leaves the old file intact for processes that have loaded it.
        part.replace(target)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--archs", default="90", help='CUDA architectures, as in "90;100"')
    options = parser.parse_args()
    build(options.archs)
    sizes = [(FOLDER / PACKAGE / name).stat().st_size for name in file_names()]
    for name, size in zip(file_names(), sizes, strict=True):
        print(f"{name}: {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
