"""What is wrong in a source is reported in one line."""

import bz2
import gzip
import json
import lzma
import random

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.trainer.data.reading import LINE, MANY, bad_records_of, message_of, read, write_delimited
from trainer.data.reading import readers, tables
from trainer.data.reading.documents import Documents


@pytest.mark.parametrize(
    "line, said",
    [
        (b'{"content": "x", "meta": {"a": 1}}', 'no text under "text" (its keys: content, meta, meta.a); fix it'),
        (b'{"text": 5}', 'no text under "text" (it is int); fix it or set data.text_field'),
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
    return reading.progress.first_bad


def test_bad_records_are_kept_in_the_state(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{\n" * 7 + MANY)
    reading = Documents(str(tmp_path), "text", max_bad_share=0.2)
    next(iter(reading))
    again = Documents(str(tmp_path), "text", max_bad_share=0.2, state=json.loads(json.dumps(reading.state_dict())))
    assert again.progress == reading.progress and again.progress.bad_records == 7 and again.progress.records == 8
    list(again)
    assert again.progress.records == 67 and again.progress.bad_records == 7


def test_plain_text_that_is_not_utf_8(tmp_path, small):
    for i in range(60):
        (tmp_path / f"{i:02}.txt").write_text("a document")
    (tmp_path / "long.txt").write_bytes(b"first\n" * 50 + b"second \xff line\n" * 50)
    (tmp_path / "nul.txt").write_bytes(b"first\n" * 50 + b"a\0b")
    reading = Documents(str(tmp_path), "text")
    assert [piece.text for piece in reading] == ["a document"] * 60  # nothing of the bad ones
    assert reading.progress.first_bad == [
        f"{tmp_path}/long.txt, line 51: invalid UTF-8 at byte 8 of the line; convert the file to UTF-8",
        f"{tmp_path}/nul.txt, line 51: a NUL character: not text, or UTF-16 without its mark; convert it",
    ]
    assert message_of(tmp_path / "long.txt").startswith(reading.progress.first_bad[0])


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
        "line 4: 1 fields, but there are 2 columns; fix it",
        "line 5: 3 fields, but there are 2 columns; fix it",
        "line 7: not a row (',' expected after '\"'; quotes within a field must be doubled); fix it",
    ]
    assert read(path)[0] == 'two "words", a comma,\r\nand a line'
    path.write_bytes(b"text\n" + b"a\n" * 60 + b"caf\xe9\n")
    assert bad_records_of(path) == ["line 62: invalid UTF-8 in its text; fix or remove it"]
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
    # The same bytes each time: what is wrong with a damaged stream depends on what is in it.
    whole = pack(json.dumps({"text": random.Random(0).randbytes(20_000).hex()}).encode() + b"\n")
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
