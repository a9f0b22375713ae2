"""Every kind of file gives the same documents, from any position."""

import bz2
import gzip
import json
import lzma
import os
import sys
import sysconfig

import datasets
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.trainer.data.odd_inputs import DOCUMENTS, write_odd_inputs
from tests.trainer.data.reading import BOM, LINE, MANY, bad_records_of, message_of, read, write_delimited
from trainer.common.errors import UserError
from trainer.data.reading import records
from trainer.data.reading.documents import Documents, read_documents


@pytest.fixture(scope="module")
def texts(corpus) -> list[str]:
    return corpus[:40]


@pytest.fixture(scope="module")
def formats(tmp_path_factory, texts):
    """The texts in every format: name -> (source, text field)."""
    root = tmp_path_factory.mktemp("formats")
    made = {}

    def write(name: str, data: bytes, text_field: str = "text") -> None:
        (root / name).write_bytes(data)
        made[name] = (root / name, text_field)

    dicts = [{"id": i, "text": text, "meta": {"text": text, "parts": [text]}} for i, text in enumerate(texts)]
    lines = "".join(json.dumps(record, ensure_ascii=i % 2 == 0) + "\n" for i, record in enumerate(dicts)).encode()
    half = len(lines) // 2
    write("a.jsonl", lines)
    write("mark.jsonl", BOM + lines)
    write("marks.ndjson", BOM + lines[: lines.index(b"\n") + 1] + BOM + lines[lines.index(b"\n") + 1 :])
    write("members.jsonl.gz", gzip.compress(lines[:half]) + gzip.compress(lines[half:]) + bytes(512))
    write("members.JSONL.bz2", bz2.compress(lines[:half]) + bz2.compress(lines[half:]))
    write("members.jsonl.xz", lzma.compress(lines[:half]) + lzma.compress(lines[half:]))
    write("frames.jsonl.zst", zstandard.compress(lines[:half]) + zstandard.compress(lines[half:]))
    write("utf-16.jsonl", lines.decode().encode("utf-16"))
    write("utf-32.jsonl.gz", gzip.compress(lines.decode().encode("utf-32")))
    write("gzip by its first bytes.jsonl", gzip.compress(lines))
    write("unpacked on its way.jsonl.gz", lines)
    write("lines.json", lines)
    write("array.json", json.dumps(dicts).encode())
    write("indented array.json.zstd", zstandard.compress(json.dumps(dicts, indent=1, ensure_ascii=False).encode()))
    write("array.jsonl", json.dumps(dicts, indent=1).encode())
    write("records.json", "\n".join(json.dumps(record, indent=2) for record in dicts).encode())
    write("path.jsonl", lines, "meta.text")
    write("index.jsonl", lines, "meta.parts.0")

    write_delimited(root / "a.csv", texts, ",")
    write("mark.csv", BOM + (root / "a.csv").read_bytes())
    write("a.csv.gz", gzip.compress((root / "a.csv").read_bytes()))
    for name, delimiter in (("semicolons.csv", ";"), ("a.tsv", "\t")):
        write_delimited(root / name, texts, delimiter)
        made[name] = (root / name, "text")

    large = {"large": pa.array(texts, pa.large_string()), "bytes": pa.array([text.encode() for text in texts])}
    table = pa.table({**pa.Table.from_pylist(dicts).to_pydict(), **large}).append_column(
        "dictionary", pa.array(texts).dictionary_encode()
    )
    pq.write_table(table, root / "a.parquet", row_group_size=15)
    with pa.ipc.new_file(root / "a.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=15)
    with pa.ipc.new_stream(root / "stream.arrow", table.schema) as file:
        file.write_table(table)
    feather.write_feather(table, root / "a.feather")
    for name in ("a.parquet", "a.arrow", "stream.arrow", "a.feather"):
        for text_field in ("text", "large", "bytes", "dictionary", "meta.text", "meta.parts.0"):
            made[f"{text_field} of {name}"] = (root / name, text_field)
    (root / "parquet.json").write_bytes((root / "a.parquet").read_bytes())
    made["parquet.json"] = (root / "parquet.json", "text")
    progress = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(dicts).save_to_disk(str(root / "save_to_disk"), num_shards=2)
    if progress:
        datasets.enable_progress_bars()
    made["save_to_disk"] = (root / "save_to_disk", "text")

    plain = root / "plain"
    for i, text in enumerate(texts):
        (plain / f"{i // 10:02}").mkdir(parents=True, exist_ok=True)
        data = text.encode(("utf-8", "utf-8-sig", "utf-16")[i % 3])
        (plain / f"{i // 10:02}" / f"{i:03}.{('txt', 'md', 'py')[i % 3]}").write_bytes(data)
    made["plain text"] = (plain, "text")
    made["glob"] = (plain / "**" / "*.[tmp][xdy]*", "text")
    return made


def test_every_format_gives_the_same_documents(formats, texts):
    for name, (source, text_field) in formats.items():
        assert read(source, text_field) == texts, name


def check_positions(source: str, text_field: str, texts: list[str], name: str) -> None:
    whole = list(Documents(source, text_field))
    assert all(0 < len(piece.text) <= 40 for piece in whole)
    assert "".join(piece.text + "|" * piece.ends_document for piece in whole) == "".join(f"{text}|" for text in texts)
    reading = Documents(source, text_field)
    for i, piece in enumerate(reading):
        assert piece == whole[i]
        if i % 37 < 2 or i == len(whole) - 1:
            state = json.loads(json.dumps(reading.state_dict()))
            behind = Documents(source, text_field, state=state)
            assert list(behind) == whole[i + 1 :], (name, i, state)
            assert behind.state_dict() == json.loads(json.dumps(behind.state_dict()))
            assert behind.progress.records == len(texts)


def test_pieces_and_going_on_from_any_position(formats, texts, small):
    for name, (source, text_field) in formats.items():
        check_positions(str(source), text_field, texts, name)


def test_hub_is_streamed_from_any_position(monkeypatch, texts, small):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check_positions("hub:owner/name:config", "text", texts, "hub")
    assert read("hub:monology/pile-uncopyrighted") == texts
    streamed = {"split": "train", "streaming": True}
    assert calls[0] == (("owner/name", "config"), streamed)
    assert calls[-1] == (("monology/pile-uncopyrighted", None), streamed)
    assert message_of("hub:owner/name", "content").startswith(
        'hub:owner/name, row 1: no text under "content" (its keys: text)'
    )


def test_going_on_within_long_documents(tmp_path, small):
    """Words, lines, and neither; beyond ASCII; in the one file and in records."""
    text = "schön 日本 " * 40 + "\n".join("x" * 9 for _ in range(30)) + "🙂" * 300
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode("utf-16")))
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": text}))
    check_positions(str(tmp_path), "text", [text] * 3, "long")


def test_cuts_do_not_change_tokens(tokenizer_path, monkeypatch):
    from trainer.data.tokenizer import load_tokenizer

    monkeypatch.setattr(records, "PIECE_CHARACTERS", 320)  # 20 characters to look for a place in
    tokenizer = load_tokenizer(str(tokenizer_path))
    text = "pool expert, router  schön\n\n日本 a lane 1 2 'll\tx\r\n" * 100
    ids, begin = [], 0
    while len(text) - begin > 320:
        end = records.cut(text, begin)
        assert 300 <= end - begin <= 320
        ids += tokenizer.encode(text[begin:end]).ids
        begin = end
    assert ids + tokenizer.encode(text[begin:]).ids == tokenizer.encode(text).ids


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_memory_does_not_grow_with_a_document(tmp_path):
    import tracemalloc

    text = ("alpha beta\n" * 100_000).encode()
    with gzip.open(tmp_path / "a.txt.gz", "wb", 1) as file:
        for _ in range(16):
            file.write(text)
    tracemalloc.start()
    try:
        assert sum(len(piece.text) for piece in Documents(str(tmp_path), "text")) == 16 * len(text)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_odd_inputs(tmp_path):
    write_odd_inputs(tmp_path)
    for name in ("good.jsonl", "bom.jsonl", "array.json", "one.jsonl.gz", "hidden"):
        assert read(tmp_path / name) == DOCUMENTS, name
    assert read(tmp_path / "mixed") == DOCUMENTS * 3
    assert sorted(read(tmp_path / "bom_text")) == sorted(DOCUMENTS[:40])
    assert read(tmp_path / "one.txt") == ["\n\n".join(DOCUMENTS) * 3]
    assert read(tmp_path / "big_document.jsonl")[1:] == DOCUMENTS
    assert bad_records_of(tmp_path / "deep.jsonl") == [
        "line 61: not valid JSON (nested too deeply); fix or remove the line"
    ]
    for name, where in (("null.parquet", "row 61"), ("null.jsonl", "line 61")):
        reading = Documents(str(tmp_path / name), "text")
        assert [piece.text for piece in reading] == DOCUMENTS and reading.progress.bad_records == 1
        (bad,) = reading.progress.first_bad
        assert bad.startswith(f'{tmp_path}/{name}, {where}: no text under "text" (it is null)')
        assert message_of(tmp_path / name, max_bad_share=0) == bad


@pytest.mark.parametrize("value", ["null", "NaN", "None", "NA", "1", "true", " x", "\u2028", "\ufeffx"])
def test_what_looks_like_no_text_is_text(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": value, "n": float("nan")}))
    write_delimited(tmp_path / "b.csv", [value], ",")
    pq.write_table(pa.table({"text": [value]}), tmp_path / "c.parquet")
    expected = [] if value.isspace() else [value] * 3
    (tmp_path / "d.txt").write_text("x")
    assert read(tmp_path) == [*expected, "x"]


def test_empty_and_blank_documents_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n  \n{"text": ""}\n{"text": " \\n"}\n' + LINE)
    (tmp_path / "b.txt").write_text(" \n")
    assert read(tmp_path) == ["a document"]
    assert message_of(tmp_path / "b.txt").endswith("b.txt: contains no document; set it to a source with text")


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.parquet", "a.arrow", "a.json", "a.csv"])
def test_file_without_documents(tmp_path, name):
    table = pa.table({"text": pa.array([], pa.string())})
    path = tmp_path / name
    if name.endswith("zst"):
        path.write_bytes(zstandard.compress(b""))
    elif name.endswith("parquet"):
        pq.write_table(table, path)
    elif name.endswith("arrow"):
        feather.write_feather(table, path)
    else:
        path.write_text({"a.json": "[]", "a.csv": "id,text\n"}[name])
    assert "contains no document" in message_of(path)
    (tmp_path / "b.txt").write_text("x")
    assert read(tmp_path) == ["x"]


def test_files_that_change_or_vanish(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(MANY)
    reading = Documents(str(tmp_path), "text")
    pieces = iter(reading)
    next(pieces)
    state = reading.state_dict()
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(LINE)
    with pytest.raises(UserError, match="a.jsonl: has changed while it was read; start again when it is complete"):
        list(pieces)
    assert "its files have changed since the position in them was saved" in message_of(tmp_path, state=state)
    pieces = iter(Documents(str(tmp_path), "text"))
    next(pieces)
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(UserError, match="b.jsonl: cannot be read .no such file or directory."):
        list(pieces)


def test_names_that_are_not_utf_8(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff\n"
    for ending, write in ((b".parquet", pq.write_table), (b".arrow", feather.write_feather)):
        write(pa.table({"text": ["x"]}), tmp_path / "a")
        os.rename(tmp_path / "a", name + ending)
    with open(name + b".jsonl", "wb") as file:
        file.write(LINE + b"{\n")
    reading = Documents(str(tmp_path), "text")
    assert [piece.text for piece in reading] == ["x", "a document", "x"]
    assert reading.progress.first_bad[0].startswith(f"{tmp_path}/\\xff\\n.jsonl, line 2: not valid JSON")
    assert json.loads(json.dumps(reading.state_dict())) == reading.state_dict()


def test_the_standard_library_keeps_its_marks(tmp_path, monkeypatch):
    """A mark is dropped elsewhere; runs on the library from before that can be compared and resumed."""
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfimport a\n")
    (tmp_path / "b.py").write_bytes(b"# latin-1: \xe9\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert list(read_documents("python-stdlib", "text")) == ["\ufeffimport a\n"]
    (tmp_path / "b.py").unlink()
    assert list(read_documents(str(tmp_path), "text")) == ["import a\n"]
