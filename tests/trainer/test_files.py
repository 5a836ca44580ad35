"""The trainer's files: formats, encodings, folders, and what cannot be read."""

import bz2
import gzip
import json
import lzma

import pytest

from tests.trainer import trainer_tools  # noqa: F401 - skips where the trainer's packages lack

from rlhf_kernels.trainer import files, formats
from rlhf_kernels.trainer.config import UserError
from rlhf_kernels.trainer.data import read_rows

ROWS = [{"prompt": f"q{i} é✓\u2028", "completion": f" a{i}\r\nb"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=i > 0) + "\n" for i, row in enumerate(ROWS))
ARRAY = json.dumps(ROWS, indent=1)
CSV = 'prompt,completion,margin\n"a, ""b""\nc",x,0.5\nd,y,1\n'


def contents(path):
    return [(row.prompt, row.completion) for row in read_rows(str(path), "supervised")]


WANTED = [(row["prompt"], row["completion"]) for row in ROWS]


def _id(value):
    """Bytes by their length: compressed ones hold the time, and test runners compare names."""
    return f"{len(value)}-bytes" if isinstance(value, bytes) else None


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES.encode()),
        ("a.JSONL", LINES.encode()),
        ("a.ndjson", LINES.replace("\n", "\r\n").encode()),
        ("a.json", LINES.encode()),
        ("a.json", ("\n \n" + LINES + "\n").encode()),
        ("a.json", ARRAY.encode()),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.jsonl", ARRAY.encode()),
        ("a.json", json.dumps({"version": 1, "data": ROWS}).encode()),
        ("a.json", json.dumps({"data": ROWS}, indent=2).encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("a.json", b"\xef\xbb\xbf" + ARRAY.encode()),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.jsonl", "\ufeff".encode("utf-16-be") + LINES.encode("utf-16-be")),
        ("a.json", ARRAY.encode("utf-32")),
        ("a.jsonl.gz", gzip.compress(LINES.encode())),
        ("a.jsonl.GZ", gzip.compress(LINES.encode()) + gzip.compress(b"")),
        ("a.json.gz", gzip.compress(ARRAY.encode("utf-16"))),
        ("a.jsonl.bz2", bz2.compress(LINES.encode())),
        ("a.jsonl.xz", lzma.compress(LINES.encode())),
        # A gz that lost its ending, and names that say nothing.
        ("a.jsonl", gzip.compress(LINES.encode())),
        ("rows", LINES.encode()),
        ("rows.txt", ARRAY.encode("utf-16")),
    ],
    ids=_id,
)
def test_json_in_every_dress(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert contents(tmp_path / name) == WANTED


def test_places_are_lines_or_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n" + LINES)
    (tmp_path / "a.json").write_text(ARRAY)
    for name, places in (
        ("a.jsonl", [":2", ":3", ":4"]),
        ("a.json", [f": row {i}" for i in (1, 2, 3)]),
    ):
        found = [row.origin for row in read_rows(str(tmp_path / name), "supervised")]
        assert found == [f"{tmp_path / name}{place}" for place in places]


def test_csv_and_tsv(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode())
    (tmp_path / "a.TSV").write_text('prompt\tcompletion\nit\'s "a"\tx, y\n\n')
    rows = read_rows(str(tmp_path / "a.csv"), "supervised")
    assert [(r.prompt, r.completion) for r in rows] == [('a, "b"\r\nc', "x"), ("d", "y")]
    assert [r.columns["margin"] for r in rows] == [0.5, 1.0]
    assert contents(tmp_path / "a.TSV") == [('it\'s "a"', "x, y")]
    # Longer than the csv module's own limit, which stays what it was.
    (tmp_path / "long.csv").write_text(f"prompt,completion\n{'x' * 200_000},y\n")
    assert len(contents(tmp_path / "long.csv")[0][0]) == 200_000


def test_tables(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    table = arrow.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "a.parquet")
    with ipc.new_file(tmp_path / "file.arrow", table.schema) as file:
        file.write_table(table)
    with ipc.new_stream(tmp_path / "stream.arrow", table.schema) as stream:
        stream.write_table(table)
    with arrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as stream:
        stream.write(LINES.encode())
    (tmp_path / "noname").write_bytes((tmp_path / "a.parquet").read_bytes())
    for name in ("a.parquet", "file.arrow", "stream.arrow", "a.jsonl.zst", "noname"):
        assert contents(tmp_path / name) == WANTED
    for name in ("a.parquet", "file.arrow", "stream.arrow", "a.jsonl.zst"):
        cut = tmp_path / f"cut-{name}"
        cut.write_bytes((tmp_path / name).read_bytes()[:-30])
        with pytest.raises(UserError, match=f"cut-{name}: (not a whole|truncated)"):
            read_rows(str(cut), "supervised")


def test_conversations_of_a_table_lose_its_nulls(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "assistant", "content": "3"},
    ]
    parquet.write_table(arrow.Table.from_pylist([{"messages": messages}]), tmp_path / "a.parquet")
    (row,) = read_rows(str(tmp_path / "a.parquet"), "supervised")
    assert [*row.prompt, *row.completion] == messages


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=made, test=made.select([0])).save_to_disk(tmp_path / "several")
    datasets.DatasetDict(a=made, b=made).save_to_disk(tmp_path / "named")
    for name in ("one", "several"):
        assert contents(tmp_path / name) == WANTED
    with pytest.raises(UserError, match="named: expected a split 'train', found a, b"):
        read_rows(str(tmp_path / "named"), "supervised")


def test_folders_and_patterns(tmp_path, monkeypatch):
    parts = tmp_path / "parts"
    (parts / "data").mkdir(parents=True)
    for i, line in enumerate(LINES.split("\n")[:3]):
        name = f"train-{i:05}-of-00003.jsonl"
        (parts / "data" / (name if i else name + ".gz")).write_bytes(
            line.encode() if i else gzip.compress(line.encode())
        )
    (parts / "data" / "test-00000-of-00001.jsonl").write_text('{"prompt": "t", "completion": "u"}')
    for name in ("README.md", ".hidden.jsonl", "_SUCCESS", "dataset_infos.json"):
        (parts / name).write_text("no rows")
    assert (
        contents(parts)
        == contents(f"{parts}/data/train-*")
        == contents(f"{parts}/**/tr*")
        == WANTED
    )
    assert contents(f"{parts}/**/test*") == [("t", "u")]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert contents("~/parts/data/train-00001-of-00003.jsonl") == WANTED[1:2]
    monkeypatch.chdir(tmp_path)
    assert contents("parts") == WANTED
    (parts / "train.csv").write_text("prompt,completion\nx,y\n")
    with pytest.raises(UserError, match="parts: expected files of one format, found csv, json"):
        read_rows("parts", "supervised")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test.jsonl").write_text("")
    with pytest.raises(UserError, match="tests: expected files of a split 'train', found test"):
        read_rows("tests", "supervised")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none: expected a folder that holds"):
        read_rows("none", "supervised")
    with pytest.raises(UserError, match="no file matches"):
        read_rows("parts/*.tsv", "supervised")


@pytest.mark.parametrize(
    ("train", "other"),
    [
        ("gsm8k_train.jsonl", "gsm8k_test.jsonl"),
        ("hh-train.jsonl.gz", "hh-test.jsonl.gz"),
        ("my.train.jsonl", "my.validation.jsonl"),
        ("training.jsonl", "testing.jsonl"),
        ("trainset.jsonl", "testset.jsonl"),
        ("TRAIN_1.jsonl", "EVALUATION_1.jsonl"),
        ("default/a-train-0.jsonl", "default/a-eval-0.jsonl"),
        ("test-runs/train/a.jsonl", "test-runs/test/a.jsonl"),
    ],
)
def test_what_is_not_of_the_split_train_is_not_read(tmp_path, train, other):
    for name, prompt in ((train, "p"), (other, "q")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        text = f'{{"prompt": "{prompt}", "completion": "c"}}\n'.encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert contents(tmp_path) == [("p", "c")]


@pytest.mark.parametrize("unused", ["extra.jsonl", "more/a.jsonl.gz", "b.csv", "c.parquet"])
def test_no_file_of_a_folder_is_left_out_unsaid(tmp_path, unused):
    for name in ("train-1.jsonl", "train-2.jsonl", "test.jsonl", unused):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(LINES)
    text = f"expected every name to tell a split, as that of train-1.jsonl does, found {unused};"
    with pytest.raises(UserError, match=text):
        read_rows(str(tmp_path), "supervised")
    (tmp_path / unused).unlink()
    # What is no data, or hidden, is no fault.
    (tmp_path / ".cache").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "sub").mkdir()
    for name in (
        "README.md", "LICENSE", "dataset_infos.json", "sub/dataset_info.json", ".extra.jsonl",
        ".cache/extra.jsonl", "__MACOSX/extra.jsonl", "load.py", "notes.txt", "test_results.md",
    ):  # fmt: skip
        (tmp_path / name).write_text("{")
    assert contents(tmp_path) == WANTED * 2


@pytest.mark.parametrize("twin", ["a.jsonl.gz", "a.json", "a.ndjson", "A.JSONL.gz"])
def test_a_file_that_lies_there_twice_is_not_read_twice(tmp_path, twin):
    # The held-out rows of one would be among the training rows of the other.
    first = "A.jsonl" if twin[0] == "A" else "a.jsonl"
    for name, text in ((first, LINES.encode()), (twin, LINES.encode())):
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    with pytest.raises(UserError, match=r"expected every file once, found .* and .*; move one"):
        read_rows(str(tmp_path), "supervised")
    assert contents(tmp_path / twin) == WANTED
    assert contents(f"{tmp_path}/{first}*") in (WANTED, WANTED * 2)


def test_a_shard_that_is_missing_is_told(tmp_path):
    for name in ("train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl", "train-a.jsonl"):
        (tmp_path / name).write_text(LINES)
    said = r"expected 3 files train-.*-of-00003, found 2 without train-00001-of-00003; get it"
    with pytest.raises(UserError, match=said):
        read_rows(str(tmp_path), "supervised")
    assert contents(f"{tmp_path}/train-0*") == WANTED * 2
    (tmp_path / "train-00001-of-00003.jsonl").write_text(LINES)
    assert contents(tmp_path) == WANTED * 4
    # Some begin to count at one.
    (tmp_path / "train-00000-of-00003.jsonl").rename(tmp_path / "train-00003-of-00003.jsonl")
    assert contents(tmp_path) == WANTED * 4


@pytest.mark.parametrize("split", ["", "train-"])
@pytest.mark.parametrize(
    "unread",
    ["b.jsonl.zip", "b.tar.gz", "b.JSONL.bak", "b.csv.txt", "b.xlsx", "train.txt", "test", "b.jso"],
)
def test_what_cannot_be_read_is_not_passed_over(tmp_path, split, unread):
    (tmp_path / f"{split}a.jsonl").write_text(LINES)
    assert contents(tmp_path) == WANTED
    (tmp_path / unread).write_bytes(b"PK")
    with pytest.raises(UserError, match=f"beside {split}a.jsonl, found {unread}; unpack"):
        read_rows(str(tmp_path), "supervised")


def test_a_folder_named_after_a_split_beside_a_file(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("train/a.jsonl", "train/b.jsonl", "c.jsonl", "d.jsonl", "e.jsonl", "f.jsonl"):
        (tmp_path / name).write_text(LINES)
    with pytest.raises(UserError, match=r"train/a.jsonl does, found c.*, e.jsonl and 1 more;"):
        read_rows(str(tmp_path), "supervised")
    assert contents(tmp_path / "train") == WANTED * 2


def test_links_of_a_folder(tmp_path):
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    (other / "below").mkdir(parents=True)
    (other / "below" / "train-1.jsonl").write_text(LINES)
    (folder / "train-0.jsonl").symlink_to(other / "below" / "train-1.jsonl")
    (folder / "shards").symlink_to(other)
    # Around in a circle.
    (other / "again").symlink_to(folder)
    assert contents(folder) == WANTED * 2
    (folder / "train-2.jsonl").symlink_to(other / "gone.jsonl")
    with pytest.raises(UserError, match=r"train-2.jsonl: cannot be read: No such file"):
        read_rows(str(folder), "supervised")


def test_streams_after_one_another_are_one_file(tmp_path):
    parts = [f"{line}\n".encode() for line in LINES.split("\n")[:3]]
    for module, name in ((gzip, "a.gz"), (bz2, "a.bz2"), (lzma, "a.xz")):
        (tmp_path / name).write_bytes(b"".join(map(module.compress, parts)) + b"\0" * 8)
        assert contents(tmp_path / name) == WANTED


def test_names_that_the_system_refuses(tmp_path):
    for path in ("x" * 5000, "~nobody-of-this-name/a.jsonl"):
        with pytest.raises(UserError, match=r"cannot be read|no such file"):
            read_rows(path, "prompt")


def test_what_exists_or_looks_like_a_path_is_not_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    hub = []
    monkeypatch.setattr(files, "_hub", lambda name: hub.append(name) or iter(()))
    paths = [
        "a.jsonl",
        "a.JSONL",
        "x/y.tsv",
        "here/x",
        "/nowhere/x",
        "./x",
        "~/x",
        "a/b/c",
        "x.txt",
        "c:\\x",
    ]
    for path in paths:
        with pytest.raises(UserError, match="no such file or folder"):
            read_rows(path, "prompt")
    for name in ("gsm8k", "openai/gsm8k", "owner/data-v1.0"):
        with pytest.raises(UserError, match="at least one row"):
            read_rows(name, "prompt")
    assert hub == ["gsm8k", "openai/gsm8k", "owner/data-v1.0"]


def test_the_hub_without_a_network_is_one_sentence(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("datasets")

    def unreachable(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(
        UserError, match=r"x/y: no such file, and the hub was not reached \(no route\);"
    ):
        read_rows("x/y", "prompt")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    monkeypatch.setattr(formats.importlib, "import_module", missing)
    for name, package in (
        ("a.parquet", "pyarrow"),
        ("a.jsonl.zst", "pyarrow"),
        ("saved", "datasets"),
    ):
        with pytest.raises(UserError, match=f"{name}: needs the package '{package}': pip install"):
            read_rows(str(tmp_path / name), "prompt")


GOOD = b'{"prompt": "p"}\n'


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("a.jsonl", b"", "a.jsonl: expected at least one row"),
        ("a.jsonl", b"\n \r\n", "a.jsonl: expected at least one row"),
        ("a.json", b"[]", "a.json: expected at least one row"),
        ("a.csv", b"", "a.csv: expected at least one row"),
        ("a.csv", b"prompt\n", "a.csv: expected at least one row"),
        ("a.jsonl", GOOD + b'{"prompt": "p"', "a.jsonl:2: Expecting ',' delimiter at column 15"),
        ("a.jsonl", GOOD + b"{'prompt': 'p'}", "a.jsonl:2: Expecting property name"),
        ("a.json", b'[{"prompt": "p"},\n{"prompt": }]', "a.json:2: Expecting value at column 12"),
        ("a.json", b'[{"prompt": "p"},\n', "a.json:2: Expecting value"),
        ("a.json", b'[{"prompt": "p"}\n', "a.json:2: expected ',' or '.' after row 1"),
        ("a.json", b'[{"prompt": "p"}\n]\n{}', "a.json:2: expected nothing after the array"),
        ("a.json", b'{\n"data": [\n{]}', "a.json:3: Expecting property name"),
        ("a.json", b'{\n"prompt": 3\n}', "a.json: row 1: 'prompt': expected a text"),
        ("a.json", b'"text"', "a.json:1: row: expected an object, found 'text'"),
        ("a.jsonl", GOOD + b"7", "a.jsonl:2: row: expected an object, found 7"),
        ("a.jsonl", b"[1]\n[2]\n", "a.jsonl:1: row: expected an object"),
        ("a.json", b'[{"prompt": "p"}, null]', "a.json: row 2: row: expected an object"),
        ("a.json", b'{"prompt": \n' + GOOD, "a.json:1: Expecting value"),
        ("a.jsonl", GOOD + b'{"prompt": "p", "prompt": "q"}', "a.jsonl:2: .*'prompt' twice"),
        ("a.json", b'[{"prompt": "p"}, {"a": 1, "a": 2}]', "a.json: row 2: .*'a' twice"),
        ("a.jsonl", GOOD + b'{"prompt": "p", "n": ' + b"9" * 5000 + b"}", "a.jsonl:2: Exceeds"),
        ("a.jsonl", GOOD + b'{"a": ' * 100_000, "a.jsonl:2: expected less deeply nested"),
        ("a.json", b"[" * 100_000, "a.json: row 1: expected less deeply nested"),
        ("a.jsonl", GOOD + '{"prompt": "café"}'.encode("latin-1"), "a.jsonl:2: .*utf-8.*0xe9"),
        ("a.jsonl", GOOD.decode().encode("utf-16-le"), "a.jsonl: expected text, found zero bytes"),
        ("a.jsonl", GOOD.decode().encode("utf-16")[:-1], "a.jsonl:1: expected utf-16 text"),
        ("a.jsonl.gz", gzip.compress(GOOD * 50)[:-20], "a.jsonl.gz: truncated or damaged .gz"),
        ("a.jsonl.gz", gzip.compress(GOOD)[:-8] + b"12345678", "a.jsonl.gz: truncated or damaged"),
        ("a.jsonl.xz", lzma.compress(GOOD)[:-9], "a.jsonl.xz: truncated or damaged .xz"),
        ("a.jsonl.bz2", bz2.compress(GOOD)[:-9], "a.jsonl.bz2: truncated or damaged .bz2"),
        # A second stream whose beginning is damaged: its rows would be gone.
        ("a.jsonl.bz2", bz2.compress(GOOD) + b"BZ?" + bz2.compress(GOOD)[3:], "damaged .bz2: Inva"),
        ("a.jsonl.xz", lzma.compress(GOOD) + lzma.compress(GOOD)[1:], "damaged .xz: Input format"),
        ("a.jsonl.xz", lzma.compress(GOOD) * 2 + b"x", "truncated or damaged .xz"),
        ("a.jsonl.gz", GOOD, "a.jsonl.gz: expected a file compressed as .gz"),
        ("a.csv", b"prompt,prompt\na,b\n", "a.csv:1: expected one column of each name"),
        ("a.csv", b"prompt,x\na,b\nc\n", "a.csv: row 2: expected 2 cells, found 1"),
        ("a.csv", b'prompt,x\na,b\n"c,d\n', "a.csv:3: unexpected end of data"),
        ("a.parquet", b"PAR1 and no more", "a.parquet: not a whole parquet file"),
        ("a.arrow", b"\x00" * 64, "a.arrow: not a whole arrow file"),
        ("a.xlsx", b"PK\x03\x04", "a.xlsx: expected a .json, .jsonl"),
        ("a.txt", b"some text\n", "a.txt: expected a .json, .jsonl"),
    ],
    ids=_id,
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, name, data, match):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=match) as error:
        read_rows(str(tmp_path / name), "prompt")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_not_a_number_is_a_value_of_json_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "x": NaN, "y": -Infinity}\n')
    (row,) = read_rows(str(tmp_path / "a.jsonl"), "prompt")
    assert row.columns["x"] != row.columns["x"] and row.columns["y"] == -float("inf")
