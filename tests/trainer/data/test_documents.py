"""Every kind of file gives the same documents, from any position on, and what is bad in it is told in one line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import sys
import sysconfig
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.trainer.data.odd_inputs import DOCUMENTS, write_odd_inputs
from trainer.common.errors import UserError
from trainer.data.reading import content, documents, hub, readers, records, tables
from trainer.data.reading.documents import Documents, read_documents

LINE = b'{"text": "a document"}\n'
BOM = b"\xef\xbb\xbf"
MANY = LINE * 60  # one bad record among them is few


def read(source, text_field="text") -> list[str]:
    return list(read_documents(str(source), text_field))


def message_of(source, text_field="text", **options) -> str:
    with pytest.raises(UserError) as error:
        list(Documents(str(source), text_field, **options))
    assert str(error.value).isprintable()
    return str(error.value)


def bad_records_of(source, text_field="text", good=60) -> list[str]:
    """The first bad records of a source of 60 good ones, without the path."""
    read = Documents(str(source), text_field)
    assert sum(piece.ends_document for piece in read) == good
    assert read.records == good + read.bad_records
    return [line.removeprefix(f"{source}, ") for line in read.first_bad]


def write_delimited(path: Path, texts: list[str], delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerow(["id", "text"])
        rows.writerows(enumerate(texts))


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


@pytest.fixture
def small(monkeypatch):
    """Pieces of 40 characters, and every other size small as well."""
    for module in (records, documents, readers):
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 40)
    monkeypatch.setattr(readers, "_BLOCK", 64)
    monkeypatch.setattr(content, "_BLOCK", 50)
    monkeypatch.setattr(tables, "_BATCH_ROWS", 7)
    monkeypatch.setattr(hub, "_SNAPSHOT_RECORDS", 7)


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
            assert behind.records == len(texts)


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
        "line 61: not valid JSON (nested too deeply); mend or remove the line"
    ]
    for name, where in (("null.parquet", "row 61"), ("null.jsonl", "line 61")):
        reading = Documents(str(tmp_path / name), "text")
        assert [piece.text for piece in reading] == DOCUMENTS and reading.bad_records == 1
        assert reading.first_bad[0].startswith(f'{tmp_path}/{name}, {where}: no text under "text" (it is null)')
        assert message_of(tmp_path / name, max_bad_share=0) == reading.first_bad[0]


@pytest.mark.parametrize(
    "line, said",
    [
        (b'{"content": "x", "meta": {"a": 1}}', 'no text under "text" (its keys: content, meta, meta.a); mend it'),
        (b'{"text": 5}', 'no text under "text" (it is int); mend it or set data.text_field'),
        (b'["text"]', 'no text under "text" (it has no keys, it is list of str)'),
        (b'"text"', 'no text under "text" (it has no keys, it is str)'),
        (
            b'{"text": ["a", "b"]}',
            '"text" is a list of str, such as chat messages or sentences; join them into one text first',
        ),
        (b'{"text": "cut o', "not valid JSON (Invalid control character at)"),
        (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "not valid JSON (a number with too many digits)"),
        (b'{"text": "\xe9t\xe9"}', "invalid UTF-8 at byte 11 of the line"),
        (b'{"text": "half \\ud83d"}', "half a surrogate pair, which is invalid UTF-8, in its text"),
        (b'{"text": "a\\u0000b"}', "a NUL character in its text"),
        (b'{"text": "a\0b"}', "not valid JSON (Invalid control character at)"),
        (b"\0" * 30, "not valid JSON (Expecting value)"),
    ],
)
def test_bad_lines(tmp_path, line, said):
    for name, pack in (("a.jsonl", bytes), ("a.jsonl.zst", zstandard.compress)):
        path = tmp_path / name
        path.write_bytes(pack(LINE + b"\n" + line + b"\n" + LINE * 59))
        (bad,) = bad_records_of(path)
        assert bad.startswith(f"line 3: {said}")


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


def test_share_of_bad_records(tmp_path):
    path = tmp_path / "a.jsonl"
    bad = b'{"texts": "x"}\n'
    path.write_bytes(bad * 1000)
    assert message_of(path).startswith(f'{path}, line 1: no text under "text" (its keys: texts)')
    assert message_of(path).endswith("(100 of 100 records are bad, and data.max_bad_share is 0.05)")
    path.write_bytes(LINE * 2000 + bad * 200)
    assert "(106 of 2,106 records are bad" in message_of(path)
    path.write_bytes(bad * 99 + LINE * 1881)
    assert bad_records_of(path, good=1881)[0].startswith("line 1: ")
    path.write_bytes(LINE * 2 + bad)  # too large a share, but of very few
    assert len(bad_records_of(path, good=2)) == 1
    for lines in (LINE + bad * 2, LINE * 100 + bad * 11):
        path.write_bytes(lines)
        assert "records are bad" in message_of(path)
        assert len(bad_records_of_lenient(path)) == min(5, lines.count(bad))


def bad_records_of_lenient(path) -> list[str]:
    reading = Documents(str(path), "text", max_bad_share=1.0)
    list(reading)
    return reading.first_bad


def test_bad_records_are_kept_in_the_state(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{\n" * 7 + MANY)
    reading = Documents(str(tmp_path), "text", max_bad_share=0.2)
    next(iter(reading))
    again = Documents(str(tmp_path), "text", max_bad_share=0.2, state=json.loads(json.dumps(reading.state_dict())))
    assert again.bad_records == 7 and again.records == 8 and again.first_bad == reading.first_bad
    list(again)
    assert again.records == 67 and again.bad_records == 7


def test_plain_text_that_is_not_utf_8(tmp_path, small):
    for i in range(60):
        (tmp_path / f"{i:02}.txt").write_text("a document")
    (tmp_path / "long.txt").write_bytes(b"first\n" * 50 + b"second \xff line\n" * 50)
    (tmp_path / "nul.txt").write_bytes(b"first\n" * 50 + b"a\0b")
    reading = Documents(str(tmp_path), "text")
    assert [piece.text for piece in reading] == ["a document"] * 60  # nothing of the bad ones
    assert reading.first_bad == [
        f"{tmp_path}/long.txt, line 51: invalid UTF-8 at byte 8 of the line; convert the file to UTF-8",
        f"{tmp_path}/nul.txt, line 51: a NUL character: not text, or UTF-16 without its mark; convert it",
    ]
    assert message_of(tmp_path / "long.txt").startswith(reading.first_bad[0])


def test_long_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "RECORD_BYTES", 50)
    monkeypatch.setattr(tables, "RECORD_BYTES", 50)
    monkeypatch.setattr(readers, "_CSV_FIELD", 50)
    monkeypatch.setattr(readers, "_BLOCK", 8)
    long = json.dumps({"text": "x" * 200}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(LINE + long + LINE * 59)
    assert bad_records_of(tmp_path / "a.jsonl")[0].startswith("line 2: longer than")
    texts = ["a", "x" * 200, *"b" * 59]
    write_delimited(tmp_path / "a.csv", texts, ",")
    assert bad_records_of(tmp_path / "a.csv")[0].startswith("line 3: ")
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    assert bad_records_of(tmp_path / "a.parquet")[0].startswith("row 2: longer than")
    (tmp_path / "a.json").write_bytes(b"[" + long + b"]")
    assert "line 1: a record is longer than" in message_of(tmp_path / "a.json")


def test_rows_of_csv(tmp_path):
    path = tmp_path / "a.csv"
    good = '1,"two ""words"", a comma,\r\nand a line"\r\n'
    path.write_text("id, text\r\n" + good + "2\r\n1,2,3\r\n\r\n" + '3,"open"quote\r\n' + good * 59, newline="")
    assert bad_records_of(path) == [
        "line 4: 1 fields, but there are 2 columns; mend it",
        "line 5: 3 fields, but there are 2 columns; mend it",
        "line 7: not a row (',' expected after '\"'; quotes within a field must be doubled); mend it",
    ]
    assert read(path)[0] == 'two "words", a comma,\r\nand a line'
    path.write_bytes(b"text\n" + b"a\n" * 60 + b"caf\xe9\n")
    assert bad_records_of(path) == ["line 62: invalid UTF-8 in its text; mend or remove it"]
    path.write_text("content;id\na;1\n")
    assert (
        message_of(path)
        == f'{path}: no column "text"; set data.text_field to one of content, id, or remove the file from data.source'
    )


def test_text_fields(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"a.b": {"c": "x"}, "a": {"b.c": "y"}, "l": [{"t": "z"}], "": "e"}))
    assert [read(path, field) for field in ("a.b.c", "l.0.t", "")] == [["x"], ["z"], ["e"]]
    for field in ("a.b.d", "l.1.t", "l.x", "a.b.c.d"):
        assert "(its keys: a.b, a, l, , a.b.c, a.b.c)" in message_of(path, field)
    pq.write_table(pa.table({"a.b": ["x"], "a": [{"b": "y", "c": "z"}]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", "a.b") == ["x"] and read(tmp_path / "a.parquet", "a.c") == ["z"]


def test_json_files_with_faults(tmp_path):
    path = tmp_path / "a.json"
    for text, said in (
        ('[{"text": "x"}', "line 1: not valid JSON (it ends in the middle)"),
        ('[{"text": "x"}, ', "line 1: not valid JSON (Expecting value)"),
        ('[{"text": "x"}\n{"text": "y"}]', 'line 2: not valid JSON ("," is missing)'),
        ('[{"text": "x"}] 5', "line 1: not valid JSON (something follows the end of the array)"),
        ('[\n{"text": "x}]', "line 2: not valid JSON (Unterminated string starting at)"),
        ('[{"text": ' + "[" * 100_000, "line 1: not valid JSON (nested too deeply)"),
        ('{\n"text": "x"\n', "line 1: not valid JSON (Expecting ',' delimiter)"),
        ('["a", "b"]', 'line 1: no text under "text" (it has no keys, it is str)'),
        ('{"data": [{"text": "x"}]}', 'line 1: no text under "text" (its keys: data)'),
    ):
        path.write_text(text)
        assert message_of(path).startswith(f"{path}, {said}"), text


def test_tables_with_faults(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"content": ["x"], "id": [1], "chat": [[{"role": "user"}]], "meta": [{"text": "x"}]})
    pq.write_table(table, path)
    feather.write_feather(table, tmp_path / "a.feather")
    for file in (path, tmp_path / "a.feather"):
        expected = "set data.text_field to one of content, id, chat, meta, meta.text, or remove the file"
        assert message_of(file) == f'{file}: no column "text"; {expected} from data.source'
        assert expected in message_of(file, "meta.x")
        assert 'no text under "id" (it is int64)' in message_of(file, "id")
        assert 'no text under "meta" (it is struct<text: string>)' in message_of(file, "meta")
        assert '"chat" is a list of struct<role: string>, such as chat messages' in message_of(file, "chat")
        whole = file.read_bytes()
        file.write_bytes(whole[:-20])
        assert message_of(file, "content").startswith(f"{file}: damaged, or not a .")
        file.write_bytes(b"")
        assert message_of(tmp_path, "content").startswith(f"{file}: damaged, or not a .")
        file.unlink()
    bad = pa.array([b"caf\xe9"] + [b"fine"] * 60, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), path)
    assert bad_records_of(path) == ["row 1: invalid UTF-8 at byte 4 of the text; convert the text to UTF-8"]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstandard.compress])
def test_packed_files_with_faults(tmp_path, pack):
    ending = {gzip.compress: ".gz", bz2.compress: ".bz2", lzma.compress: ".xz"}.get(pack, ".zst")
    path = tmp_path / f"a.jsonl{ending}"
    whole = pack(json.dumps({"text": os.urandom(20_000).hex()}).encode() + b"\n")
    for size in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert message_of(path).startswith(f"{path}: truncated: it ends in the middle of the {ending} data"), size
    path.write_bytes(whole + whole[: len(whole) // 2])  # in the second part
    assert message_of(path).startswith(f"{path}: truncated")
    for data in (whole + b"rubbish", whole[:60] + b"rubbish" * 9 + whole[120:], b"\x93\xff" * 9):
        path.write_bytes(data)
        assert message_of(path).startswith(f"{path}: damaged, or not a {ending} file")
    path.write_bytes(pack(pack(LINE)))
    assert message_of(path) == f"{path}: is compressed twice; decompress it once"
    path.write_bytes(b"")
    assert message_of(tmp_path).startswith(f"{path}: damaged, or not a {ending} file")


@pytest.mark.parametrize(
    "content, said",
    [
        (b"PK\x03\x04 and so on", "is a .zip archive or an office document; unpack it"),
        (b"%PDF-1.7", "is a PDF; save its text"),
        (b"x" * 257 + b"ustar", "is a .tar archive"),
        (gzip.compress(b"x" * 257 + b"ustar", mtime=0), "is a .tar archive"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            'is a pointer of Git LFS; fetch its content with "git lfs',
        ),
        (gzip.compress(b"PAR1", mtime=0), "is a compressed .parquet file; decompress it"),
        ("a document".encode("utf-32")[:-1], "not valid UTF-32, although it begins with its byte-order mark"),
        ("a document".encode("utf-16")[:-1], "not valid UTF-16, although it begins with its byte-order mark"),
    ],
)
def test_what_the_ending_does_not_say(tmp_path, content, said):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(content)
        assert message_of(tmp_path / name).startswith(f"{tmp_path}/{name}: {said}")


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
    assert reading.first_bad[0].startswith(f"{tmp_path}/\\xff\\n.jsonl, line 2: not valid JSON")
    assert json.loads(json.dumps(reading.state_dict())) == reading.state_dict()


def test_hub_out_of_reach(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    said = message_of("hub:owner/name")
    assert "hub:owner/name: the Hugging Face hub cannot be reached" in said and "local copy" in said


def test_hub_lost_on_the_way(monkeypatch):
    def lost():
        yield {"text": "first"}
        raise io.UnsupportedOperation("connection lost")  # an OSError, as the hub's own are

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: lost())
    pieces = read_documents("hub:owner/name", "text")
    assert next(pieces) == "first"
    with pytest.raises(UserError, match="cannot be reached"):
        next(pieces)


def test_hub_without_the_data_set_or_config(monkeypatch):
    def load_dataset(name, config, **options):
        if config == "script":
            raise RuntimeError("Dataset scripts are no longer supported")
        if config:
            raise ValueError(f"BuilderConfig '{config}' not found.\nAvailable: ['a', 'b']")
        raise datasets.exceptions.DatasetNotFoundError("doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "no such data set" in message_of("hub:owner/name")
    assert "Available: ['a', 'b']" in message_of("hub:owner/name:c")
    assert "scripts are no longer supported" in message_of("hub:owner/name:script")


def test_the_standard_library_keeps_its_marks(tmp_path, monkeypatch):
    """A mark is dropped elsewhere; runs on the library from before that can be compared and resumed."""
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfimport a\n")
    (tmp_path / "b.py").write_bytes(b"# latin-1: \xe9\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert list(read_documents("python-stdlib", "text")) == ["\ufeffimport a\n"]
    (tmp_path / "b.py").unlink()
    assert list(read_documents(str(tmp_path), "text")) == ["import a\n"]
