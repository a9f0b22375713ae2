import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from trainer.data import prepare as module
from trainer.data.packing import SPLITS, split_of
from trainer.data.prepare import open_prepared, prepare
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import UserError


def rows(prepared) -> dict[str, list[list[int]]]:
    return {split: prepared.dataset(split)["tokens"][:] for split in SPLITS}


def message_of(settings) -> str:
    with pytest.raises(UserError) as error:
        prepare(settings, progress=False)
    assert "\n" not in str(error.value)
    directory = Path(settings.directory)
    assert not directory.is_dir() or not [path for path in directory.iterdir() if path.is_dir()]
    return str(error.value)


def forbid_reading(monkeypatch) -> None:
    def read(*args):
        raise AssertionError("documents are read again")

    monkeypatch.setattr(module, "read_documents", read)


def test_prepared_rows_are_the_tokenised_documents(settings, corpus, tokenizer_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 700)  # several documents a batch, several batches
    prepared = prepare(settings, progress=False)
    tokenizer = load_tokenizer(str(tokenizer_path))
    end_id = tokenizer.token_to_id("<|endoftext|>")
    for split in SPLITS:
        texts = [text for i, text in enumerate(corpus) if split_of(i, settings.split) == split]
        stream = [token for text in texts for token in [*tokenizer.encode(text).ids, end_id]]
        expected = [stream[i : i + 14] for i in range(0, len(stream) - 13, 13)]
        dataset = prepared.dataset(split)
        assert dataset["tokens"][:] == expected and len(expected) > 5
        facts = getattr(prepared, split)
        assert (facts.documents, facts.tokens, facts.sequences) == (len(texts), len(stream), len(expected))
        assert facts.bytes == sum(len(text.encode()) for text in texts)
        assert stream.count(end_id) == len(texts)
        assert dataset.cache_files  # memory-mapped, not read into memory
    assert prepared.tokenizer().to_str() == tokenizer.to_str()
    assert prepared.tokenizer_vocab == 300
    assert open_prepared(prepared.path) == prepared
    assert json.loads((prepared.path / "facts.json").read_text())["settings"]["seq_len"] == 13


def test_second_time_touches_nothing(settings, monkeypatch):
    first = prepare(settings, progress=False)
    before = {file: file.stat().st_mtime_ns for file in Path(settings.directory).rglob("*")}
    forbid_reading(monkeypatch)
    assert prepare(settings, progress=False) == first
    assert {file: file.stat().st_mtime_ns for file in Path(settings.directory).rglob("*")} == before


def test_other_settings_files_or_tokenizers_have_other_folders(settings, settings_for, tmp_path, jsonl, tokenizer_path):
    copy, tokenizer = tmp_path / "copy.jsonl", tmp_path / "tokenizer.json"
    copy.write_bytes(jsonl.read_bytes())
    tokenizer.write_bytes(tokenizer_path.read_bytes())
    base = settings_for(copy, tokenizer=str(tokenizer))
    changes = [{}, {"seq_len": 14}, {"vocab": 301}, {"split": (5, 4, 1)}, {"max_documents": 99}]
    paths = [prepare(replace(base, **change), progress=False).path for change in changes]
    copy.write_bytes(jsonl.read_bytes() + b'{"text": "one more"}\n')
    paths.append(prepare(base, progress=False).path)
    tokenizer.write_text(tokenizer.read_text() + "\n")
    paths.append(prepare(base, progress=False).path)
    assert len(set(paths)) == len(changes) + 2
    assert all(path.name.startswith("copy-jsonl-v30") for path in paths)


def test_trained_tokenizer_sees_training_documents_only_and_no_more_than_its_sample(settings, corpus, monkeypatch):
    given = []

    def train_tokenizer(documents, vocab_size):
        given.extend(documents)
        return load_tokenizer(settings.tokenizer)

    monkeypatch.setattr(module, "train_tokenizer", train_tokenizer)
    training = [text for i, text in enumerate(corpus) if split_of(i, settings.split) == "train"]
    prepare(replace(settings, tokenizer="train"), progress=False)
    assert given == training
    given.clear()
    monkeypatch.setattr(module, "TOKENIZER_SAMPLE_BYTES", sum(len(text.encode()) for text in training[:10]))
    prepare(replace(settings, tokenizer="train", seq_len=7), progress=False)
    assert given == training[:10]


def test_training_a_tokenizer_is_deterministic(settings, tmp_path):
    one, two = (replace(settings, tokenizer="train", directory=str(tmp_path / name)) for name in ("one", "two"))
    first, second = prepare(one, progress=False), prepare(two, progress=False)
    assert (first.path / "tokenizer.json").read_bytes() == (second.path / "tokenizer.json").read_bytes()
    assert rows(first) == rows(second)


def test_max_documents(settings):
    prepared = prepare(replace(settings, max_documents=40), progress=False)
    assert sum(getattr(prepared, split).documents for split in SPLITS) == 40


def test_hub_gives_the_same_rows_as_a_local_copy(settings, settings_for, corpus, monkeypatch):
    def load_dataset(*args, **options):
        return datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in corpus))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepared = prepare(settings_for("hub:monology/pile-uncopyrighted"), progress=False)
    assert rows(prepared) == rows(prepare(settings, progress=False))
    assert prepared.path.name.startswith("pile-uncopyrighted-v300-s13-")


def test_progress_bar_on_stderr(settings, capfd):
    prepare(replace(settings, tokenizer="train"), progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "training the tokenizer" in err and "tokenising" in err and "tokens/s" in err
    prepare(replace(settings, tokenizer="train", seq_len=5), progress=False)
    assert capfd.readouterr() == ("", "")


def test_tokenizer_larger_than_the_model_is_told_before_documents_are_read(settings, monkeypatch):
    forbid_reading(monkeypatch)
    said = message_of(replace(settings, vocab=299))
    assert f"data.tokenizer {settings.tokenizer}: its vocabulary of 300 does not fit model.vocab = 299" in said


def test_vocabulary_too_small_to_train(settings):
    said = message_of(replace(settings, tokenizer="train", vocab=256))
    assert "its vocabulary of 257 does not fit model.vocab = 256" in said


def test_bad_document_in_the_middle(settings_for, jsonl, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(jsonl.read_bytes() + b'{"texts": "x"}\n')
    assert message_of(settings_for(path)).startswith(f"{path}, line 101: no text")


def test_too_little_text(settings, settings_for, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("a document " * 100)
    said = message_of(settings_for(path))
    assert "no full sequence for the" in said and "of 1 documents" in said and "6:3:1" in said
    assert "for the validation split (0 of 100 documents" in message_of(replace(settings, split=(9, 0, 1)))


def test_directory_that_cannot_be_written(settings, tmp_path):
    (tmp_path / "a-file").write_text("not a folder")
    said = message_of(replace(settings, directory=str(tmp_path / "a-file")))
    assert said.startswith(f"data.dir {tmp_path}/a-file: prepared data cannot be written")


@pytest.mark.parametrize("limit", [100, 8000])  # of the bytes of a file: in tokenizer.json, in train.arrow
def test_disk_that_fills_up(settings, limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        said = message_of(replace(settings, vocab=70_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "prepared data cannot be written" in said and "make room" in said


def test_import_is_quick():
    """The libraries are loaded by the functions that use them."""
    code = (
        "import sys, trainer.data.prepare, trainer.data.sources, trainer.data.tokenizer\n"
        "assert not {'datasets', 'pyarrow', 'tokenizers', 'torch', 'tqdm', 'filelock'} & set(sys.modules)"
    )
    repository = str(Path(__file__).parents[3])
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": repository}, check=True, timeout=60)
