"""A small made-up corpus, a tokenizer trained on it, and the settings that prepare it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trainer.data.reading import content, documents, hub, readers, records, tables
from trainer.data.settings import SourceSettings
from trainer.data.tokenizer import train_tokenizer

SPLIT = (6, 3, 1)


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """100 documents of 1 to 80 words, some beyond ASCII."""
    random = np.random.default_rng(0)
    words = ["pool", "expert", "router", "schön", "日本", "a", "\n", "  ", "🙂", "lane"]
    return [" ".join(random.choice(words, size=random.integers(1, 80))) for _ in range(100)]


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory, corpus) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(corpus, 300).save(str(path))
    return path


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory, corpus) -> Path:
    path = tmp_path_factory.mktemp("source") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(corpus)))
    return path


@pytest.fixture
def settings(tmp_path, jsonl, tokenizer_path) -> SourceSettings:
    return SourceSettings(
        source=str(jsonl),
        tokenizer=str(tokenizer_path),
        vocab=300,
        seq_len=13,
        split=SPLIT,
        text_field="text",
        max_documents=None,
        directory=str(tmp_path / "prepared"),
    )


@pytest.fixture
def settings_for(settings):
    """Settings for another source, kept in the same folder."""
    return lambda source, **changes: replace(settings, source=str(source), **changes)


@pytest.fixture
def small(monkeypatch):
    """Pieces of 40 characters, and every other size small as well."""
    for module in (records, documents, readers):
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 40)
    monkeypatch.setattr(readers, "_BLOCK", 64)
    monkeypatch.setattr(content, "_BLOCK", 50)
    monkeypatch.setattr(tables, "_BATCH_ROWS", 7)
    monkeypatch.setattr(hub, "_SNAPSHOT_RECORDS", 7)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """The hub is not asked for a data set's newest commit."""
    monkeypatch.setattr(hub, "_newest_commit", lambda name: None)
