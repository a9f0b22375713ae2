import errno
import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import datasets
import numpy as np
import pytest

from tests.distributed import TIME_LIMIT
from trainer.common.atomic import partial_folder
from trainer.common.errors import Unavailable, UserError
from trainer.data import prepare as module
from trainer.data import prepared_data, source_builder
from trainer.data.cache import Conduct
from trainer.data.prepare import prepare, prepare_source
from trainer.data.prepared_data import PreparedData, open_prepared
from trainer.data.splitting import SPLITS, split_of
from trainer.data.tokenizer import load_tokenizer

QUIET = Conduct(show=False)


def rows(prepared) -> dict[str, list[list[int]]]:
    return {split: datasets.Dataset.from_file(str(prepared.path / f"{split}.arrow"))["tokens"][:] for split in SPLITS}


def alone(settings, conduct=QUIET) -> PreparedData:
    return prepare([(settings, 1.0)], None, conduct)


def message_of(settings) -> str:
    with pytest.raises(UserError) as error:
        alone(settings)
    assert "\n" not in str(error.value)
    directory = Path(settings.directory)
    assert not directory.is_dir() or not [path for path in directory.iterdir() if path.is_dir()]
    return str(error.value)


def forbid_reading(monkeypatch) -> None:
    def read(*args):
        raise AssertionError("documents are read again")

    monkeypatch.setattr(source_builder, "Documents", read)


def test_prepared_rows_are_the_tokenised_documents(settings, corpus, tokenizer_path, monkeypatch):
    monkeypatch.setattr(source_builder, "BATCH_CHARACTERS", 700)  # several documents a batch, several batches
    prepared = prepare_source(settings, QUIET)
    tokenizer = load_tokenizer(str(tokenizer_path))
    end_id = tokenizer.token_to_id("<|endoftext|>")
    for split in SPLITS:
        texts = [text for i, text in enumerate(corpus) if split_of(i, settings.split) == split]
        stream = [token for text in texts for token in [*tokenizer.encode(text).ids, end_id]]
        expected = [stream[i : i + 14] for i in range(0, len(stream) - 13, 13)]
        assert rows(prepared)[split] == expected and len(expected) > 5
        facts = getattr(prepared, split)
        assert (facts.documents, facts.tokens, facts.sequences) == (len(texts), len(stream), len(expected))
        assert facts.bytes == sum(len(text.encode()) for text in texts)
        assert stream.count(end_id) == len(texts)
    assert prepared.tokenizer().to_str() == tokenizer.to_str()
    assert prepared.tokenizer_vocab == 300
    assert open_prepared(prepared.path) == prepared
    assert json.loads((prepared.path / "facts.json").read_text())["settings"]["seq_len"] == 13


def test_data_prepared_by_earlier_versions_stay_valid(settings):
    """The identity that checkpoints keep, and the name of the folder: change them only with settings.FORMAT."""
    assert prepare_source(settings, QUIET).identity == "d77b47b152a4a1c9"
    elsewhere = replace(settings, source="hub:owner/name", tokenizer="gpt2", directory="/anywhere")
    assert elsewhere.fingerprint() == "e4e5d6484c0d"


def test_second_time_touches_nothing(settings, monkeypatch):
    first = prepare_source(settings, QUIET)
    before = {file: file.stat().st_mtime_ns for file in Path(settings.directory).rglob("*")}
    forbid_reading(monkeypatch)
    assert prepare_source(settings, QUIET) == first
    assert {file: file.stat().st_mtime_ns for file in Path(settings.directory).rglob("*")} == before


def test_other_settings_files_or_tokenizers_have_other_folders(settings, settings_for, tmp_path, jsonl, tokenizer_path):
    copy, tokenizer = tmp_path / "copy.jsonl", tmp_path / "tokenizer.json"
    copy.write_bytes(jsonl.read_bytes())
    tokenizer.write_bytes(tokenizer_path.read_bytes())
    base = settings_for(copy, tokenizer=str(tokenizer))
    changes = [{}, {"seq_len": 14}, {"vocab": 301}, {"split": (5, 4, 1)}, {"max_documents": 99}]
    paths = [prepare_source(replace(base, **change), QUIET).path for change in changes]
    copy.write_bytes(jsonl.read_bytes() + b'{"text": "one more"}\n')
    paths.append(prepare_source(base, QUIET).path)
    tokenizer.write_text(tokenizer.read_text() + "\n")
    paths.append(prepare_source(base, QUIET).path)
    assert len(set(paths)) == len(changes) + 2
    assert all(path.name.startswith("copy-jsonl-v30") for path in paths)


def test_trained_tokenizer_sees_training_documents_only_and_no_more_than_its_sample(settings, corpus, monkeypatch):
    given = []

    def train_tokenizer(documents, vocab_size):
        given.extend(documents)
        return load_tokenizer(settings.tokenizer)

    monkeypatch.setattr(module, "train_tokenizer", train_tokenizer)
    training = [text for i, text in enumerate(corpus) if split_of(i, settings.split) == "train"]
    untrained = replace(settings, tokenizer="train")
    alone(untrained)
    assert given == training
    given.clear()
    alone(replace(untrained, seq_len=7))  # the same tokenizer
    assert not given
    monkeypatch.setattr(module, "TOKENIZER_SAMPLE_BYTES", sum(len(text.encode()) for text in training[:10]))
    elsewhere = replace(untrained, directory=f"{settings.directory}-2")
    alone(elsewhere)
    assert given == training[:10]


def test_training_a_tokenizer_is_deterministic(settings, tmp_path):
    one, two = (replace(settings, tokenizer="train", directory=str(tmp_path / name)) for name in ("one", "two"))
    first, second = alone(one), alone(two)
    assert first.tokenizer().to_str() == second.tokenizer().to_str() and first.identity == second.identity
    assert rows(first.training[0][0]) == rows(second.training[0][0])


def test_max_documents(settings):
    prepared = prepare_source(replace(settings, max_documents=40), QUIET)
    assert sum(getattr(prepared, split).documents for split in SPLITS) == 40


def test_hub_gives_the_same_rows_as_a_local_copy(settings, settings_for, corpus, monkeypatch):
    def load_dataset(*args, **options):
        return datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in corpus))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepared = prepare_source(settings_for("hub:monology/pile-uncopyrighted"), QUIET)
    assert rows(prepared) == rows(prepare_source(settings, QUIET))
    assert prepared.path.name.startswith("pile-uncopyrighted-v300-s13-")


def test_progress_bar_on_stderr(settings, capfd):
    alone(replace(settings, tokenizer="train"), Conduct())
    out, err = capfd.readouterr()
    assert out == "" and "to train the tokenizer: 68 documents" in err and "tokenising" in err and "tokens/s" in err
    assert "documents end with <|endoftext|>" in err and "skipped" not in err and "data.source" not in err
    alone(replace(settings, tokenizer="train", seq_len=5))
    assert capfd.readouterr() == ("", "")


def test_tokenizer_larger_than_the_model_is_told_before_documents_are_read(settings, monkeypatch):
    forbid_reading(monkeypatch)
    said = message_of(replace(settings, vocab=299))
    assert f"data.tokenizer {settings.tokenizer}: its vocabulary of 300 does not fit into model.vocab = 299" in said


def test_vocabulary_too_small_to_train(settings):
    assert message_of(replace(settings, tokenizer="train", vocab=256)).startswith(
        "model.vocab = 256: a trained tokenizer"
    )


def test_a_bad_document_is_skipped_and_said(settings, settings_for, jsonl, tmp_path, capfd):
    path = tmp_path / "bad.jsonl"
    lines = jsonl.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:50], b'{"text": 1}\n', *lines[50:]]))
    bad = prepare_source(settings_for(path), Conduct())
    assert f"1 of 101 records were skipped: {path}, line 51: " in capfd.readouterr().err
    assert rows(bad) == rows(prepare_source(settings, QUIET))
    facts = json.loads((bad.path / "facts.json").read_text())
    assert facts["bad_records"]["count"] == 1 and facts["records"] == 101 and facts["split_by"] == "document"
    assert message_of(settings_for(path, max_bad_share=0, directory=str(tmp_path / "strict"))).startswith(
        f"{path}, line 51: "
    )


def test_too_little_text(settings, settings_for, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("a document")
    said = message_of(settings_for(path))
    assert "the train split has less text" in said and "of 1 documents, split by size as 6:3:1" in said


def test_one_document_is_split_by_size(settings, settings_for, corpus, tmp_path):
    """Nothing is lost, and each part ends."""
    path = tmp_path / "one.txt"
    path.write_text("\n".join(corpus))
    prepared = prepare_source(settings_for(path), QUIET)
    text = path.read_bytes()
    begin = 0
    for split, part in zip(SPLITS, settings.split, strict=True):
        facts = prepared.facts(split)
        assert abs(facts.bytes - len(text) * part / 10) < 4 and facts.documents == 1
        expected = load_tokenizer(settings.tokenizer).encode(text[begin : begin + facts.bytes].decode()).ids
        packed = rows(prepared)[split]
        assert [token for row in packed for token in row[1:]] == [*expected, 0][1:][: 13 * len(packed)]
        begin += facts.bytes
    assert json.loads((prepared.path / "facts.json").read_text())["split_by"] == "size"


def test_max_tokens(settings, settings_for, corpus, tmp_path):
    """No more of training; where text is split by size the held-out part has its share."""
    whole = prepare_source(settings, QUIET)
    some = prepare_source(replace(settings, max_tokens=1000), QUIET)
    assert some.train.tokens == 1000 and 0 < some.validation.tokens < whole.validation.tokens
    assert rows(some)["train"] == rows(whole)["train"][: some.train.sequences]
    path = tmp_path / "one.txt"
    path.write_text("\n".join(corpus))
    by_size = prepare_source(settings_for(path, max_tokens=1000), QUIET)
    assert (by_size.train.tokens, by_size.validation.tokens) == (1000, 500)


def test_several_sources(settings, settings_for, corpus, tmp_path):
    """Each is prepared alone, whatever its weight; one tokenizer is trained on all, on as much of each as it weighs."""
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"body": {"text": "z" + text}}) + "\n" for text in corpus))
    own = replace(settings, tokenizer="train")
    second = replace(own, source=str(other), text_field="body.text")
    data = prepare([(own, 0.75), (second, 0.25)], None, QUIET)
    assert [source.path.name[:5] for source, _ in data.training] == ["corpu", "other"]
    assert data.held_out == data.training and data.tokenizer().get_vocab_size() == 300
    stream = data.stream("train", 3)
    names = [stream.name(place) for (place,) in stream.places(0, 400, 0, 1, 1)]
    assert sum(name.startswith("0:") for name in names) == 300
    counts = [np.load(source.path / "train-counts.npy") for source, _ in data.training]
    p = 0.75 * counts[0] / counts[0].sum() + 0.25 * counts[1] / counts[1].sum()
    assert data.unigram_entropy == pytest.approx(-sum(x * np.log(x) for x in p if x))
    facts = [source.validation for source, _ in data.training]
    assert data.bytes_per_token == pytest.approx(
        0.75 * facts[0].bytes / facts[0].tokens + 0.25 * facts[1].bytes / facts[1].tokens
    )
    other_weights = PreparedData(tuple(zip((s for s, _ in data.training), (0.5, 0.5), strict=True)), data.held_out)
    assert len({data.identity, other_weights.identity, *(source.identity for source, _ in data.training)}) == 4


def test_held_out_text_of_its_own(settings, settings_for, jsonl, tmp_path):
    text = tmp_path / "held out.txt"
    text.write_text("router pool expert " * 40)
    training = replace(settings, split=(9, 0, 1))
    data = prepare([(training, 1.0)], [(settings_for(text, split=(0, 1, 0)), 1.0)], QUIET)
    ((own, _),), ((held_out, _),) = data.training, data.held_out
    assert own.validation.sequences == 0 and held_out.train.tokens == 0
    assert held_out.validation.bytes == text.stat().st_size
    assert data.stream("validation", None).rows == held_out.validation.sequences > 0
    assert data.identity != own.identity


def test_directory_that_cannot_be_written(settings, tmp_path):
    (tmp_path / "a-file").write_text("not a folder")
    said = message_of(replace(settings, directory=str(tmp_path / "a-file")))
    assert said.startswith(f"data.dir {tmp_path}/a-file: prepared data cannot be written")
    assert said.endswith("; set another folder"), "there is enough space"


@pytest.mark.parametrize("limit", [100, 8000])  # of the bytes of a file: in tokenizer.json, in train.arrow
def test_disk_that_fills_up(settings, limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        said = message_of(replace(settings, vocab=70_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "prepared data cannot be written" in said and "free some space" in said


def test_disk_too_small_is_said_before_anything_is_read(settings, settings_for, monkeypatch, capfd):
    """The need follows from max_tokens, all splits together, unless the source is smaller than that."""
    free = 2000
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with monkeypatch.context() as patch:
        forbid_reading(patch)
        said = message_of(replace(settings, max_tokens=1000))
    needed = 2 * (1000 * 10 // 6) * 14 // 13  # bytes
    assert f"data.dir {settings.directory}: the prepared data needs {needed / 1000:.3g} kB, but only 2 kB" in said
    assert alone(replace(settings, max_tokens=90_000), Conduct()).training[0][0].train.tokens < 90_000
    about = 2 * (Path(settings.source).stat().st_size // 4) * 14 // 13
    assert f"needs about {about / 1000:.3g} kB, and 2 kB are free" in capfd.readouterr().err
    free = needed
    unfinished = partial_folder(replace(settings, max_tokens=1000).folder)
    unfinished.mkdir()
    (unfinished / "train.arrow").symlink_to("gone")  # as when another process renames the folder at this moment
    assert alone(replace(settings, max_tokens=1000), Conduct()).training[0][0].train.tokens == 1000
    assert "needs" not in capfd.readouterr().err


def test_import_is_quick():
    """The libraries are loaded by the functions that use them."""
    code = (
        "import sys, trainer.data.prepare, trainer.data.reading.sources, trainer.data.tokenizer\n"
        "assert not {'datasets', 'pyarrow', 'tokenizers', 'torch', 'tqdm', 'filelock'} & set(sys.modules)"
    )
    repository = str(Path(__file__).parents[3])
    subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": repository}, check=True, timeout=TIME_LIMIT
    )


def test_limits_of_held_out_text_are_its_own(settings, settings_for, corpus, tmp_path):
    text = tmp_path / "held-out.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in corpus))
    held_out = prepare_source(settings_for(text, split=(0, 1, 0), max_tokens=500), QUIET)
    assert held_out.validation.tokens == 500 and held_out.train.tokens == held_out.test.tokens == 0


def damaged(path: Path, damage) -> str:
    damage(path)
    with pytest.raises(UserError) as error:
        open_prepared(path)
    return str(error.value)


@pytest.mark.parametrize(
    "damage, what",
    [
        (lambda path: (path / "facts.json").write_text("{}"), "facts.json has unexpected content"),
        (lambda path: (path / "facts.json").write_text('{"files": []}'), "facts.json has unexpected content"),
        (lambda path: (path / "facts.json").write_text("x"), "Expecting value"),
        (lambda path: (path / "facts.json").unlink(), "No such file"),
        (lambda path: os.truncate(path / "train.arrow", 100), "train.arrow should have "),
        (lambda path: (path / "validation.arrow").unlink(), "validation.arrow"),
        (lambda path: (path / "tokenizer.json").write_text("{}"), "tokenizer.json should have "),
    ],
)
def test_damaged_prepared_data_say_how_to_make_them_again(settings, damage, what):
    path = prepare_source(settings, QUIET).path
    said = damaged(path, damage)
    assert said.startswith(f"{path}: this prepared data is damaged (") and what in said and "\n" not in said
    assert said.endswith("delete the folder, and it will be made again")


@pytest.mark.parametrize(
    "name, read",
    [
        ("train.arrow", lambda data: data.rows("train")),
        ("train-counts.npy", lambda data: data.counts()),
        ("tokenizer.json", lambda data: data.tokenizer()),
        ("chat.json", lambda data: data.chat_settings()),
    ],
)
def test_other_content_of_the_same_size_is_named(settings, name, read):
    """Only reading finds it."""
    data = prepare_source(settings, QUIET)
    file = data.path / name
    file.write_bytes(b"\xff" * (file.stat().st_size if file.is_file() else 9))
    with pytest.raises(UserError, match=re.escape(f"{data.path}: this prepared data is damaged ({name}: ")):
        read(data)


@pytest.mark.parametrize(
    "name, read",
    [
        ("read_array", lambda data: data.counts()),
        ("SplitRows", lambda data: data.rows("train")),
        ("loads", lambda data: open_prepared(data.path)),
    ],
)
def test_data_that_cannot_be_read_now_are_not_called_damaged(settings, name, read, monkeypatch):
    """Nobody shall delete them because of a mount or a limit of open files."""
    data = prepare_source(settings, QUIET)
    error = OSError(errno.EMFILE, "Too many open files", str(data.path / name))
    monkeypatch.setattr(prepared_data, name, Mock(side_effect=error))
    with pytest.raises(Unavailable, match="cannot be read .*Too many open files") as raised:
        read(data)
    assert "delete" not in str(raised.value)


def test_a_share_of_bad_records_holds_for_data_that_are_there(settings_for, jsonl, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(jsonl.read_bytes() + b'{"text": 1}\n' * 30)
    prepare_source(settings_for(path, max_bad_share=1), QUIET)
    for share, said in ((0, "line 101: no text"), (0.05, "30 of 130 records are bad")):
        with pytest.raises(UserError, match=said):
            prepare_source(settings_for(path, max_bad_share=share), QUIET)


def test_what_was_made_here_is_no_source(settings_for, jsonl, tmp_path, capfd):
    """Prepared data, runs and exports may lie within the folder of the texts."""
    folder = tmp_path / "texts"
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "recipe.yaml").touch()
    (folder / "export").mkdir()
    (folder / "export" / "modeling_unipool.py").write_text("import torch")
    (folder / "a.jsonl").write_bytes(jsonl.read_bytes())
    settings = settings_for(folder, tokenizer="train", directory=str(folder / "data"))
    first = alone(settings, Conduct())
    said = capfd.readouterr().err
    assert "3 made by this trainer (tokenizer-v300-" in said and "export, run)" in said
    assert alone(settings) == first
    assert first.training[0][0].bad_records.count == 0
