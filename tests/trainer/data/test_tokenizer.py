import errno
import json
import logging
import shutil
from unittest.mock import Mock

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from trainer.common import safe_read
from trainer.common.errors import Unavailable, UserError
from trainer.data import tokenizer as tokenizer_module
from trainer.data.cache import Conduct
from trainer.data.prepare import prepare_source
from trainer.data.reading import hub
from trainer.data.tokenizer import (
    END_OF_DOCUMENT_NAMES,
    end_of_document_id,
    load_tokenizer,
    tokenizer_files,
    train_tokenizer,
    vocabulary,
)


def message_of(*args) -> str:
    with pytest.raises(UserError) as error:
        load_tokenizer(*map(str, args))
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.fixture
def folder(tmp_path, tokenizer_path):
    """A folder with a tokenizer of several special tokens: <|endoftext|> and others; what else is given lies beside."""

    def make(processor=None, **beside):
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
        tokenizer.add_special_tokens(["<|im_end|>", "<end: of $A>", "</s>"])
        if processor:
            tokenizer.post_processor = processor(tokenizer)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        for name, content in beside.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return make


def end_of(tokenizer: Tokenizer) -> str:
    return tokenizer.id_to_token(end_of_document_id(tokenizer))


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


@pytest.mark.parametrize("name", END_OF_DOCUMENT_NAMES)
def test_known_names_of_the_end_of_document(name):
    tokenizer = train_tokenizer(["a b c"], 300)
    renamed = Tokenizer.from_str(tokenizer.to_str().replace("<|endoftext|>", name))
    assert end_of(renamed) == name


def test_no_known_name():
    tokenizer = Tokenizer.from_str(train_tokenizer(["a b c"], 300).to_str().replace("<|endoftext|>", "<none>"))
    with pytest.raises(UserError, match=r'set data.end_of_document to one of its special tokens: "<none>"'):
        end_of_document_id(tokenizer)


@pytest.mark.parametrize(
    "beside, end",
    [
        ({}, "<|endoftext|>"),
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, "<|im_end|>"),
        ({"tokenizer_config": {"eos_token": {"content": "</s>", "lstrip": False}}}, "</s>"),
        ({"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": "</s>"}}, "</s>"),
        (
            {"tokenizer_config": {"eos_token": "<not there>"}, "generation_config": {"eos_token_id": [300, 2]}},
            "<|im_end|>",
        ),
        ({"config": {"eos_token_id": 302}}, "</s>"),
        ({"config": {"eos_token_id": 10**12}}, "<|endoftext|>"),
        (
            {"config": [], "tokenizer_config": {"eos_token": 5}, "generation_config": {"eos_token_id": []}},
            "<|endoftext|>",
        ),
    ],
)
def test_the_tokenizer_s_own_end(folder, beside, end):
    path = folder(**beside)
    tokenizer = load_tokenizer(str(path))
    assert end_of(tokenizer) == end
    assert end_of(load_tokenizer(str(path / "tokenizer.json"))) == end
    # A copy of its content alone, as a run keeps it, says the same; and it tokenises as before.
    assert end_of(Tokenizer.from_str(tokenizer.to_str())) == end
    text = "pool expert </s>"
    original = load_tokenizer(str(path), "<|endoftext|>")
    assert tokenizer.encode(text, add_special_tokens=False).ids == original.encode(text, add_special_tokens=False).ids
    assert vocabulary(tokenizer) == vocabulary(original) == 303
    assert {file.name for file in tokenizer_files(str(path))} == {
        "tokenizer.json",
        *(f"{name}.json" for name in beside),
    }


def template(tokenizer):
    return processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))])


def roberta(tokenizer):
    return processors.RobertaProcessing(*((token, tokenizer.token_to_id(token)) for token in ("</s>", "<|im_end|>")))


def sequence(tokenizer):
    return processors.Sequence([processors.ByteLevel(), roberta(tokenizer)])


@pytest.mark.parametrize("processor", [template, roberta, sequence])
def test_the_post_processor_s_end(folder, processor):
    assert end_of(load_tokenizer(str(folder(processor)))) == "</s>"
    beside = {"tokenizer_config": {"eos_token": "<|im_end|>"}}
    assert end_of(load_tokenizer(str(folder(processor, **beside)))) == "<|im_end|>"


def test_a_post_processor_without_an_end(folder):
    def begins(tokenizer):
        return processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))])

    assert end_of(load_tokenizer(str(folder(begins)))) == "<|endoftext|>"
    assert end_of(load_tokenizer(str(folder(lambda tokenizer: processors.ByteLevel())))) == "<|endoftext|>"


def test_the_end_that_is_asked_for(folder):
    path = folder(tokenizer_config={"eos_token": "<|im_end|>"})
    for name in ("<|endoftext|>", "</s>", "<end: of $A>"):
        assert end_of(Tokenizer.from_str(load_tokenizer(str(path), name).to_str())) == name
    for name, fault in (("<nowhere>", "is not in the tokenizer's vocabulary"), ("a", "is an ordinary token")):
        said = message_of(path, name)
        assert said.startswith(f'data.end_of_document: "{name}" {fault}') and 'its special tokens: "<|endof' in said


def with_words(model, tmp_path, normalizer=None):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([AddedToken("[SEP]")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


WORDS = {"[UNK]": 0, "a": 1, "b": 2, "##b": 9}


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel(WORDS, unk_token="[UNK]"),
        models.WordPiece(WORDS, unk_token="[UNK]"),
        models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0),
        models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>"),
    ],
)
def test_other_models(model, tmp_path):
    path = with_words(model, tmp_path, normalizers.BertNormalizer(lowercase=True))
    tokenizer = load_tokenizer(str(path))
    assert end_of(tokenizer) == "[SEP]"
    assert tokenizer.encode("A").ids == [1] and tokenizer.encode("ж").ids == [0]
    assert vocabulary(tokenizer) == max(tokenizer.get_vocab().values()) + 1


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel(WORDS, unk_token="<no such>"),
        models.WordPiece({"a": 0}, unk_token="[UNK]"),
        models.Unigram([("a", 0.0)]),
        models.BPE({chr(code): code for code in range(32, 127)}, []),  # drops what it does not know
        models.BPE({"a": 0}, [], unk_token="<no such>"),
    ],
)
def test_models_that_drop_text_or_fail(model, tmp_path):
    said = message_of(with_words(model, tmp_path))
    assert "drops some characters" in said and "neither a token nor an unknown token for them" in said


def test_holes_and_large_ids(tmp_path):
    path = with_words(models.WordLevel({"[UNK]": 7, "a": 4000}, unk_token="[UNK]"), tmp_path) / "tokenizer.json"
    assert vocabulary(load_tokenizer(str(path))) == 4001
    path.write_text(path.read_text().replace("4000", "4000000000"))
    assert "has the id 4,000,000,000, which is too large for any model" in message_of(path)
    path.write_text(path.read_text().replace("4000000000", "40000000000"))
    assert "not a tokenizer.json" in message_of(path)


def test_a_tokenizer_that_cannot_be_read_is_not_called_damaged(settings, monkeypatch):
    data = prepare_source(settings, Conduct(show=False))
    monkeypatch.setattr(safe_read, "open_file", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(Unavailable, match="this prepared data cannot be read .*Permission denied"):
        data.tokenizer()
    with pytest.raises(UserError, match=r"tokenizer.json: cannot be read \(permission denied\)$"):
        load_tokenizer(str(data.path))


def test_bad_tokenizer_files(tmp_path, tokenizer_path):
    assert message_of(tmp_path) == (
        f"data.tokenizer {tmp_path}: the folder has no tokenizer.json; choose another folder, or a tokenizer.json"
    )
    path = tmp_path / "tokenizer.json"
    content = tokenizer_path.read_bytes()
    for damaged in (b"", b"{}", b"[]", b"\xff", content[:-5], b"[" * 100_000, content.replace(b'"BPE"', b'"EPB"')):
        path.write_bytes(damaged)
        assert message_of(path).startswith(f"data.tokenizer {path}: not a tokenizer.json of `tokenizers`")
    path.write_text(Tokenizer(models.BPE()).to_str())
    assert "has no tokens" in message_of(path)
    path.write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert message_of(path).startswith(f"data.tokenizer {tmp_path}/tokenizer_config.json: cannot be read as JSON")
    assert "name the one next to it" in message_of(tmp_path / "tokenizer_config.json")


@pytest.mark.parametrize(
    "name, by",
    [
        ("vocab.json", "GPT2TokenizerFast"),
        ("merges.txt", "GPT2TokenizerFast"),
        ("vocab.txt", "BertTokenizerFast"),
        ("spiece.model", "LlamaTokenizerFast"),
        ("tekken.json", "AutoTokenizer"),
        ("o200k_base.tiktoken", "AutoTokenizer"),
    ],
)
def test_other_forms_of_tokenizers(tmp_path, name, by):
    (tmp_path / name).write_text("x")
    for path in (tmp_path, tmp_path / name):
        said = message_of(path)
        assert f"tokenizer.json; {name} is another format; convert it with {by}.from_pretrained" in said


def test_hub_out_of_reach(monkeypatch, caplog):
    def from_pretrained(name):
        logging.getLogger("huggingface_hub.utils").warning("retrying")  # as the hub's library does
        raise ConnectionError("no route")

    monkeypatch.setattr(tokenizer_module, "can_connect", lambda: True)
    monkeypatch.setattr("tokenizers.Tokenizer", type("Unreachable", (), {"from_pretrained": from_pretrained}))
    for name in ("gpt2", "x" * 5000, "a\0b", "~nobody-here/tokenizer.json"):
        assert "there is no such file, and the hub did not provide it" in message_of(name)
    assert not caplog.records, "our line is the only one"


def test_without_a_network_only_the_hub_s_cache_is_asked(monkeypatch, tmp_path_factory, folder):
    """At once: the hub's library would try again and again, for each file. What is slow is tried as ever."""
    from huggingface_hub import constants
    from huggingface_hub.utils import httpx

    cache, tried, failure = tmp_path_factory.mktemp("cache"), [], httpx.ConnectError("no such name")

    def head(self, url, timeout):
        assert timeout, "a hub that never answers"
        tried.append(url)
        raise failure

    monkeypatch.setattr(httpx.Client, "head", head)
    monkeypatch.setattr(hub, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(Tokenizer, "from_pretrained", None, raising=False)
    monkeypatch.setattr(tokenizer_module, "can_connect", hub.can_connect.__wrapped__)
    assert "no such file, and the hub cannot be reached; set it to the path of" in message_of("gpt2")
    assert set(tried) == {constants.ENDPOINT}
    cached = cache / "models--owner--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder(special_tokens_map={"eos_token": "</s>"}), cached / "snapshots" / ("0" * 40))
    assert end_of(load_tokenizer("owner/name")) == "</s>"
    assert not hub.can_connect.__wrapped__()
    failure = httpx.ConnectTimeout("slow")
    assert hub.can_connect.__wrapped__()


def test_the_hub_s_own_end(monkeypatch, folder):
    """Files beside tokenizer.json are asked for, and those that the hub does not have are passed over."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    path = folder(special_tokens_map={"eos_token": "</s>"})
    asked = []

    def hf_hub_download(name, file, local_files_only):
        assert not local_files_only
        asked.append((name, file))
        if not (path / file).is_file():
            raise EntryNotFoundError("404")
        return str(path / file)

    def from_pretrained(name):
        return Tokenizer.from_file(str(path / "tokenizer.json"))

    monkeypatch.setattr(tokenizer_module, "can_connect", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(Tokenizer, "from_pretrained", from_pretrained, raising=False)
    assert end_of(load_tokenizer("owner/name")) == "</s>"
    assert asked == [("owner/name", "tokenizer_config.json"), ("owner/name", "special_tokens_map.json")]

    def refuse(name, file, local_files_only):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    assert message_of("owner/name") == "data.tokenizer owner/name: the hub cannot be reached (no route)"
