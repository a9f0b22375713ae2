"""The data of a run that trains while its text is being read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.common.strict_json import dumps
from trainer.data.prepared_data import PreparedData
from trainer.data.streaming.parts import SourceParts

if TYPE_CHECKING:
    from trainer.data.batches import SequenceStream


@dataclass(frozen=True)
class StreamedData(PreparedData):
    """Held-out text that is prepared, and training text that is read while the run trains; `training` is empty."""

    parts: SourceParts

    @property
    def identity(self) -> str:
        """A hash of the settings, files and first part of the training text, and of the held-out text."""
        held_out = [[source.identity, share] for source, share in self.held_out]
        read = [self.parts.settings.fingerprint(), self.parts.size, self.parts.checksum, held_out]
        return hashlib.sha256(dumps(read).encode()).hexdigest()[:16]

    def stream(self, split: str, seed: int | None) -> SequenceStream:
        """Return the sequences of "train" or "validation"."""
        if split != "train":
            return super().stream(split, seed)
        from trainer.data.streaming.stream import PartStream

        assert seed is not None, "training text is shuffled"
        return PartStream(self.parts, seed)

    def files(self, split: str) -> str:
        """Return where the sequences of "train" or "validation" are, for a message."""
        return str(self.parts.folder) if split == "train" else super().files(split)

    def to_json(self) -> dict[str, Any]:
        """Return all facts as a tree for JSON."""
        return super().to_json() | {"parts": str(self.parts.folder), "sequences_per_part": self.parts.size}

    @property
    def unigram_entropy(self) -> float:
        """Entropy of the held-out tokens in nats: the training text is not known as a whole."""
        return sum(share * source.validation.unigram_entropy for source, share in self.held_out)
