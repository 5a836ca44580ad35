"""The output folder: locked by one run at a time; files are replaced atomically."""

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from tqdm import tqdm

from .config import UserError

T = TypeVar("T")
_LOCK = ".lock"
#: The end of a message about the disk, for where it is not known what was saved.
RESUMES = ", then --resume continues from the last checkpoint, if there is one"


def sync(path: Path) -> None:
    """Waits until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Waits until a folder and everything in it is on disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file atomically: after a kill at any moment the old or the new file exists."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def set_aside(path: Path) -> None:
    """Renames whatever has this path, so that nothing is deleted."""
    if not os.path.lexists(path):
        return
    names = (path.with_name(f"{path.name}.aside-{i}") for i in itertools.count(1))
    other = next(name for name in names if not os.path.lexists(name))
    path.rename(other)
    tqdm.write(f"{path} is not this run's: it is now {other.name}", file=sys.stderr)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder under a temporary name and renames it into place.

    An older folder is deleted, or renamed if it has files that the new one lacks.
    """
    draft = folder.with_name(f".{folder.name}.draft")
    old = folder.with_name(f".{folder.name}.old")
    for stale in (draft, old):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        write(draft)
        sync_files(draft)
        if folder.is_dir() and not folder.is_symlink() and _names(folder) <= _names(draft):
            folder.rename(old)
        set_aside(folder)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@contextlib.contextmanager
def writing(what: Path | str) -> Iterator[None]:
    """Turns file errors into a UserError that names what was written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{what}: cannot be written ({_reason(error)}); what was saved before is whole: "
            f"see to the disk{RESUMES}"
        ) from error


def _reason(error: Exception) -> str:
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else str(error)


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T | None:
    """Calls `function` in the main process and returns its result; others wait and get None.

    Raises:
        UserError: in every process, if `function` raised one.
    """
    result, raised = None, None
    if accelerator.is_main_process:
        try:
            result = function()
        except UserError as error:
            raised = error
    told = [None if raised is None else str(raised)]
    if accelerator.num_processes > 1:
        broadcast_object_list(told)
    if told[0] is not None:
        everywhere = raised or UserError(told[0])
        everywhere.shared = True
        raise everywhere
    return result


@contextlib.contextmanager
def opened(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Creates the output folder if necessary, and locks it for this run.

    Raises:
        UserError: it cannot be written, another run writes there, or the launcher's processes do
            not form one group.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise UserError(
            f"device: the launcher started {started} processes, but on {accelerator.device} each "
            "would train alone; add --device cpu, or launch as many as there are GPUs"
        )
    descriptor = on_main(accelerator, lambda: _lock(folder))
    _locks.add(descriptor)
    try:
        yield
    finally:
        _locks.discard(descriptor)
        if descriptor is not None:
            # The lock is still held: a run that opened the file meanwhile will see it is deleted.
            with contextlib.suppress(OSError):
                (folder / _LOCK).unlink()
            os.close(descriptor)


_locks: set[int | None] = set()


def _in_child() -> None:
    """A process that a reward function forks holds no lock: it may outlive the run."""
    while _locks:
        descriptor = _locks.pop()
        if descriptor is not None:
            os.close(descriptor)


os.register_at_fork(after_in_child=_in_child)


def _lock(folder: Path) -> int:
    """A descriptor that locks the folder until it is closed or the process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"room")
            probe.flush()
        path = folder / _LOCK
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        found = _reason(error)
        raise UserError(
            f"output_dir: expected a folder that can be written, found {str(folder)!r} ({found})"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"output_dir: {path} is not a file; remove it")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise UserError(
                f"output_dir: another run ({holder or 'unknown'}) writes into {str(folder)!r}; "
                "wait for it, or take another folder"
            ) from error
        text = f"{folder} cannot be locked ({_reason(error)}): let no other run write there"
        tqdm.write(text, file=sys.stderr)
        return descriptor
    if not path.exists() or not os.path.samestat(path.stat(), os.fstat(descriptor)):
        # Another run ended between the opening and the lock, and deleted the file.
        os.close(descriptor)
        return _lock(folder)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor
