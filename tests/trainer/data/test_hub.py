"""What goes wrong on the hub is reported in one line."""

import io

import datasets
import pytest

from tests.trainer.data.reading import message_of
from trainer.common.errors import UserError
from trainer.data.reading.documents import read_documents


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
