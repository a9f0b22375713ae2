import io
import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from trainer.data.documents import read_documents
from trainer.data.sources import source_files
from trainer.errors import UserError

LINE = b'{"text": "a document"}\n'


def read(source, text_field="text") -> list[str]:
    return list(read_documents(str(source), text_field))


def message_of(source, text_field="text") -> str:
    with pytest.raises(UserError) as error:
        read(source, text_field)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=30)
    return path


@pytest.fixture
def formats(tmp_path, corpus, jsonl):
    """The corpus in every format: name -> source."""
    plain = tmp_path / "plain"
    for i, text in enumerate(corpus):
        (plain / f"{i // 10:02}").mkdir(parents=True, exist_ok=True)
        (plain / f"{i // 10:02}" / f"{i:03}.{('txt', 'md', 'py')[i % 3]}").write_text(text, newline="")
    (plain / "notes.csv").write_text("a folder may hold other files")
    lines = jsonl.read_bytes().splitlines(keepends=True)
    compress = zstandard.ZstdCompressor().compress
    one_frame = tmp_path / "one.jsonl.zst"
    one_frame.write_bytes(compress(b"".join(lines)))
    frames = tmp_path / "frames.jsonl.zst"
    frames.write_bytes(b"".join(compress(b"".join(lines)[i : i + 1000]) for i in range(0, len(b"".join(lines)), 1000)))
    for part, half in enumerate((lines[:40], lines[40:])):
        (tmp_path / f"part-{part}.jsonl").write_bytes(b"\n".join(half))
    return {
        "jsonl": jsonl,
        "zst": one_frame,
        "zst of many frames": frames,
        "parquet": write_parquet(tmp_path / "corpus.parquet", id=list(range(100)), text=corpus),
        "folder of plain text": plain,
        "glob": tmp_path / "part-*.jsonl",
        "recursive glob": tmp_path / "plain" / "**" / "*.[tmp][xdy]*",
    }


def test_every_format_gives_the_same_documents(formats, corpus):
    for name, source in formats.items():
        assert read(source) == corpus, name


def test_python_stdlib_is_its_own_sources_and_stable():
    files = source_files("python-stdlib")
    assert files == sorted(files) and len(files) > 300
    assert any(file.name == "argparse.py" for file in files)
    assert not any({"site-packages", "dist-packages"} & set(file.parts) for file in files)
    documents = read_documents("python-stdlib", "text")
    first = [next(documents) for _ in range(20)]
    again = read_documents("python-stdlib", "text")
    assert first == [next(again) for _ in range(20)] and all(first)


def test_nothing_matched(tmp_path):
    (tmp_path / "only.csv").write_text("x")
    for source in (tmp_path / "missing.txt", tmp_path / "*.jsonl", tmp_path):
        assert "no file found" in message_of(source) and ".parquet" in message_of(source)


def test_unknown_kind(tmp_path):
    (tmp_path / "data.csv").write_text("x")
    assert message_of(tmp_path / "data.csv").startswith(f"{tmp_path}/data.csv: unknown kind of file; allowed are .txt")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).touch()
    assert message_of(tmp_path).startswith(f"{tmp_path}/{name}: is empty")


def test_file_of_no_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n  \n")
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(b""))
    write_parquet(tmp_path / "c.parquet", text=pa.array([], pa.string()))
    for name in ("a.jsonl", "b.jsonl.zst", "c.parquet"):
        assert message_of(tmp_path / name).startswith(f"{tmp_path}/{name}: is empty")


def test_invalid_utf8_in_plain_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"first\nsecond \xff line\n")
    assert message_of(tmp_path).startswith(f"{tmp_path}/a.txt, line 2: invalid UTF-8 at byte 8 of the line")


def test_invalid_utf8_in_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE + b'{"text": "\xe9t\xe9"}\n')
    assert message_of(path).startswith(f"{path}, line 2: invalid UTF-8 at byte 11 of the line")
    path.write_bytes(LINE + LINE + json.dumps({"text": "half \ud83d"}).encode())
    assert message_of(path).startswith(f"{path}, line 3: invalid UTF-8: half a surrogate pair")


def test_invalid_utf8_in_parquet(tmp_path):
    bad = pa.array([b"fine", b"caf\xe9"], pa.binary()).view(pa.string())
    path = write_parquet(tmp_path / "a.parquet", text=bad)
    assert message_of(path).startswith(f"{path}, row 2: invalid UTF-8 at byte 3")


def test_truncated_zst(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    whole = zstandard.ZstdCompressor().compress(os.urandom(50_000).hex().join(['{"text": "', '"}\n']).encode())
    for size in (2, 11, 1000, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert message_of(path).startswith(f"{path}: truncated"), size
    path.write_bytes(whole + whole[:1000])  # in the second frame
    assert message_of(path).startswith(f"{path}: truncated")
    path.write_bytes(whole + whole)
    assert len(read(path)) == 2


def test_not_a_zst(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(LINE)
    assert message_of(path).startswith(f"{path}: damaged or not a .zst file")


@pytest.mark.parametrize(
    "line, said",
    [
        (b'{"content": "x", "id": 1}', 'no text under "text" (its keys: content, id)'),
        (b'{"text": null}', 'no text under "text" (its keys: text)'),
        (b'["text"]', 'no text under "text" (its keys: none, it is a list)'),
        (b'{"text": "cut o', "not valid JSON"),
    ],
)
def test_json_line_without_text(tmp_path, line, said):
    for name, pack in (("a.jsonl", bytes), ("a.jsonl.zst", zstandard.ZstdCompressor().compress)):
        path = tmp_path / name
        path.write_bytes(pack(LINE + b"\n" + line + b"\n" + LINE))
        assert message_of(path).startswith(f"{path}, line 3: {said}")


def test_text_field(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"content": "x"}\n{"content": ""}\n{"content": "y"}')
    assert read(path, "content") == ["x", "y"]
    assert "set data.text_field" in message_of(path)


def test_bad_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", content=["x"], id=[1])
    assert message_of(path) == f'{path}: no column "text"; set data.text_field to one of content, id'
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert message_of(path, "content").startswith(f"{path}: damaged or not a parquet file")
    write_parquet(path, text=["x", None])
    assert message_of(path).startswith(f'{path}, row 2: no text under "text"')


def test_hub_is_streamed(monkeypatch, corpus):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return datasets.IterableDataset.from_generator(lambda: ({"text": text, "meta": {}} for text in corpus))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("hub:monology/pile-uncopyrighted") == corpus
    assert read("hub:owner/name:config") == corpus
    streamed = {"split": "train", "streaming": True}
    assert calls == [(("monology/pile-uncopyrighted", None), streamed), (("owner/name", "config"), streamed)]
    assert message_of("hub:owner/name", "content").startswith(
        'hub:owner/name, row 1: no text under "content" (its keys: text, meta)'
    )


def test_hub_out_of_reach(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    said = message_of("hub:owner/name")
    assert "hub:owner/name: the Hugging Face hub cannot be reached" in said and "local copy" in said


def test_hub_lost_on_the_way(monkeypatch):
    def records():
        yield {"text": "first"}
        raise io.UnsupportedOperation("connection lost")  # an OSError, as the hub's own are

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: records())
    documents = read_documents("hub:owner/name", "text")
    assert next(documents) == "first"
    with pytest.raises(UserError, match="cannot be reached"):
        next(documents)


def test_hub_without_the_data_set_or_config(monkeypatch):
    def load_dataset(name, config, **options):
        if config:
            raise ValueError(f"BuilderConfig '{config}' not found.\nAvailable: ['a', 'b']")
        raise datasets.exceptions.DatasetNotFoundError("doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "no such data set" in message_of("hub:owner/name")
    assert "Available: ['a', 'b']" in message_of("hub:owner/name:c")
