"""Tokenizers: a local tokenizer.json, one on the hub, or a byte-level BPE trained on the source itself.

Many files may say which token ends a document. Once chosen it is kept in tokenizer.json itself, as the token that the
post-processor appends to a text, so that every copy of the file has it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.common.errors import PATH_ERRORS, Unavailable, UserError, os_reason, short_line
from trainer.common.safe_read import LARGEST_TOKENIZER, Unreadable, read_bytes, read_text
from trainer.common.strict_json import dumps, loads
from trainer.data.reading.hub import can_connect
from trainer.data.reading.sources import shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_DOCUMENT = "<|endoftext|>"

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
"""The names of this token in different families, tried in this order if the tokenizer does not say which it is."""

SMALLEST_VOCABULARY = 257
"""Entries of the smallest tokenizer that can be trained: every byte, and `END_OF_DOCUMENT`."""

_LARGEST_VOCABULARY = 1 << 24
_CHAT_TEMPLATE_FILE = "chat_template.jinja"
_SPECIAL_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"))
_NAMES_THE_TOKEN = ("tokenizer_config.json", "special_tokens_map.json")
_NAMES_THE_ID = ("generation_config.json", "config.json")
_OTHER_FORMATS = {  # the endings of their files, and the class of transformers that reads them
    "GPT2TokenizerFast": ("vocab.json", "merges.txt"),
    "BertTokenizerFast": ("vocab.txt",),
    "LlamaTokenizerFast": (".model",),
    "AutoTokenizer": ("tekken.json", ".tiktoken"),
}
_SAMPLE_CHARACTERS = [*map(chr, range(ord("!"), ord("~") + 1)), "é", "\u044f", "中", "ꙮ", "🙂"]


def tokenizer_files(name_or_path: str) -> list[Path]:
    """Return the local files that determine what `load_tokenizer` returns; none for a name on the hub.

    Raises:
        UserError: See `load_tokenizer`.
    """
    path = _tokenizer_file(name_or_path)
    if path is None:
        return []
    beside = [path.with_name(name) for name in (*_NAMES_THE_TOKEN, *_NAMES_THE_ID, _CHAT_TEMPLATE_FILE)]
    return [path, *(file for file in beside if file.is_file())]


def chat_settings(name_or_path: str) -> dict[str, Any]:
    """Return what the files next to tokenizer.json say about conversations; {} if there is no chat template.

    Returns:
        `chat_template`: a text, or a list of such with names; `special_tokens`: tokens by transformers' names, and
        lists of more of them; `generation`: the content of generation_config.json.

    Raises:
        UserError: A file cannot be read; see also `load_tokenizer`.
    """
    path = _tokenizer_file(name_or_path)
    config = _beside(path, name_or_path, _NAMES_THE_TOKEN[0])
    file = _file_beside(path, name_or_path, _CHAT_TEMPLATE_FILE)
    try:
        template = read_text(file) if file else config.get("chat_template")
    except Unreadable as error:
        raise UserError(f"data.tokenizer {shown(str(file))}: cannot be read ({short_line(error)})") from error
    if not template:
        return {}
    tokens: dict[str, Any] = {}
    for found in (_beside(path, name_or_path, _NAMES_THE_TOKEN[1]), config):
        tokens |= {name: text for name in _SPECIAL_TOKENS if (text := _content(found.get(name)))}
        for name in ("additional_special_tokens", "extra_special_tokens"):  # until transformers 5, and since
            if isinstance(more := found.get(name), list):
                tokens["extra_special_tokens"] = [text for token in more if (text := _content(token))]
    generation = _beside(path, name_or_path, _NAMES_THE_ID[0])
    return {"chat_template": template, "special_tokens": tokens, "generation": generation}


def load_tokenizer(name_or_path: str, end_of_document: str | None = None) -> Tokenizer:
    """Load a tokenizer that neither truncates nor pads, and reads special tokens that a text spells out as plain text.

    `end_of_document_id` finds the token that ends a document in it, also after `to_str` and loading it again.

    Args:
        name_or_path: A tokenizer.json, a folder that contains one, or a name on the hub.
        end_of_document: The token that ends a document. By default it is what the files next to tokenizer.json name as
            the end of a sequence, or else what `end_of_document_id` finds.

    Raises:
        UserError: There is no such file, it cannot be read, it is not a tokenizer, the hub cannot be reached,
            `end_of_document` is not in it or occurs in ordinary text, or the tokenizer drops characters.
    """
    path = _tokenizer_file(name_or_path)
    where = f"data.tokenizer {shown(path or name_or_path)}"
    try:
        tokenizer = _from_file(path) if path else _from_hub(name_or_path)
    except Exception as error:  # tokenizers raises plain Exceptions
        if path and isinstance(error, OSError):
            kind = UserError if error.errno in (None, *PATH_ERRORS) else Unavailable
            raise kind(f"{where}: cannot be read ({os_reason(error)})") from error
        if path:
            raise UserError(f"{where}: not a tokenizer.json of `tokenizers` ({short_line(error)})") from error
        reached = can_connect()
        why = f"did not provide it ({type(error).__name__})" if reached else "cannot be reached"
        raise (UserError if reached or os.path.isabs(name_or_path) else Unavailable)(
            f'{where}: there is no such file, and the hub {why}; set it to the path of a tokenizer.json, or to "train" '
            "(HF_HUB_OFFLINE=1 asks the hub's cache only)"
        ) from error
    if not tokenizer.get_vocab_size():
        raise UserError(f"{where}: has no tokens; choose another one")
    if vocabulary(tokenizer) > _LARGEST_VOCABULARY:  # writing it takes memory in proportion to the largest id
        raise UserError(f"{where}: has the id {vocabulary(tokenizer) - 1:,}, which is too large for any model")
    tokenizer = _plain(tokenizer)
    _check_lossless(tokenizer, where)
    if end_of_document is not None:
        _check_end(tokenizer, end_of_document)
    else:
        end_of_document = next(_own_ends(tokenizer, path, name_or_path), None)
    # A file that already gives this token is left as it is.
    if end_of_document is not None and tokenizer.token_to_id(end_of_document) != _default_end(tokenizer):
        tokenizer = _plain(_appending(tokenizer, end_of_document))
    return tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE like GPT-2's. The same documents give the same tokenizer.

    Args:
        vocab_size: The number of entries, `END_OF_DOCUMENT` included. The result has fewer if the text has no more
            pairs to merge, and at least `SMALLEST_VOCABULARY`.
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


def end_of_document_id(tokenizer: Tokenizer) -> int:
    """Return the id that ends a document: what the post-processor appends to a text, or else a well-known token.

    Raises:
        UserError: The tokenizer has no such token.
    """
    if (default := _default_end(tokenizer)) is not None:
        return default
    raise UserError(
        "data.tokenizer: it does not say which token ends a document; set data.end_of_document to one of "
        f"{_special_tokens(tokenizer)}"
    )


def vocabulary(tokenizer: Tokenizer) -> int:
    """Return the number of entries that a model needs for this tokenizer: its largest id + 1."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _tokenizer_file(name_or_path: str) -> Path | None:
    """The local tokenizer.json, or None for a name on the hub."""
    path = Path(os.path.expanduser(name_or_path))
    if os.path.isdir(path):
        if not os.path.isfile(path / "tokenizer.json"):
            advice = _conversion(os.listdir(path)) or "choose another folder, or a tokenizer.json"
            raise UserError(f"data.tokenizer {shown(name_or_path)}: the folder has no tokenizer.json; {advice}")
        path = path / "tokenizer.json"
    elif os.path.isfile(path) and (advice := _conversion([path.name])):
        raise UserError(f"data.tokenizer {shown(path)}: not a tokenizer.json; {advice}")
    elif path.name == "tokenizer_config.json":
        raise UserError(f"data.tokenizer {shown(path)}: not a tokenizer.json; name the one next to it")
    return path if os.path.isfile(path) else None


def _conversion(names: Iterable[str]) -> str:
    """How to convert a tokenizer in another format; "" if no name belongs to one."""
    for name in sorted(names):
        for reader, endings in _OTHER_FORMATS.items():
            if name.endswith(endings):
                return (
                    f"{shown(name)} is another format; convert it with {reader}.from_pretrained(FOLDER)"
                    ".save_pretrained(FOLDER) of transformers, or with the class of its family"
                )
    return ""


def _from_file(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(read_bytes(path, LARGEST_TOKENIZER).decode())


def _from_hub(name: str) -> Tokenizer:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging
    from tokenizers import Tokenizer

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it would log every attempt; the exception says why it failed
    try:
        if can_connect():
            return Tokenizer.from_pretrained(name)
        return _from_file(Path(hf_hub_download(name, "tokenizer.json", local_files_only=True)))
    finally:
        logging.set_verbosity(level)


def _special_tokens(tokenizer: Tokenizer) -> str:
    names = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    return f"its special tokens: {', '.join(map(dumps, names[:20])) or 'none'}{', ...' * (len(names) > 20)}"


def _check_end(tokenizer: Tokenizer, name: str) -> None:
    """Refuse a token that ordinary text produces: it would end documents in the middle."""
    token_id = tokenizer.token_to_id(name)
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if token_id is None:
        fault = "is not in the tokenizer's vocabulary"
    elif name not in added and token_id in tokenizer.encode(name, add_special_tokens=False).ids:
        fault = "is an ordinary token, which text contains"
    else:
        return
    raise UserError(
        f'data.end_of_document: "{short_line(name)}" {fault}; set it to one of {_special_tokens(tokenizer)}'
    )


def _own_ends(tokenizer: Tokenizer, path: Path | None, name_or_path: str) -> Iterator[str]:
    """What the files next to tokenizer.json name as the end of a sequence, if the vocabulary has it."""
    for file in _NAMES_THE_TOKEN:
        token = _content(_beside(path, name_or_path, file).get("eos_token"))
        if token is not None and tokenizer.token_to_id(token) is not None:
            yield token
    for file in _NAMES_THE_ID:
        token_id = _beside(path, name_or_path, file).get("eos_token_id")
        token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
        if type(token_id) is int and 0 <= token_id < 1 << 32 and (token := tokenizer.id_to_token(token_id)) is not None:
            yield token


def _content(token: Any) -> str | None:
    """The text of a token in a file of transformers, which may be an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _file_beside(path: Path | None, name: str, file: str) -> Path | None:
    """A file next to tokenizer.json, which is fetched if that is on the hub; None if there is none."""
    if path:
        return beside if (beside := path.with_name(file)).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, local_files_only=not can_connect()))
    except (EntryNotFoundError, LocalEntryNotFoundError):  # offline, its cache has what was fetched before
        return None
    except Exception as error:  # raised by the HTTP client, which differs between versions
        raise Unavailable(f"data.tokenizer {shown(name)}: the hub cannot be reached ({short_line(error)})") from error


def _beside(path: Path | None, name: str, file: str) -> dict[str, Any]:
    """The content of a JSON file next to tokenizer.json; {} if there is none."""
    beside = _file_beside(path, name, file)
    if beside is None:
        return {}
    try:
        content = loads(read_bytes(beside))
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.tokenizer {shown(beside)}: cannot be read as JSON ({short_line(error)}); fix or remove it"
        ) from error
    return content if isinstance(content, dict) else {}


def _default_end(tokenizer: Tokenizer) -> int | None:
    """The id of the token that the post-processor appends to a text, or else of the first well-known one."""
    appended = None
    if tokenizer.post_processor is not None:
        appended = _appended_token(loads(tokenizer.post_processor.__getstate__()))
    known = (tokenizer.token_to_id(name) for name in (appended, *END_OF_DOCUMENT_NAMES) if name is not None)
    return next((int(token_id) for token_id in known if token_id is not None), None)


def _appended_token(processor: dict[str, Any]) -> str | None:
    """The token that a post-processor appends to a text."""
    if processor["type"] == "Sequence":
        return next(filter(None, map(_appended_token, reversed(processor["processors"]))), None)
    if processor["type"] == "TemplateProcessing":
        last = processor["single"][-1] if processor["single"] else {}
        return str(last["SpecialToken"]["id"]) if "SpecialToken" in last else None
    return str(processor["sep"][0]) if "sep" in processor else None  # BERT's and RoBERTa's


def _appending(tokenizer: Tokenizer, token: str) -> Tokenizer:
    """The tokenizer with a post-processor that appends `token` to a text."""
    from tokenizers import Tokenizer

    def sequence(name: str) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": 0}}

    end = {"SpecialToken": {"id": token, "type_id": 0}}
    content = loads(tokenizer.to_str())
    content["post_processor"] = {  # as JSON, because the library's own constructor does not accept every token
        "type": "TemplateProcessing",
        "single": [sequence("A"), end],
        "pair": [sequence("A"), end, sequence("B"), end],
        "special_tokens": {token: {"id": token, "ids": [tokenizer.token_to_id(token)], "tokens": [token]}},
    }
    return Tokenizer.from_str(dumps(content))


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, set to take a whole text as nothing but text."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _check_lossless(tokenizer: Tokenizer, where: str) -> None:
    """Refuse a tokenizer that drops text: one without a token, bytes or an unknown token for some characters."""
    lost = []
    for character in _SAMPLE_CHARACTERS:
        try:
            kept = tokenizer.encode(character, add_special_tokens=False).ids
        except Exception:  # tokenizers raises plain Exceptions
            kept = []
        lost += [] if kept else [character]
    if lost:
        raise UserError(
            f"{where}: drops some characters ({' '.join(lost[:10])}), because it has neither a token nor an unknown "
            "token for them; add an unknown token, or train it on bytes"
        )
