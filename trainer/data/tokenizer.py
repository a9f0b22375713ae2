"""Tokenizers: a local tokenizer.json, one of the hub, or a byte-level BPE trained on the source itself.

Which token ends a document is a tokenizer's own affair, and its files say so in many places. The choice is kept in
tokenizer.json, as the token that its post-processor puts behind a text: so every copy of the file knows it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.common.errors import UserError
from trainer.common.strict_json import dumps, loads
from trainer.data.reading.sources import one_line, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_DOCUMENT = "<|endoftext|>"
# The same token under the names of other families, tried in this order where the tokenizer does not say which it is.
END_OF_DOCUMENT_NAMES = (
    END_OF_DOCUMENT,
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "</s>",
    "<eos>",
    "<|eos|>",
    "<EOS>",
    "[EOS]",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "[SEP]",
)
_SAYS_ITS_TOKEN = ("tokenizer_config.json", "special_tokens_map.json")
_SAYS_ITS_ID = ("generation_config.json", "config.json")
# Other forms of tokenizers, by the endings of their files: what in transformers reads them, and what else it takes.
_OTHER_FORMS = (
    (("vocab.json", "merges.txt"), "GPT2TokenizerFast", "or its family's own class"),
    (("vocab.txt",), "BertTokenizerFast", "or its family's own class"),
    ((".model",), "LlamaTokenizerFast", "or its family's own class, with the package sentencepiece"),
    (("tekken.json", ".tiktoken"), "AutoTokenizer", "with the package tiktoken"),
)
_LARGEST_VOCABULARY = 1 << 24
_EVERYDAY = [chr(code) for code in range(ord("!"), ord("~") + 1)]
_RARE = ["é", "\u044f", "中", "ꙮ", "🙂"]


def tokenizer_file(name_or_path: str) -> Path | None:
    """The local tokenizer.json that is meant, or None: then it is a name on the hub.

    Raises:
        UserError: a folder without tokenizer.json, a tokenizer in another form.
    """
    path = Path(os.path.expanduser(name_or_path))
    if os.path.isdir(path):
        if not os.path.isfile(path / "tokenizer.json"):
            other = _other_form(os.listdir(path)) or "give another folder, or a tokenizer.json"
            raise UserError(f"data.tokenizer {shown(name_or_path)}: the folder has no tokenizer.json; {other}")
        path = path / "tokenizer.json"
    elif os.path.isfile(path) and (other := _other_form([path.name])):
        raise UserError(f"data.tokenizer {shown(path)}: is not a tokenizer.json; {other}")
    elif path.name == "tokenizer_config.json":
        raise UserError(f"data.tokenizer {shown(path)}: is not a tokenizer.json; name the one beside it")
    return path if os.path.isfile(path) else None


def _other_form(names: Iterable[str]) -> str:
    """What to do with a tokenizer in another form; "" if no name is of one."""
    for name in sorted(names):
        for endings, by, also in _OTHER_FORMS:
            if name.endswith(endings):
                return (
                    f"{shown(name)} is another form of one; make it by {by}.from_pretrained(FOLDER)"
                    f".save_pretrained(FOLDER) of transformers ({also})"
                )
    return ""


def tokenizer_files(name_or_path: str) -> list[Path]:
    """The local files that decide what `load_tokenizer` gives: tokenizer.json, and those beside it that name tokens."""
    path = tokenizer_file(name_or_path)
    if path is None:
        return []
    beside = [path.with_name(name) for name in (*_SAYS_ITS_TOKEN, *_SAYS_ITS_ID)]
    return [path, *(file for file in beside if file.is_file())]


def load_tokenizer(name_or_path: str, end_of_document: str | None = None) -> Tokenizer:
    """Loads a tokenizer.json, a folder that holds one, or a name on the hub.

    The tokenizer neither cuts nor pads, and reads special tokens that are spelled out in a text as plain text.
    `end_of_document_id` finds the token that ends a document in it, and in what `to_str` makes of it.

    Args:
        end_of_document: the token that ends a document. None: what the files beside tokenizer.json name as the end of
            a sequence, or else what `end_of_document_id` finds.

    Raises:
        UserError: no such file, not a tokenizer, the hub cannot be reached, no such token, characters that it drops.
    """
    from tokenizers import Tokenizer

    path = tokenizer_file(name_or_path)
    try:
        tokenizer = Tokenizer.from_file(str(path)) if path else Tokenizer.from_pretrained(name_or_path)
    except Exception as error:  # tokenizers raises plain Exceptions
        if path:
            raise UserError(
                f"data.tokenizer {shown(path)}: not a tokenizer.json of `tokenizers` ({one_line(error)})"
            ) from error
        raise UserError(
            f"data.tokenizer {shown(name_or_path)}: no such file, and not to be had from the hub "
            f'({type(error).__name__}); give the path of a tokenizer.json, or "train"'
        ) from error
    where = f"data.tokenizer {shown(path or name_or_path)}"
    if not tokenizer.get_vocab_size():
        raise UserError(f"{where}: has no tokens; give another one")
    if vocabulary(tokenizer) > _LARGEST_VOCABULARY:  # to write it takes memory by the largest id
        raise UserError(f"{where}: has an id of {vocabulary(tokenizer) - 1:,}, which no model can have; mend it")
    if end_of_document is None:
        end_of_document = next(_own_ends(tokenizer, path, name_or_path), None)
    if end_of_document is not None:
        end_id = end_of_document_id(tokenizer, end_of_document)
        if end_id != _default_end(tokenizer):  # the file is left as it is where it gives the same
            tokenizer = _putting(tokenizer, end_of_document, end_id)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    _check_lossless(tokenizer, where)
    return tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE (as GPT-2's) of at most `vocab_size` entries, the end-of-document token included.

    The same documents give the same tokenizer. It has at least 257 entries (every byte, end of document), and fewer
    than asked where the text has no more pairs to merge.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_document_id(tokenizer: Tokenizer, name: str | None = None) -> int:
    """The id that ends a document: of the token `name`, of what the post-processor puts behind a text, or a known one.

    Raises:
        UserError: the tokenizer has no such token.
    """
    if name is not None:
        token_id = tokenizer.token_to_id(name)
        if token_id is None:
            raise UserError(
                f'data.end_of_document: the tokenizer has no token "{one_line(name)}"; {_specials(tokenizer)}'
            )
        return int(token_id)
    if (default := _default_end(tokenizer)) is not None:
        return default
    raise UserError(
        f"data.tokenizer: it has no end-of-document token that is known by name; set data.end_of_document to the one "
        f"it has; {_specials(tokenizer)}"
    )


def vocabulary(tokenizer: Tokenizer) -> int:
    """The entries a model needs for this tokenizer: its largest id + 1."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _specials(tokenizer: Tokenizer) -> str:
    names = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    return f"its special tokens: {', '.join(map(dumps, names[:20])) or 'none'}{', ...' if len(names) > 20 else ''}"


def _own_ends(tokenizer: Tokenizer, path: Path | None, name_or_path: str) -> Iterator[str]:
    """What the files beside tokenizer.json name as the end of a sequence, as far as the vocabulary has it."""
    for file in _SAYS_ITS_TOKEN:
        token = _beside(path, name_or_path, file).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and tokenizer.token_to_id(token) is not None:
            yield token
    for file in _SAYS_ITS_ID:
        token_id = _beside(path, name_or_path, file).get("eos_token_id")
        token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
        if type(token_id) is int and 0 <= token_id < 1 << 32 and (token := tokenizer.id_to_token(token_id)) is not None:
            yield token


def _beside(path: Path | None, name: str, file: str) -> dict[str, Any]:
    """The content of a file beside tokenizer.json; {} if there is none."""
    if path:
        beside = path.with_name(file)
        if not beside.is_file():
            return {}
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            beside = Path(hf_hub_download(name, file))
        except (EntryNotFoundError, LocalEntryNotFoundError):  # offline, its cache has what was fetched before
            return {}
        except Exception as error:  # of the HTTP client, which differs between versions
            raise UserError(f"data.tokenizer {shown(name)}: the hub cannot be reached ({one_line(error)})") from error
    try:
        content = loads(beside.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.tokenizer {shown(beside)}: cannot be read as JSON ({one_line(error)}); mend or remove it"
        ) from error
    return content if isinstance(content, dict) else {}


def _default_end(tokenizer: Tokenizer) -> int | None:
    """The id of the token that the post-processor puts behind a text, or else of the first known one."""
    put = _end_it_puts(tokenizer)
    known = (tokenizer.token_to_id(name) for name in END_OF_DOCUMENT_NAMES)
    return put if put is not None else next((token_id for token_id in known if token_id is not None), None)


def _end_it_puts(tokenizer: Tokenizer) -> int | None:
    """The id of the token that the post-processor puts behind a text."""
    if tokenizer.post_processor is None:
        return None
    token = _last_token(loads(tokenizer.post_processor.__getstate__()))
    token_id = None if token is None else tokenizer.token_to_id(token)
    return None if token_id is None else int(token_id)


def _last_token(processor: dict[str, Any]) -> str | None:
    if processor["type"] == "Sequence":
        return next(filter(None, map(_last_token, reversed(processor["processors"]))), None)
    if processor["type"] == "TemplateProcessing":
        last = processor["single"][-1] if processor["single"] else {}
        return str(last["SpecialToken"]["id"]) if "SpecialToken" in last else None
    return str(processor["sep"][0]) if "sep" in processor else None  # as of BERT or RoBERTa


def _putting(tokenizer: Tokenizer, token: str, token_id: int) -> Tokenizer:
    """The tokenizer with a post-processor that puts `token` behind a text."""
    from tokenizers import Tokenizer

    def sequence(name: str) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": 0}}

    end = {"SpecialToken": {"id": token, "type_id": 0}}
    content = loads(tokenizer.to_str())
    content["post_processor"] = {  # as JSON, for the library's own constructor cannot take every token
        "type": "TemplateProcessing",
        "single": [sequence("A"), end],
        "pair": [sequence("A"), end, sequence("B"), end],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
    return Tokenizer.from_str(dumps(content))


def _check_lossless(tokenizer: Tokenizer, where: str) -> None:
    """Raises UserError where text would be dropped: characters without a token, a byte or an unknown token for them."""
    lost = []
    for character in (*_EVERYDAY, *_RARE):
        try:
            kept = tokenizer.encode(character, add_special_tokens=False).ids
        except Exception:  # tokenizers raises plain Exceptions
            kept = []
        lost += [] if kept else [character]
    if lost:
        raise UserError(
            f"{where}: has no token for some characters ({' '.join(lost[:10])}), and no unknown token for them; "
            "give it one, or train it on bytes"
        )
