"""Prepared data as a run reads them: one folder of packed sequences for each source, mixed by weight."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from trainer.common.errors import Unavailable, UserError, is_of_content
from trainer.common.safe_read import read_array, read_bytes
from trainer.common.strict_json import dumps, loads
from trainer.data.packing import SplitFacts, SplitRows, unigram_entropy
from trainer.data.splitting import SPLITS
from trainer.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from trainer.data.batches import SequenceStream

TOKENIZER_FILE = "tokenizer.json"
CHAT_FILE = "chat.json"
"""What `trainer.data.tokenizer.chat_settings` found, if it found a chat template."""

FACTS_FILE = "facts.json"
COUNTS_FILE = "train-counts.npy"


@dataclass(frozen=True)
class BadRecords:
    """Records that were skipped.

    Attributes:
        records: The number of records that were read, good or bad.
        first: What was wrong with the first ones.
    """

    count: int
    records: int
    first: tuple[str, ...]


@dataclass(frozen=True)
class PreparedSource:
    """A finished folder: the packed text of one source.

    Attributes:
        tokenizer_vocab: The number of entries that the model needs for the tokenizer.
        end_of_document: The token that ends a document.
        train, validation, test: What each split holds.
    """

    path: Path
    tokenizer_vocab: int
    end_of_document: str
    bad_records: BadRecords
    train: SplitFacts
    validation: SplitFacts
    test: SplitFacts

    @property
    def identity(self) -> str:
        """A hash of the tokenizer and the splits' facts, independent of where and when the folder was made."""
        facts = {split: asdict(self.facts(split)) for split in SPLITS}
        text = self.tokenizer().to_str() + dumps(facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def facts(self, split: str) -> SplitFacts:
        """Return what one of `SPLITS` holds."""
        facts: SplitFacts = getattr(self, split)
        return facts

    def rows(self, split: str) -> SplitRows:
        """Return the rows of one of `SPLITS`, seq_len + 1 ids each.

        Raises:
            UserError: The file is damaged.
        """
        file, wanted = self.path / f"{split}.arrow", self.facts(split).sequences
        with _reading(file):
            rows = SplitRows(file, self.tokenizer_vocab)
            if len(rows) != wanted:
                raise ValueError(f"it has {len(rows):,} of {wanted:,} sequences")
            return rows

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that produced the tokens.

        Raises:
            UserError: Its file is damaged.
        """
        with _reading(self.path / TOKENIZER_FILE):
            return load_tokenizer(str(self.path))

    def chat_settings(self) -> str | None:
        """Return the text of `CHAT_FILE`, if there is one.

        Raises:
            UserError: The file is damaged.
        """
        file = self.path / CHAT_FILE
        with _reading(file):
            return read_bytes(file).decode() if file.is_file() else None

    def counts(self) -> NDArray[Any]:
        """Return how often each token is in the training split.

        Raises:
            UserError: The file is damaged.
        """
        file = self.path / COUNTS_FILE
        with _reading(file):
            return read_array(file)


def open_prepared(path: Path) -> PreparedSource:
    """Open a finished folder.

    Raises:
        UserError: A file is missing or damaged.
        Unavailable: A file cannot be read now.
    """
    try:
        facts = loads(read_bytes(path / FACTS_FILE))
        for name, size in facts["files"].items():
            if (path / name).stat().st_size != size:
                raise ValueError(f"{name} should have {size:,} bytes")
        splits = {split: SplitFacts(**facts["splits"][split]) for split in SPLITS}
        bad = BadRecords(facts["bad_records"]["count"], facts["records"], tuple(facts["bad_records"]["first"]))
        return PreparedSource(path, facts["tokenizer_vocab"], facts["end_of_document"], bad, **splits)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = error if isinstance(error, OSError | ValueError) else f"{FACTS_FILE} has unexpected content"
        raise _unusable(path, error, what) from error


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Say of the folder that it is damaged, or cannot be read now, if that is so of its file."""
    try:
        yield
    except (OSError, ValueError, LookupError, UserError) as error:  # pyarrow's own kinds are some of these
        raise _unusable(file.parent, error, f"{file.name}: {error}") from error


def _unusable(path: Path, error: Exception, what: object) -> UserError:
    cause = error.__cause__ or error
    if not is_of_content(cause):
        return Unavailable(f"{path}: this prepared data cannot be read ({cause})")
    return UserError(f"{path}: this prepared data is damaged ({what}); delete the folder, and it will be made again")


@dataclass(frozen=True)
class PreparedData:
    """All data of a run.

    Attributes:
        training: The sources, each with its share of the training sequences; shares add up to 1. Empty if they are
            read while a run trains.
        held_out: The same for validation: the validation splits of these sources, or held-out text of its own.
    """

    training: tuple[tuple[PreparedSource, float], ...]
    held_out: tuple[tuple[PreparedSource, float], ...]

    @property
    def identity(self) -> str:
        """A hash of what the model reads, and in which proportion."""
        (first, _), *more = self.training
        if not more and self.held_out == self.training:
            return first.identity
        shares = [[(source.identity, share) for source, share in part] for part in (self.training, self.held_out)]
        return hashlib.sha256(dumps(shares).encode()).hexdigest()[:16]

    def sources(self, split: str) -> tuple[tuple[PreparedSource, float], ...]:
        """Return the sources, with their shares, of "train" or "validation"."""
        return self.training if split == "train" else self.held_out

    def stream(self, split: str, seed: int | None) -> SequenceStream:
        """Return the sequences of "train" or "validation"; see `SequenceStream`."""
        from trainer.data.batches import SequenceStream

        sources = self.sources(split)
        return SequenceStream([source.rows(split) for source, _ in sources], seed, [share for _, share in sources])

    def files(self, split: str) -> str:
        """Return the paths of the sequences of "train" or "validation", for a message."""
        return ", ".join(str(source.path / f"{split}.arrow") for source, _ in self.sources(split))

    @property
    def _first(self) -> PreparedSource:
        return (self.training or self.held_out)[0][0]

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of all sources."""
        return self._first.tokenizer()

    def tokenizer_files(self) -> dict[str, str]:
        """Return the texts of the files that a run keeps of its tokenizer, by name."""
        chat = self._first.chat_settings()
        return {TOKENIZER_FILE: self.tokenizer().to_str(), **({CHAT_FILE: chat} if chat is not None else {})}

    @property
    def end_id(self) -> int:
        """The id of the token that ends a document."""
        end: int | None = self.tokenizer().token_to_id(self._first.end_of_document)
        assert end is not None, "the tokenizer is the one that the text was prepared with"
        return end

    def to_json(self) -> dict[str, Any]:
        """Return all facts as a tree for JSON."""
        return {
            part: [asdict(source) | {"path": str(source.path), "share": share} for source, share in sources]
            for part, sources in (("training", self.training), ("held_out", self.held_out))
        }

    @property
    def unigram_entropy(self) -> float:
        """Entropy of the training tokens in nats: the loss of a model that knows only how frequent each token is."""
        if len(self.training) == 1:
            return self.training[0][0].train.unigram_entropy
        counts = [source.counts() for source, _ in self.training]
        mean = sum(share * c / c.sum() for c, (_, share) in zip(counts, self.training, strict=True))
        return unigram_entropy(mean)

    @property
    def bytes_per_token(self) -> float:
        """The mean number of UTF-8 bytes that a token of the held-out text stands for."""
        facts = [(source.validation, share) for source, share in self.held_out]
        return sum(share * f.bytes / f.tokens for f, share in facts)


def describe(data: PreparedData) -> str:
    """Return the folders and the size of each split, for people to read."""
    lines = []
    for source, share in dict.fromkeys((*data.training, *data.held_out)):
        lines.append(
            f"{source.path}, vocabulary {source.tokenizer_vocab:,}, documents end with {source.end_of_document}"
        )
        if len(data.training) > 1 and (source, share) in data.training:
            lines.append(f"{'share':<12}{share:.1%} of the training sequences")
        for split in SPLITS:
            facts = source.facts(split)
            if facts.documents or facts.tokens:
                counts = f"{facts.documents:,} documents, {facts.tokens:,} tokens, {facts.sequences:,} sequences"
                lines.append(f"{split:<12}{counts}, unigram entropy {facts.unigram_entropy:.4f} nats")
    if not data.training:
        lines.append(f"{data.files('train')}, in which training text is kept as it is read")
    return "\n".join(lines)
