"""What goes wrong on the hub is reported in one line."""

import io
from dataclasses import replace

import datasets
import pytest

from tests.trainer.data.reading import message_of
from trainer.common.errors import Unavailable
from trainer.data import source_builder
from trainer.data.cache import Conduct
from trainer.data.prepare import prepare_source
from trainer.data.reading import hub
from trainer.data.reading.documents import read_documents


def test_hub_out_of_reach(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    said = message_of("hub:owner/name")
    assert "hub:owner/name: the Hugging Face hub cannot be reached" in said and "local copy" in said


class Hub:
    """A data set of 20 records whose connection breaks before the record `breaks_at`, `times` times.

    Attributes:
        asked: The options of each request.
    """

    def __init__(self, breaks_at, times):
        self.breaks_at, self.times, self.asked = breaks_at, times, []

    def load_dataset(self, *args, **options):
        self.asked.append(options)

        def records():
            for number in range(20):
                if number == self.breaks_at and self.times > 0:
                    self.times -= 1
                    raise io.UnsupportedOperation("connection lost")  # an OSError, as the hub's own are
                yield {"text": f"text {number}"}

        return datasets.IterableDataset.from_generator(records)


@pytest.fixture
def flaky(monkeypatch):
    flaky = Hub(breaks_at=15, times=7)
    monkeypatch.setattr(datasets, "load_dataset", flaky.load_dataset)
    monkeypatch.setattr(hub, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(hub, "_SNAPSHOT_RECORDS", 4)
    return flaky


def test_hub_lost_on_the_way_is_asked_again(flaky, capfd):
    assert list(read_documents("hub:owner/name", "text")) == [f"text {number}" for number in range(20)]
    assert len(flaky.asked) == 8 and capfd.readouterr().err.count("trying again in") == 7


def test_hub_that_stays_away_may_come_back_later(flaky):
    """So the status is not that of wrong input."""
    flaky.times = 100
    with pytest.raises(Unavailable, match="cannot be reached") as error:
        list(read_documents("hub:owner/name", "text"))
    assert error.value.status == 1 and len(flaky.asked) == 9


def test_a_resumed_preparation_reads_the_same_commit(flaky, settings_for, monkeypatch):
    """The hub is lost for good after some records; when it is back, it has a newer commit."""
    monkeypatch.setattr(source_builder, "BATCH_CHARACTERS", 20)
    monkeypatch.setattr(source_builder, "COMMIT_TOKENS", 20)
    monkeypatch.setattr(hub, "_newest_commit", lambda name: "old")
    settings = settings_for("hub:owner/name", split=(1, 0, 0))
    flaky.times = 100
    with pytest.raises(Unavailable):
        prepare_source(settings, Conduct(show=False))
    flaky.times = 0
    monkeypatch.setattr(hub, "_newest_commit", lambda name: "new")
    flaky.asked.clear()
    resumed = prepare_source(settings, Conduct(show=False))
    assert flaky.asked == [{"split": "train", "streaming": True, "revision": "old"}]
    monkeypatch.setattr(hub, "_newest_commit", lambda name: "old")
    whole = prepare_source(replace(settings, directory=f"{settings.directory}-whole"), Conduct(show=False))
    assert resumed.identity == whole.identity
    assert (resumed.path / "train.arrow").read_bytes() == (whole.path / "train.arrow").read_bytes()


def test_hub_without_the_data_set_or_config(monkeypatch):
    def load_dataset(name, config, **options):
        if config == "script":
            raise RuntimeError("Dataset scripts are no longer supported")
        if config == "empty":
            raise datasets.exceptions.DataFilesNotFoundError("No data files found in owner/name")
        if config:
            raise ValueError(f"BuilderConfig '{config}' not found.\nAvailable: ['a', 'b']")
        raise datasets.exceptions.DatasetNotFoundError("doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "no such data set" in message_of("hub:owner/name")
    assert "Available: ['a', 'b']" in message_of("hub:owner/name:c")
    assert "scripts are no longer supported" in message_of("hub:owner/name:script")
    assert "cannot be reached" not in message_of("hub:owner/name:empty")
