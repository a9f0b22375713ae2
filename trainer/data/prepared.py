"""Prepared data, as a run reads it: folders of packed sequences, one a source, mixed by weight."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.common.errors import UserError
from trainer.common.strict_json import dumps, loads
from trainer.data.packing import SplitFacts, unigram_entropy
from trainer.data.splitting import SPLITS
from trainer.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer

    from trainer.data.batches import SequenceStream

TOKENIZER_FILE = "tokenizer.json"
FACTS_FILE = "facts.json"
COUNTS_FILE = "train-counts.npy"


@dataclass(frozen=True)
class BadRecords:
    """Records that were skipped.

    Attributes:
        records: read, good or bad.
        first: what was wrong with the first ones.
    """

    count: int
    records: int
    first: tuple[str, ...]


@dataclass(frozen=True)
class PreparedSource:
    """A finished folder: the packed text of one source.

    Attributes:
        tokenizer_vocab: entries that the model needs for the tokenizer.
        end_of_document: the token that ends a document.
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
        """Of what the model reads, wherever it lies and whenever it was made: the tokenizer and the splits' facts."""
        facts = {split: asdict(self.facts(split)) for split in SPLITS}
        text = self.tokenizer().to_str() + dumps(facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def facts(self, split: str) -> SplitFacts:
        """Of one of SPLITS."""
        facts: SplitFacts = getattr(self, split)
        return facts

    def dataset(self, split: str) -> Dataset:
        """One of SPLITS, memory-mapped: a column `tokens`, rows of seq_len + 1 ids."""
        from datasets import Dataset

        return Dataset.from_file(str(self.path / f"{split}.arrow"))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that its text was tokenised with."""
        return load_tokenizer(str(self.path))


def open_prepared(path: Path) -> PreparedSource:
    """Open a finished folder.

    Raises:
        UserError: a file is missing, or not as it was made.
    """
    try:
        facts = loads((path / FACTS_FILE).read_text())
        for name, size in facts["files"].items():
            if (path / name).stat().st_size != size:
                raise ValueError(f"{name} does not have its {size:,} bytes")
        splits = {split: SplitFacts(**facts["splits"][split]) for split in SPLITS}
        bad = BadRecords(facts["bad_records"]["count"], facts["records"], tuple(facts["bad_records"]["first"]))
        return PreparedSource(path, facts["tokenizer_vocab"], facts["end_of_document"], bad, **splits)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = error if isinstance(error, OSError | ValueError) else f"{FACTS_FILE} is not what was written"
        raise UserError(
            f"{path}: prepared data that are damaged ({what}); delete this folder, and it will be made again"
        ) from error


@dataclass(frozen=True)
class PreparedData:
    """All data of a run.

    Attributes:
        training: the sources, with the share of each in what is trained on; shares add up to 1.
        held_out: the same for validation: the validation splits of the sources, or of text that is held out as a whole.
    """

    training: tuple[tuple[PreparedSource, float], ...]
    held_out: tuple[tuple[PreparedSource, float], ...]

    @property
    def identity(self) -> str:
        """Of what the model reads, in which proportion."""
        (first, _), *more = self.training
        if not more and self.held_out == self.training:
            return first.identity
        shares = [[(source.identity, share) for source, share in part] for part in (self.training, self.held_out)]
        return hashlib.sha256(dumps(shares).encode()).hexdigest()[:16]

    def sources(self, split: str) -> tuple[tuple[PreparedSource, float], ...]:
        """The sources of training ("train") or validation, and their shares."""
        return self.training if split == "train" else self.held_out

    def stream(self, split: str, seed: int | None) -> SequenceStream:
        """The sequences of training or validation; see `SequenceStream`."""
        from trainer.data.batches import SequenceStream

        sources = self.sources(split)
        return SequenceStream([source.dataset(split) for source, _ in sources], seed, [share for _, share in sources])

    def files(self, split: str) -> str:
        """Where the sequences of training or validation are, for a message."""
        return ", ".join(str(source.path / f"{split}.arrow") for source, _ in self.sources(split))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all sources."""
        return self.training[0][0].tokenizer()

    @property
    def end_id(self) -> int:
        """The id of the token that ends a document."""
        end: int | None = self.tokenizer().token_to_id(self.training[0][0].end_of_document)
        assert end is not None, "the tokenizer is the one that the text was prepared with"
        return end

    def to_json(self) -> dict[str, Any]:
        """All that is known of it, as JSON has it."""
        return {
            part: [asdict(source) | {"path": str(source.path), "share": share} for source, share in sources]
            for part, sources in (("training", self.training), ("held_out", self.held_out))
        }

    @property
    def unigram_entropy(self) -> float:
        """Of the training tokens, nats: the loss of knowing nothing but how frequent each token is."""
        import numpy as np

        if len(self.training) == 1:
            return self.training[0][0].train.unigram_entropy
        counts = [np.load(source.path / COUNTS_FILE) for source, _ in self.training]
        mean = sum(share * c / c.sum() for c, (_, share) in zip(counts, self.training, strict=True))
        return unigram_entropy(mean)

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of UTF-8 text that a token of the held-out text stands for."""
        facts = [(source.validation, share) for source, share in self.held_out]
        return sum(share * f.bytes / f.tokens for f, share in facts)


def describe(data: PreparedData) -> str:
    """What is there, for people: the folders, and the size of each split."""
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
    return "\n".join(lines)


def shares(weights: Sequence[float]) -> list[float]:
    """Weights that add up to 1."""
    total = sum(weights)
    return [weight / total for weight in weights]
