"""What parts of `make gpu-check` share: processes with a time limit, packages from wheels."""

import argparse
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import ROOT

DONE, FAILED, SKIPPED, CUT = "done", "failed", "skipped", "cut off"
Result = dict[str, Any]

#: Limit in seconds of a dry run and of each of its parts. It measures nothing, so that a busy
#: machine must not make it fail.
DRY_SECONDS = 3600.0


class Run:
    """The options and folders of a check, and processes with a time limit."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device: str = options.device
        self.out: Path = options.out
        self.results: Path = options.results
        self.dry: bool = options.dry_run
        self.packages = unpacked(options.wheels, self.out) if options.wheels else []
        self.deadline = time.monotonic() + (DRY_SECONDS if self.dry else options.limit)
        self.ends = self.deadline

    def left(self) -> float:
        """The seconds that remain for the current part."""
        return self.ends - time.monotonic()

    def process(
        self, log: str, *command: str, seconds: float = math.inf, **variables: str
    ) -> int | None:
        """The exit status of a command, or None if its time ran out; output goes to OUT/log.

        seconds: a limit below the rest of the part, if other commands follow.
        """
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        environment |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        # Packages of the caller take precedence over those of the wheels.
        paths = [str(ROOT), os.environ.get("PYTHONPATH", ""), *map(str, self.packages)]
        environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
        if self.device == "cpu":
            environment["TRITON_INTERPRET"] = "1"
        with (self.out / log).open("w") as output:
            # A separate session makes it possible to end all processes that the command starts.
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment | variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                return child.wait(timeout=max(1.0, min(seconds, self.left())))
            except subprocess.TimeoutExpired:
                return None
            finally:
                # Ends processes that outlive the command, and the command itself on an interrupt.
                _end(child)

    def python(
        self, log: str, *arguments: str, seconds: float = math.inf, **variables: str
    ) -> int | None:
        """Runs `process` with this interpreter."""
        return self.process(log, sys.executable, *arguments, seconds=seconds, **variables)

    def lines(self, log: str) -> list[str]:
        """The lines of a log."""
        return (self.out / log).read_text(errors="replace").splitlines()

    def tail(self, log: str, lines: int = 15) -> str:
        """The last lines of a log as one string."""
        return "\n".join(self.lines(log)[-lines:])


def unpacked(wheels: Path, out: Path) -> list[Path]:
    """Unpacks the wheels in `wheels` whose packages this interpreter lacks; returns the folders.

    Unlike installing, unpacking needs no network, no pip and no write access to the interpreter.
    """
    if not wheels.is_dir():
        raise NotADirectoryError(f"--wheels: {wheels} is not a folder")
    folders = []
    for wheel in sorted(wheels.glob("*.whl")):
        try:
            print(f"{wheel.name}: {version(wheel.name.split('-')[0])} is installed", flush=True)
            continue
        except PackageNotFoundError:
            pass
        folder = out / "wheels" / wheel.stem
        if not folder.exists():
            part = folder.with_name(folder.name + ".part")
            with zipfile.ZipFile(wheel) as archive:
                for entry in archive.infolist():
                    file = Path(archive.extract(entry, part))
                    # zipfile does not restore the executable bit of programs.
                    if entry.external_attr >> 16 & 0o111 and not entry.is_dir():
                        file.chmod(0o755)
            # Renaming last ensures that an interrupted extraction is not used.
            part.rename(folder)
        folders.append(folder)
    # Some parts check in this process whether a package is available.
    sys.path += map(str, folders)
    return folders


def refusal(run: Run) -> str | None:
    """Why the device cannot be used, in one line, or None."""
    code = "import sys, torch, triton; torch.ones(1, device=sys.argv[1]).sum().item()"
    run.ends = time.monotonic() + (DRY_SECONDS if run.dry else 60)
    found = run.python("device.log", "-c", code, run.device)
    if found == 0:
        return None
    return "no answer in a minute" if found is None else run.tail("device.log", 1)


def kernel_backends(run: Run) -> list[str]:
    """The kernel backends for the device, in the order of preference."""
    code = "import sys, rlhf_kernels as rk; print(*rk.available_backends(sys.argv[1]))"
    # Runs in a separate process, because a part may have built an extension after this one started.
    if run.device == "cpu" or run.python("backends.log", "-c", code, run.device) != 0:
        return ["triton"]
    return [b for b in run.tail("backends.log", 1).split() if b in ("cuda", "triton")] or ["triton"]


def _end(child: subprocess.Popen) -> None:
    """Ends a process and its children; on the first signal pytest still writes its results."""
    for number, seconds in ((signal.SIGINT, 5), (signal.SIGTERM, 1), (signal.SIGKILL, 5)):
        try:
            os.killpg(child.pid, number)
        except (ProcessLookupError, PermissionError):
            return
        try:
            child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            continue
        # Other processes of the group cannot be waited for.
        time.sleep(0.2)


def find_tool(run: Run, name: str) -> str | None:
    """A program of the CUDA toolkit, from the path, its usual folder or a wheel."""
    tool = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    for folder in run.packages:
        # NVIDIA also distributes some programs as wheels.
        tool = tool or next((str(f) for f in folder.rglob(name) if f.is_file()), None)
    return tool


def status(*codes: int | None) -> str:
    """The status of a part from the exit codes of its processes."""
    return CUT if None in codes else DONE if not any(codes) else FAILED


def missing(*packages: str) -> str | None:
    """Which of the required packages are missing, or None."""
    absent = [p for p in packages if importlib.util.find_spec(p.replace("-", "_")) is None]
    return f"not installed: {', '.join(absent)}" if absent else None
