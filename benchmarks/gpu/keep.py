"""Keeps results although the machine may be lost: few files, written atomically."""

import os
import tarfile
from pathlib import Path

# The archive has at most this many bytes of a log, from its end.
LOG_BYTES = 2 << 20
#: The files that `publish` writes.
PUBLISHED = ("report.md", "report.json", "logs.tar.gz")


def replace(file: Path, part: Path) -> None:
    """Renames `part` to `file` atomically: readers find the old file or the new one."""
    with part.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(part, file)


def write_text(file: Path, text: str) -> None:
    """Writes a file atomically."""
    part = file.with_name(file.name + ".part")
    part.write_text(text)
    replace(file, part)


def publish(work: Path, results: Path) -> None:
    """Copies the report to `results`, and packs all logs and results of `work` beside it.

    Folders in `work` (wheels) and unfinished files are left out.
    """
    results.mkdir(parents=True, exist_ok=True)
    archive = results / PUBLISHED[-1]
    part = archive.with_name(archive.name + ".part")
    with tarfile.open(part, "w:gz", compresslevel=6) as packed:
        for file in sorted(f for f in work.iterdir() if f.is_file() and f.suffix != ".part"):
            _add(packed, file)
    replace(archive, part)
    for name in PUBLISHED[:-1]:
        if (work / name).exists():
            write_text(results / name, (work / name).read_text())


def _add(packed: tarfile.TarFile, file: Path) -> None:
    with file.open("rb") as source:
        # A log may grow while it is packed, but exactly the size in the header must be read.
        size = os.fstat(source.fileno()).st_size
        source.seek(max(0, size - LOG_BYTES))
        entry = tarfile.TarInfo(file.name)
        entry.size = min(size, LOG_BYTES)
        entry.mtime = int(file.stat().st_mtime)
        packed.addfile(entry, source)
