"""Kinds of files: the same rows whatever holds them, with the lines that they stand on."""

from __future__ import annotations

import gzip
import json
import sys

import pytest

from multigraft import DataError, MissingExtraError, UnsupportedError
from multigraft.train import BadLine, Pair, Text, read, stream
from multigraft.train.files import READERS, Row, read_rows

ROWS = [{"prompt": f"p{n}\n\u2028é", "completion": f"c{n}"} for n in range(3)]


def records(path, **options):
    return [(r.prompt, r.completion) for r in read(path, **options).check()]


def write_csv(path, separator=","):
    cells = [f'"{row["prompt"]}"{separator}{row["completion"]}' for row in ROWS]
    path.write_text("\n".join([f"prompt{separator}completion", *cells, ""]), encoding="utf-8")


def write_parquet(path):
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(ROWS), path)


def write_gzip(path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    path.write_bytes(gzip.compress(lines.encode()))


WRITERS = {
    "a.jsonl": lambda p: p.write_text("".join(json.dumps(r) + "\n" for r in ROWS)),
    "a.jsonl.gz": write_gzip,
    "list.json": lambda p: p.write_text(json.dumps(ROWS, indent=1)),
    "inside.json": lambda p: p.write_text(json.dumps({"n": {"rows": [1]}, "rows": ROWS})),
    "lines.json": lambda p: p.write_text("".join(json.dumps(r) + "\n" for r in ROWS)),
    "a.csv": write_csv,
    "a.tsv": lambda p: write_csv(p, "\t"),
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_holds_the_same_records(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert records(tmp_path / name) == [(r["prompt"], r["completion"]) for r in ROWS]


def test_a_directory_is_its_files_in_the_order_of_their_names(tmp_path):
    for name in ("b.json", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "README.md").write_text("not data")
    found = list(stream(tmp_path))
    assert [(f.file, f.record.text) for f in found] == [
        (str(tmp_path / name), name) for name in ("a.jsonl", "b.json")
    ]


def test_a_directory_that_datasets_saved_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict({"valid": table}).save_to_disk(tmp_path / "no-train")
    for name in ("one", "splits"):
        assert records(tmp_path / name) == [(r["prompt"], r["completion"]) for r in ROWS]
    with pytest.raises(DataError, match=r"no split `train`. There are: `valid`"):
        read(tmp_path / "no-train")


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:test", ("owner/name", None, "test")),
        ("owner/name@en:test", ("owner/name", "en", "test")),
    ],
)
def test_an_id_on_the_hub_is_streamed(monkeypatch, source, asked):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split))
        assert streaming
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [row.line for row in read_rows(source)] == [1, 2, 3]
    assert calls == [asked]


def test_an_id_that_the_hub_does_not_have_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_, **__):
        raise ValueError("no such data set.\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"owner/x cannot .* could not be had \(no such data set\)"):
        read("owner/x")


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("o/n", "datasets")])
def test_an_absent_package_is_named_with_its_extra(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    source = tmp_path / name if "." in name else name
    if "." in name:
        source.write_bytes(b"")
    with pytest.raises(MissingExtraError, match=rf"needs {package}.*'multigraft\[data\]'"):
        read(source)


def test_rows_are_read_no_further_than_they_are_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 3)
    found = stream(path)
    assert next(found).record == Text("a", 1)
    path.write_bytes(b"")  # what is not read yet is not in memory either, but for a buffer
    big = tmp_path / "big.jsonl"
    big.write_bytes(b'{"text": "a"}\n' + b" " * 2**22 + b"\nbad\n")
    assert next(stream(big)).record == Text("a", 1)


def test_texts_are_parted_by_empty_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n\r\nthree\n")
    assert read(path).check() == [Text("one\ntwo", 1), Text("three", 5)]


def bad(path) -> tuple[int, str]:
    records = read(path)
    (line,) = records.bad
    assert line.file == str(path)
    return line.line, line.why


def test_the_lines_of_objects_in_a_list_are_told(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"text": "a"},\n\n{"txt": "b"},\n{"text": "c"}\n]')
    assert bad(path) == (4, "`prompt` is missing")
    assert [r.line for r in read(path).good] == [2, 5]


@pytest.mark.parametrize(
    ("name", "content", "line", "why"),
    [
        ("a.json", '[{"text": "a"},\n{"text": b}]', 2, "not valid JSON"),
        ("a.json", '[{"text": "a"},\n', 2, "not valid JSON"),
        ("a.json", '[{"text": "a"} \n {"text": "b"}]', 2, "not valid JSON"),
        ("a.json", '[{"text": "a"},\n3]', 2, "a number, not an object"),
        ("a.json", b'["\n\xff"]', 2, "not UTF-8"),
        ("a.csv", 'text,n\na,1\n"b\nc",2,3\n', 3, "3 cells under 2 columns"),
        ("a.csv", 'text,n\na,1\n"b', 3, "not valid CSV"),
        ("a.txt", b"a\n\n\xff", 3, "not UTF-8"),
    ],
)
def test_what_is_broken_is_told_with_its_line(tmp_path, name, content, line, why):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    number, reason = bad(path)
    assert number == line
    assert why in reason


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"damaged", "a.parquet cannot be read"),
        ("a.jsonl.gz", b"damaged", "a.jsonl.gz cannot be read"),
        ("a.xlsx", b"", r"files of this kind are unknown. Known: \.jsonl"),
        ("a.csv", b"text\n\xff\n", "a.csv cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_a_directory_without_data_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no data files"):
        read(tmp_path)


def test_a_kind_of_ones_own_is_read(tmp_path):
    def rows(path):
        yield Row(str(path), 1, {"text": path.read_text()})
        yield BadLine(str(path), 2, "why", "remedy")

    READERS.register(".mine", rows)
    try:
        (tmp_path / "a.mine").write_text("hello")
        found = read(tmp_path / "a.mine")
    finally:
        READERS.unregister(".mine")
    assert found.good == [Text("hello", 1)]
    assert len(found.bad) == 1


def test_an_unknown_format_is_told_before_anything_is_read(tmp_path):
    with pytest.raises(UnsupportedError, match="Nearest: `alpaca`"):
        stream(tmp_path / "absent.jsonl", "alpacca")


def test_long_cells_are_read(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\nq," + "x" * 300_000 + "\n")
    assert read(tmp_path / "a.csv").check() == [Pair("q", "x" * 300_000, 2)]
