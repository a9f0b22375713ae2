"""Training text in parts: the rows are those of a whole preparation, and their order depends on the step alone."""

import dataclasses
import errno
import itertools
import json
import sys
import threading
import time
from bisect import bisect_left
from unittest.mock import Mock

import numpy as np
import pytest

from tests.distributed import TIME_LIMIT
from trainer.common.errors import Unavailable, UserError
from trainer.config.recipe import load_recipe
from trainer.data import source_builder
from trainer.data.batches import permutation
from trainer.data.cache import Conduct
from trainer.data.packing import SplitWriter
from trainer.data.prepare import prepare_for, prepare_source
from trainer.data.prepared_data import describe
from trainer.data.settings import SourceSettings
from trainer.data.streaming import parts as parts_module
from trainer.data.streaming.parts import SourceParts
from trainer.data.streaming.stream import PartStream
from trainer.train.dry_run.rehearsal import rehearsal

QUIET = Conduct(show=False, patience=TIME_LIMIT)
SIZE = 7


@pytest.fixture
def training(settings, monkeypatch):
    """Settings of text for training only, some of which is left out; read in many small batches."""
    monkeypatch.setattr(parts_module, "BATCH_CHARACTERS", 150)
    monkeypatch.setattr(source_builder, "BATCH_CHARACTERS", 150)
    return dataclasses.replace(settings, split=(9, 0, 1))


@pytest.fixture
def alone(monkeypatch):
    """No part is made in the background."""
    monkeypatch.setattr(SourceParts, "reach_in_background", lambda *_: None)


def stream_of(settings, seed=3) -> PartStream:
    return PartStream(SourceParts(settings, SIZE, QUIET), seed)


def sequences(stream, step, ranks=1):
    """The 4 sequences of a step, from all ranks in their order."""
    found = [batch.numpy() for rank in range(ranks) for batch in stream.micro_batches(step, 4, rank, ranks, 2)]
    return np.concatenate(found)


@pytest.mark.parametrize("max_tokens", [None, 1000, 2 * SIZE * 13 + 1])
def test_the_parts_are_the_whole(max_tokens, training, alone):
    """Together the parts have the rows of a whole preparation, in their order; each but the last has as many."""
    training = dataclasses.replace(training, max_tokens=max_tokens)
    whole = prepare_source(training, QUIET).rows("train")
    parts = SourceParts(training, SIZE, QUIET)
    parts.reach(10**6)
    assert parts.total == len(whole) >= 2 * SIZE
    for place in range(-(-len(whole) // SIZE)):
        rows = parts.rows(place)
        first = place * SIZE
        assert len(rows) == min(SIZE, len(whole) - first)
        assert (rows[range(len(rows))] == whole[range(first, first + len(rows))]).all()


@pytest.mark.parametrize("rows", [SIZE, 2 * SIZE, SIZE + 1])
def test_a_source_that_ends_with_a_part(rows, settings_for, training, alone, tmp_path):
    """No part is empty, wherever the text ends."""
    source = tmp_path / "exact.txt"
    whole = prepare_source(training, QUIET)
    encode = whole.tokenizer().encode
    text = "".join(chr(ord("a") + i % 26) + " " for i in range(3000))
    size = bisect_left(range(len(text)), rows * training.seq_len, key=lambda size: len(encode(text[:size]).ids))
    text = text[:size]
    assert len(encode(text).ids) == rows * training.seq_len, "and a token that ends it"
    source.write_text(text)
    parts = SourceParts(dataclasses.replace(training, source=str(source), split=(1, 0, 0)), SIZE, QUIET)
    parts.reach(10)
    assert parts.total == rows and len(list(parts.folder.glob("0*[0-9]"))) == -(-rows // SIZE)


def test_every_layout_and_every_start_reads_the_same(training):
    """What a step reads depends neither on the ranks, nor on where a run resumes, nor on which parts are there."""
    training = dataclasses.replace(training, max_documents=15)
    first = stream_of(training)
    steps = range(30)
    read = [sequences(first, step) for step in steps]
    total = first._parts.total
    assert total and 2 * total < 30 * 4, "more than two epochs"
    assert first._parts._reader and first._parts._reader.part > 3, "one reader, from the first part to the last"
    for ranks, step in ((2, 29), (1, 11), (2, 0)):
        assert (sequences(stream_of(training), step, ranks) == read[step]).all()
    # From nothing, in another order of steps; each part by another process.
    settings = dataclasses.replace(training, directory=training.directory + "-2")
    for place in range(total // SIZE):
        SourceParts(settings, SIZE, QUIET).reach(place)
    elsewhere = stream_of(settings)
    for step in (17, 3, 29, 18):
        assert (sequences(elsewhere, step, ranks=2) == read[step]).all()
    other = stream_of(training, seed=4)
    assert (sequences(other, 0) != read[0]).any()


def test_the_order_is_a_shuffle_of_each_part(training):
    stream = stream_of(training)
    stream._parts.reach(10**6)
    total, whole = stream._parts.total, prepare_source(training, QUIET).rows("train")
    for epoch in (0, 1):
        places = [stream._place(0, epoch * total + n) for n in range(total)]
        rows = [int(stream.name(place)) for place in places]
        assert sorted(rows) == list(range(total)) and rows != sorted(rows)
        for start in range(0, total, SIZE):
            order = permutation(min(SIZE, total - start), 3, epoch, start // SIZE)
            assert rows[start : start + SIZE] == [start + row for row in order]
            if epoch == 0 and start == 0:
                assert (stream._read(places[:3]) == whole[rows[:3]]).all()


def test_no_more_is_read_than_a_part_ahead(training):
    stream = stream_of(training)
    next(stream.micro_batches(0, 4, 0, 1, 2))
    for thread in threading.enumerate():
        if thread.name == "next part":
            thread.join(TIME_LIMIT)
    assert sorted(path.name for path in stream._parts.folder.glob("0*[0-9]")) == ["000000", "000001"]


def test_a_process_that_ends_leaves_no_part_half_made(training, monkeypatch):
    monkeypatch.setattr(parts_module, "_STOP_SECONDS", TIME_LIMIT)
    parts = SourceParts(training, SIZE, QUIET)
    parts.reach(0)
    before = set(parts.folder.iterdir())
    parts._reader = dataclasses.replace(parts._reader, tokens=itertools.repeat(np.empty(0, np.uint32)))  # no end
    parts.reach_in_background(1)
    deadline = time.monotonic() + TIME_LIMIT
    while not (parts.folder / ".partial-000001").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert set(parts.folder.iterdir()) > before
    parts.close()
    assert set(parts.folder.iterdir()) == before
    SourceParts(training, SIZE, QUIET).reach(1)


def test_a_part_in_the_making_holds_up_nobody_who_needs_another(training, alone):
    parts = SourceParts(training, SIZE, QUIET)
    parts.reach(0)
    with parts._lock:
        reader = threading.Thread(target=parts.reach, args=(0,), daemon=True)
        reader.start()
        reader.join(TIME_LIMIT)
        assert not reader.is_alive()


def test_text_that_changes_meanwhile_is_refused(training, alone, jsonl, tmp_path):
    source = tmp_path / "copy.jsonl"
    source.write_text(jsonl.read_text())
    settings = dataclasses.replace(training, source=str(source))
    parts = SourceParts(settings, SIZE, QUIET)
    parts.reach(0)
    source.write_text(jsonl.read_text() + '{"text": "more"}\n')
    with pytest.raises(UserError, match="has changed while it was read"):
        parts.reach(10**6)


def test_a_reader_that_fails_ends_the_run_with_its_error(training, jsonl, tmp_path):
    source = tmp_path / "copy.jsonl"
    source.write_text(jsonl.read_text())
    stream = stream_of(dataclasses.replace(training, source=str(source)))
    stream._parts.reach(1)
    source.unlink()
    with pytest.raises(UserError, match="copy.jsonl"):
        _ = [sequences(stream, step) for step in range(100)]


def test_waiting_for_another_thread_has_a_limit(training, alone):
    parts = SourceParts(training, SIZE, Conduct(show=False, patience=0.05))
    with parts._lock, pytest.raises(Unavailable, match="part 0 is not read after"):
        parts.reach(0)


def test_nobody_sees_the_last_part_before_the_end_is_known(training, alone, monkeypatch):
    parts, look = SourceParts(training, SIZE, QUIET), parts_module._is_last
    seen = []

    def looking(path):
        seen.append(len(parts._rows) == int(path.name))
        return look(path)

    monkeypatch.setattr(parts_module, "_is_last", looking)
    parts.reach(10**6)
    assert len(seen) > 2 and all(seen)


@pytest.mark.parametrize(
    "name, content",
    [
        (parts_module.FACTS_FILE, b"{"),
        (parts_module.ROWS_FILE, b""),
        (parts_module.ROWS_FILE, b"no Arrow"),
        (parts_module.ROWS_FILE, None),
    ],
)
def test_a_damaged_part_is_named(name, content, training, alone):
    parts = SourceParts(training, SIZE, QUIET)
    parts.reach(0)
    if content is None:  # whole messages are missing at the end, which Arrow takes for the end
        writer = SplitWriter(parts.folder / "000000" / name, training.seq_len, training.vocab)
        writer.add(np.zeros(2 * training.seq_len + 1, np.uint32), 0)
        writer.close()
    else:
        (parts.folder / "000000" / name).write_bytes(content)
    with pytest.raises(UserError, match=f"000000/{name}: is damaged"):
        SourceParts(training, SIZE, QUIET).reach(0)


def test_a_part_that_cannot_be_read_now_is_not_called_damaged(training, alone, monkeypatch):
    SourceParts(training, SIZE, QUIET).reach(0)
    error = OSError(errno.EMFILE, "Too many open files")
    monkeypatch.setattr(parts_module, "SplitRows", Mock(side_effect=error))
    with pytest.raises(Unavailable, match=r"000000/train.arrow: cannot be read \(.*Too many open files\)$"):
        SourceParts(training, SIZE, QUIET).reach(0)


def test_a_full_disk_under_the_log_does_not_end_training(training, alone, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(sys, "stderr", Mock(write=Mock(side_effect=full), isatty=lambda: False))
    parts = SourceParts(training, SIZE, Conduct(show=True))
    parts.reach(1)
    assert len(parts.rows(1)) == SIZE and sys.stderr.write.called


def test_a_part_that_was_read_with_the_one_before_has_no_speed(training, alone, monkeypatch, capsys):
    monkeypatch.setattr(parts_module, "BATCH_CHARACTERS", 10**6)
    SourceParts(training, SIZE, Conduct()).reach(1)
    first, second = (line for line in capsys.readouterr().err.splitlines() if "part" in line)
    assert first.endswith(" tokens/s") and second.endswith(" tokens")


def test_a_start_makes_what_a_step_reads(training, alone):
    """All of it, which may be several parts, for all trunk ranks."""
    stream = stream_of(training)
    stream.reach(5, 4)  # sequences 20 to 23, of which the first is in part 2
    made = sorted(path.name for path in stream._parts.folder.glob("0*[0-9]"))
    assert made == [f"{part:06d}" for part in range(4)]


def test_text_that_is_left_out_is_mentioned(training, alone, corpus, tmp_path, capsys):
    """As by a whole preparation: files of unknown types, and records without a text, in whichever part they are."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "other.docx").write_text("")
    lines = [json.dumps({"text": text}) for text in corpus] * 2
    (folder / "text.jsonl").write_text("\n".join([*lines, "{}"]))
    parts = SourceParts(dataclasses.replace(training, source=str(folder)), 10 * SIZE, Conduct())
    parts.reach(0)
    assert "skipped 1 of" in (said := capsys.readouterr().err) and "records were skipped" not in said
    parts.reach(10**6)
    said = capsys.readouterr().err
    assert said.count("1 of 201 records were skipped: ") == 1 and "text.jsonl, line 201" in said


def test_other_text_under_the_same_name_is_other_data(training, tmp_path, monkeypatch):
    """As of a data set on the hub, of which the settings have the name only."""
    monkeypatch.setattr(SourceSettings, "fingerprint", lambda settings: settings.short_name)
    source, identities = tmp_path / "text.txt", []
    for words in ("lane expert router ", "lane expert router ", "router expert lane "):
        source.write_text(words * 200)
        recipe = recipe_of(training, tmp_path, source=source, dir=tmp_path / f"data-{len(identities)}")
        identities.append(prepare_for(recipe, progress=False).identity)
    assert identities[0] == identities[1] != identities[2]


def recipe_of(training, tmp_path, **data):
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("lane expert router\n" * 50)
    keys = {
        "source": training.source,
        "tokenizer": training.tokenizer,
        "validation": str(held_out),
        "dir": training.directory,
        "stream_window": SIZE,
        **data,
    }
    sets = [f"data.{key}={'null' if value is None else value}" for key, value in keys.items()]
    return load_recipe("quickstart", [*sets, f"model.vocab={training.vocab}", f"model.seq_len={training.seq_len}"])


def test_the_data_of_a_recipe(training, alone, tmp_path):
    """The held-out text and the first part are there before a run starts; the rest is not."""
    data = prepare_for(recipe_of(training, tmp_path), progress=False)
    assert data.stream("validation", None).rows > 0
    assert [path.name for path in sorted(data.parts.folder.glob("0*[0-9]"))] == ["000000"]
    assert data.tokenizer().token_to_id("<|endoftext|>") == data.end_id
    assert data.unigram_entropy == data.held_out[0][0].validation.unigram_entropy > 0
    assert data.identity == prepare_for(recipe_of(training, tmp_path), progress=False).identity
    assert data.identity != prepare_for(recipe_of(training, tmp_path, stream_window=8), progress=False).identity
    assert sequences(data.stream("train", 3), 0).shape == (4, training.seq_len + 1)
    assert str(data.parts.folder) in describe(data)


def test_a_dry_run_makes_no_part(training, tmp_path):
    recipe = recipe_of(training, tmp_path)
    prepare_for(recipe, progress=False)
    data = rehearsal(recipe, tmp_path / "tried").data
    assert data.stream_window is None and data.dir == str(tmp_path / "tried" / "data")


@pytest.mark.parametrize(
    "data, said",
    [
        ({"validation": None}, "needs data.validation"),
        ({"source": "[{source: a, weight: 1}]"}, "with several sources"),
        ({"stream_window": 0}, "data.stream_window"),
    ],
)
def test_what_a_recipe_may_not_ask_for(data, said, training, tmp_path):
    with pytest.raises(UserError, match=said):
        recipe_of(training, tmp_path, **data)


def test_text_that_is_too_short(training, tmp_path):
    source = tmp_path / "short.txt"
    source.write_text("a")
    with pytest.raises(UserError, match="is shorter than one sequence"):
        SourceParts(dataclasses.replace(training, source=str(source)), SIZE, QUIET).reach(0)
