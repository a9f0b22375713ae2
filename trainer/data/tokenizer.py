"""Byte-level BPE tokenizers: a local tokenizer.json, one of the hub, or one trained on the source itself."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_DOCUMENT = "<|endoftext|>"
# The same token under the names of other families, tried in this order.
END_OF_DOCUMENT_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>")


def tokenizer_file(name_or_path: str) -> Path | None:
    """The local tokenizer.json that is meant, or None: then it is a name on the hub.

    Raises UserError: a folder without tokenizer.json.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"data.tokenizer {name_or_path}: the folder has no tokenizer.json")
    return path if path.is_file() else None


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """Loads a tokenizer.json, a folder that holds one, or a name on the hub.

    The tokenizer neither cuts nor pads, and reads special tokens that are spelled out in a text as plain text.

    Raises UserError: no such file, not a tokenizer, the hub cannot be reached.
    """
    from tokenizers import Tokenizer

    path = tokenizer_file(name_or_path)
    try:
        tokenizer = Tokenizer.from_file(str(path)) if path else Tokenizer.from_pretrained(name_or_path)
    except Exception as error:  # tokenizers raises plain Exceptions
        if path:
            raise UserError(f"data.tokenizer {path}: not a tokenizer.json of `tokenizers` ({error})") from error
        raise UserError(
            f"data.tokenizer {name_or_path}: no such file, and not to be had from the hub ({type(error).__name__}); "
            'give the path of a tokenizer.json, or "train"'
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
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


def end_of_document_id(tokenizer: Tokenizer, wanted: str | None = None) -> int:
    """The id that ends a document. Raises UserError where the tokenizer has no such token."""
    for name in END_OF_DOCUMENT_NAMES:
        token_id = tokenizer.token_to_id(name)
        if token_id is not None:
            return token_id
    raise UserError(
        f"data.tokenizer: it has no end-of-document token; add one of {', '.join(END_OF_DOCUMENT_NAMES)} to it"
    )


def vocabulary(tokenizer: Tokenizer) -> int:
    """The entries a model needs for this tokenizer: its largest id + 1."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
