"""Parses a file into numbered objects: JSON, CSV, Parquet, Arrow, compressed or not."""

import bz2
import codecs
import csv
import gzip
import importlib
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .config import UserError

#: The source of an object ("rows.jsonl:3", "rows.parquet: row 3") and the object.
Placed = tuple[str, Any]

JSON_ENDINGS, _TABLES = (
    ("json", "jsonl", "ndjson", "jsonlines"),
    ("parquet", "pq", "arrow", "feather"),
)
_SEPARATORS = {"csv": ",", "tsv": "\t"}
FORMATS = (*JSON_ENDINGS, *_SEPARATORS, *_TABLES)
SUPPORTED = (
    "a .json, .jsonl, .ndjson, .csv, .tsv, .parquet or .arrow file, also .gz, .bz2, .xz, .zst"
)
# Compression is detected by the first bytes, because the ending of a name may be wrong.
_COMPRESSIONS = {
    b"\x1f\x8b": ("gz",),
    b"BZh": ("bz2",),
    b"\xfd7zXZ\x00": ("xz",),
    b"\x28\xb5\x2f\xfd": ("zst", "zstd"),
}
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_LINE_END = re.compile(r"\r\n|\n|\r")


def optional(name: str, path: object) -> Any:
    """Imports a package that only some formats need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        how = f"needs the package '{name}': pip install 'rlhf-kernels[trainer-extras]'"
        raise UserError(f"{path}: {how}") from error


def numbered(path: object, rows: Iterable[Any]) -> Iterator[Placed]:
    return ((f"{path}: row {i}", row) for i, row in enumerate(rows, start=1))


def one_line(error: BaseException) -> str:
    """The message of another package's error in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _endings(path: Path) -> list[str]:
    """The endings of a name without dots, in lower case, the last one first."""
    return [ending[1:].lower() for ending in reversed(path.suffixes)]


def format_of(path: Path) -> str | None:
    """The last ending that does not name a compression."""
    compressions = [e for endings in _COMPRESSIONS.values() for e in endings]
    return next((e for e in _endings(path) if e not in compressions), None)


def stem_of(path: Path) -> Path:
    """The path without the endings that name its format and compression."""
    known = {*FORMATS, *(e for endings in _COMPRESSIONS.values() for e in endings)}
    while path.suffix[1:].lower() in known:
        path = path.with_suffix("")
    return path


def file_objects(path: Path) -> Iterator[Placed]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    raw, kind = _decompressed(path, raw), format_of(path)
    if kind not in FORMATS:
        kind = _sniffed(raw)
    if kind is None:
        raise UserError(f"{path}: expected {SUPPORTED}, or JSON under another name")
    if kind in _TABLES:
        return _table(path, raw, "parquet" if kind in ("parquet", "pq") else "arrow")
    text = _text(path, raw)
    if kind in _SEPARATORS:
        return _csv(path, text, _SEPARATORS[kind])
    return _json(path, text, lines=kind != "json")


def _sniffed(raw: bytes) -> str | None:
    """Guesses the format from the first bytes."""
    for magic, kind in ((b"PAR1", "parquet"), (b"ARROW1", "arrow")):
        if raw.startswith(magic):
            return kind
    start = raw[:64].replace(b"\0", b"").lstrip(b"\xef\xbb\xff\xfe\xbf \t\r\n")
    return "json" if start[:1] in (b"{", b"[") else None


def _decompressed(path: Path, raw: bytes) -> bytes:
    endings = next((e for magic, e in _COMPRESSIONS.items() if raw.startswith(magic)), ())
    named = _endings(path)[:1]
    known = [e for several in _COMPRESSIONS.values() for e in several]
    if not endings:
        if named and named[0] in known:
            raise UserError(f"{path}: expected a file compressed as .{named[0]}, found another")
        return raw
    try:
        if "zst" in endings:
            arrow = optional("pyarrow", path)
            stream = arrow.CompressedInputStream(arrow.BufferReader(raw), "zstd")
            found: bytes = stream.read()
            return found
        if "gz" in endings:
            return gzip.decompress(raw)
        return _streams(raw, bz2.BZ2Decompressor if "bz2" in endings else lzma.LZMADecompressor)
    except (EOFError, OSError, zlib.error, lzma.LZMAError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        how = f"truncated or damaged .{endings[0]}: {one_line(error)}"
        raise UserError(f"{path}: {how}") from error


def _streams(raw: bytes, decompressor: Callable[[], Any]) -> bytes:
    """Decompresses all streams; the modules' own functions silently stop at a damaged one."""
    parts = []
    # Zero bytes may follow each stream as padding.
    while raw := raw.lstrip(b"\0"):
        stream = decompressor()
        parts.append(stream.decompress(raw))
        if not stream.eof:
            raise EOFError("it ends within a stream")
        raw = stream.unused_data
    return b"".join(parts)


def _text(path: Path, raw: bytes) -> str:
    """Decodes UTF-8, or the encoding of a byte order mark."""
    marks = (encoding for mark, encoding in _BYTE_ORDER_MARKS.items() if raw.startswith(mark))
    encoding = next(marks, "utf-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        found = f"byte 0x{raw[error.start]:02x}" if error.start < len(raw) else "its end"
        how = "save the file as UTF-8"
        raise UserError(f"{path}:{line}: expected {encoding} text, found {found}; {how}") from error
    if "\0" in text[:4]:
        raise UserError(f"{path}: expected text, found zero bytes; save the file as UTF-8")
    return text


def _table(path: Path, raw: bytes, kind: str) -> Iterator[Placed]:
    arrow = optional("pyarrow", path)
    parts = optional("pyarrow.parquet" if kind == "parquet" else "pyarrow.ipc", path)
    source = arrow.BufferReader(raw)
    try:
        if kind == "parquet":
            table = parts.read_table(source)
        else:
            # `datasets` writes streams; other writers write files, which have a footer.
            opened = parts.open_file if raw.startswith(b"ARROW1") else parts.open_stream
            table = opened(source).read_all()
        rows = table.to_pylist()
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a whole {kind} file: {one_line(error)}") from error
    return numbered(path, rows)


def _csv(path: Path, text: str, separator: str) -> Iterator[Placed]:
    """Rows under a header; cells are strings, but `margin` is a number if it can be parsed."""
    # The default limit is 128 KiB per cell. It is global in the process, so it is restored.
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        header, *rows = [*reader] or [[]]
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)
    if len(set(header)) < len(header):
        raise UserError(f"{path}:1: expected one column of each name, found {header}")
    for place, cells in numbered(path, rows):
        if not cells:
            continue
        if len(cells) != len(header):
            raise UserError(f"{place}: expected {len(header)} cells, found {len(cells)}")
        row: dict[str, Any] = dict(zip(header, cells, strict=True))
        if "margin" in row:
            row["margin"] = _number(row["margin"])
        yield place, row


def _number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


# --- JSON ------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"expected each key once, found {twice!r} twice")
    return found


_DECODER, _SPACE = json.JSONDecoder(object_pairs_hook=_object), re.compile(r"\s*")


def _guarded(path: Path, place: str, parse: Callable[[], Any], first: int = 1) -> Any:
    """The result of `parse` for a text that starts in line `first`; errors name the line."""
    try:
        return parse()
    except RecursionError as error:
        raise UserError(f"{place}: expected less deeply nested JSON") from error
    except json.JSONDecodeError as error:
        line = first + error.lineno - 1
        raise UserError(f"{path}:{line}: {error.msg} at column {error.colno}") from error
    except ValueError as error:
        # A key occurs twice, or a number has too many digits.
        raise UserError(f"{place}: {error}") from error


def _parsed(path: Path, text: str, line: int | None = None) -> Any:
    """The JSON in line `line`, or in the whole file."""
    place = str(path) if line is None else f"{path}:{line}"
    return _guarded(path, place, lambda: _DECODER.decode(text), line or 1)


def _json(path: Path, text: str, *, lines: bool) -> Iterator[Placed]:
    """An array, one object per line, or {"data": [...]}; `lines`: the ending says JSON lines."""
    start = text.lstrip()[:1]
    every = enumerate(_LINE_END.split(text), start=1)
    content = [(number, line) for number, line in every if line.strip()]
    if start == "[" and not (len(content) > 1 and _complete(content[0])):
        return _array(path, text)
    if start == "{" and not lines and not _complete(content[0]):
        try:
            document = _parsed(path, text)
        except UserError:
            # The file may have one object per line, the first of which is damaged.
            if len(content) < 2 or not _complete(content[1]):
                raise
        else:
            rows = _wrapped(document)
            return numbered(path, [document] if rows is None else rows)
    if len(content) == 1:
        ((number, line),) = content
        rows = _wrapped(_parsed(path, line, number))
        if rows is not None:
            return numbered(path, rows)
    return ((f"{path}:{number}", _parsed(path, line, number)) for number, line in content)


def _past_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None  # The pattern matches nothing too.
    return found.end()


def _array(path: Path, text: str) -> Iterator[Placed]:
    """Parses the elements of a JSON array one by one, so that an error names its row."""
    position, number = _past_space(text, text.index("[") + 1), 0
    while text[position : position + 1] != "]" or number:
        number += 1
        place = f"{path}: row {number}"
        element, position = _guarded(path, place, partial(_DECODER.raw_decode, text, position))
        yield place, element
        position = _past_space(text, position)
        separator = text[position : position + 1]
        if separator != ",":
            break
        position = _past_space(text, position + 1)
    rest = text[position + 1 :].strip()
    if text[position : position + 1] != "]" or rest:
        line = text.count("\n", 0, position) + 1
        expected = "nothing after the array" if rest else "',' or ']'"
        raise UserError(f"{path}:{line}: expected {expected} after row {number}")


def _complete(line: tuple[int, str]) -> bool:
    try:
        _DECODER.decode(line[1])
    except (ValueError, RecursionError):
        return False
    return True


def _wrapped(document: Any) -> list[Any] | None:
    """The rows of {"data": [...]}, or None."""
    rows = document.get("data") if isinstance(document, dict) else None
    return rows if isinstance(rows, list) and all(isinstance(r, dict) for r in rows) else None
