"""Odd inputs: byte-order marks, NUL characters, unusual line endings, hidden files, long documents, deep JSON."""

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

WORDS = ["alpha", "beta", "gamma", "delta", "router", "expert", "pool", "token", "layer", "depth", "width", "loss"]
_RANDOM = random.Random(0)


def document(words: int = 80) -> str:
    return " ".join(_RANDOM.choice(WORDS) for _ in range(words))


DOCUMENTS = [document() for _ in range(60)]


def lines(records: list) -> bytes:
    return b"".join((json.dumps(record) + "\n").encode() for record in records)


def write_odd_inputs(root: Path, big_document_words: int = 5_000) -> None:
    def write(name: str, data: bytes) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    good = lines([{"text": text} for text in DOCUMENTS])
    write("good.jsonl", good)
    write("bom.jsonl", b"\xef\xbb\xbf" + good)
    write("null.jsonl", good + lines([{"text": None}, {"text": ""}]))
    write("array.json", json.dumps([{"text": text} for text in DOCUMENTS]).encode())
    write("one.jsonl.gz", gzip.compress(good))
    write("one.txt", ("\n\n".join(DOCUMENTS) * 3).encode())
    for i in range(40):
        write(f"bom_text/{i}.txt", b"\xef\xbb\xbf" + DOCUMENTS[i].encode())
    write("mixed/a.jsonl", good)
    write("mixed/b.jsonl.gz", gzip.compress(good))
    write("mixed/c.JSONL", good)
    write("mixed/._a.jsonl", b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    write("hidden/a.jsonl", good)
    write("hidden/.ipynb_checkpoints/a-checkpoint.jsonl", good)
    write("deep.jsonl", good + b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n")
    write("big_document.jsonl", lines([{"text": document(big_document_words)}]) + good)
    pq.write_table(pa.table({"text": [*DOCUMENTS, None]}), root / "null.parquet")
