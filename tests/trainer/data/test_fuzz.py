"""Files that are damaged in any way are read or refused by a `UserError`; readers raise nothing else."""

import bz2
import gzip
import io
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.fuzzing import fuzz, user_error
from trainer.data.reading.documents import Documents
from trainer.data.reading.sources import find_files
from trainer.data.tokenizer import end_of_document_id, load_tokenizer, train_tokenizer, vocabulary


def _tables() -> dict[str, bytes]:
    texts = ["alpha beta", "schön 日本 🙂", None, "", "x" * 300]
    table = pa.table(
        {
            "id": [1, 2, 3, 4, 5],
            "text": texts,
            "meta": [{"text": text, "parts": [text]} for text in texts],
            "dictionary": pa.array(texts).dictionary_encode(),
        }
    )
    streams = {name: io.BytesIO() for name in ("a.parquet", "b.parquet", "a.arrow", "b.arrow", "a.feather")}
    pq.write_table(table, streams["a.parquet"], row_group_size=2)
    pq.write_table(table, streams["b.parquet"], compression="none", use_dictionary=False)
    with pa.ipc.new_file(streams["a.arrow"], table.schema) as file:
        file.write_table(table)
    with pa.ipc.new_stream(streams["b.arrow"], table.schema) as file:
        file.write_table(table, max_chunksize=2)
    feather.write_feather(table, streams["a.feather"])
    return {name: stream.getvalue() for name, stream in streams.items()}


def _files() -> dict[str, bytes]:
    records = [{"text": "alpha beta"}, {"id": 7, "text": "schön 日本 🙂 \ud83d"}, {"text": None}, {"text": "[" * 9}]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    plain = "alpha\nschön 日本 🙂\n".encode() * 9
    return _tables() | {
        "a.txt": plain,
        "b.txt": plain.decode().encode("utf-16"),
        "c.txt": plain.decode().encode("utf-32"),
        "a.txt.gz": gzip.compress(plain) * 2,
        "a.txt.bz2": bz2.compress(plain) * 2,
        "a.txt.xz": lzma.compress(plain) * 2,
        "a.txt.zst": zstandard.compress(plain) * 2,
        "a.jsonl": lines,
        "a.json": json.dumps(records).encode(),
        "b.json": json.dumps(records, indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass"),
        "c.json": json.dumps(records[0], indent=1).encode(),
        "a.csv": b'id,text\n1,alpha\n2,"a\n""b"" c"\n\n3,x\n',
        "a.tsv": b"id\ttext\n1\talpha\n2\t\n",
    }


FILES = _files()
edits = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),  # where
        st.sampled_from(["set", "insert", "cut", "drop", "double"]),
        st.binary(min_size=1, max_size=4)
        | st.sampled_from([b"\0", b"\xff\xff\xff\xff", b'"', b"[" * 3000, b"9" * 5000, b"\xef\xbb\xbf", b"\n", b"\r"]),
    ),
    max_size=4,
)


def damaged(content: bytes, changes: list[tuple[float, str, bytes]]) -> bytes:
    for share, change, data in changes:
        at = int(share * len(content))
        before, behind = content[:at], content[at:]
        content = {
            "set": before + data + behind[len(data) :],
            "insert": before + data + behind,
            "cut": before,
            "drop": before + behind[len(data) :],
            "double": before + behind + behind,
        }[change]
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", FILES)
def test_damaged_file(name: str, folder: Path) -> None:
    @fuzz(40)
    @given(changes=edits, field=st.sampled_from(["text", "meta.text", "meta.parts.0", "dictionary", "id", ""]))
    def check(changes, field) -> None:
        path = folder / name
        path.write_bytes(damaged(FILES[name], changes))
        user_error(lambda: list(Documents(str(path), field, max_bad_share=1.0)))

    check()


def test_damaged_tokenizer(folder: Path) -> None:
    content = train_tokenizer(["alpha beta gamma"], 260).to_str().encode()

    @fuzz(40)
    @given(changes=edits)
    def check(changes) -> None:
        path = folder / "tokenizer.json"
        path.write_bytes(damaged(content, changes))

        def load() -> None:
            tokenizer = load_tokenizer(str(path))
            vocabulary(tokenizer)
            end_of_document_id(tokenizer)
            tokenizer.to_str()

        user_error(load)

    check()


def test_odd_source(folder: Path) -> None:
    @fuzz(40)
    @given(source=st.text(alphabet=st.characters() | st.sampled_from("*?[]{}~/:\0\n"), max_size=300))
    def check(source: str) -> None:
        user_error(lambda: find_files(f"{folder}/{source.replace('.', '')}"))

    check()
