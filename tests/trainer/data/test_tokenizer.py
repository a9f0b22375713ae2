import pytest
from tokenizers import Tokenizer

from trainer.data.tokenizer import end_of_document_id, load_tokenizer, train_tokenizer, vocabulary
from trainer.errors import UserError


def test_training_is_deterministic(corpus):
    first = train_tokenizer(corpus, 400).to_str()
    assert train_tokenizer(iter(corpus), 400).to_str() == first
    assert train_tokenizer(corpus[:-20], 400).to_str() != first


def test_trained_tokenizer_is_lossless_and_of_the_size_asked_for(corpus):
    tokenizer = train_tokenizer(corpus, 290)
    assert vocabulary(tokenizer) == 290
    text = "unseen words, \x00 \t émoji 🦆 and\r\nlines"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert vocabulary(train_tokenizer(["ab"], 5000)) < 5000


def test_end_of_document_only_where_it_is_put(tokenizer_path):
    tokenizer = load_tokenizer(str(tokenizer_path))
    ids = tokenizer.encode("spelled out: <|endoftext|>").ids
    assert end_of_document_id(tokenizer) not in ids
    assert tokenizer.decode(ids) == "spelled out: <|endoftext|>"


def test_loading_undoes_truncation_and_padding(tmp_path, tokenizer_path):
    cutting = Tokenizer.from_file(str(tokenizer_path))
    cutting.enable_truncation(4)
    cutting.enable_padding(length=4)
    cutting.save(str(tmp_path / "tokenizer.json"))
    text = "a text of more than four tokens"
    expected = load_tokenizer(str(tokenizer_path)).encode(text).ids
    assert load_tokenizer(str(tmp_path)).encode(text).ids == expected


def test_other_names_of_the_end_of_document():
    tokenizer = train_tokenizer(["a b c"], 300)
    as_llama = Tokenizer.from_str(tokenizer.to_str().replace("<|endoftext|>", "</s>"))
    assert end_of_document_id(as_llama) == as_llama.token_to_id("</s>") is not None
    nameless = Tokenizer.from_str(tokenizer.to_str().replace("<|endoftext|>", "<none>"))
    with pytest.raises(UserError, match="no end-of-document token"):
        end_of_document_id(nameless)


def test_bad_tokenizer_files(tmp_path):
    with pytest.raises(UserError, match="the folder has no tokenizer.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer.json"):
        load_tokenizer(str(tmp_path))


def test_hub_out_of_reach(monkeypatch):
    def from_pretrained(name):
        raise ConnectionError("no route")

    monkeypatch.setattr("tokenizers.Tokenizer", type("Unreachable", (), {"from_pretrained": from_pretrained}))
    with pytest.raises(UserError, match="data.tokenizer gpt2: no such file, and not to be had from the hub"):
        load_tokenizer("gpt2")
