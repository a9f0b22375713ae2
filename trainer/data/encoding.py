"""Texts into token ids, many at once.

`tokenizers` defines which tokens a text has. `fastokens` reads the same tokenizer.json and gives the same tokens many
times as fast; it is used if it is installed, supports the tokenizer, and agrees on the first texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHECKED_CHARACTERS = 200_000
"""Characters of the first texts, for which both libraries must give the same tokens."""


class Encoder:
    """Encodes texts without adding special tokens; special tokens that a text spells out are read as plain text.

    Attributes:
        slow_because: Why `fastokens` is not used; None while it is.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._fast: Any = None
        self._checked = False
        self.slow_because: str | None = None
        try:
            import fastokens

            self._fast = fastokens.Tokenizer.from_json_str(tokenizer.to_str())
        except Exception as error:  # it raises exceptions of its own for tokenizers that it does not support
            self._give_up(error)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return the token ids of each text, (number of tokens,)."""
        if not texts:
            return []
        try:
            if self._fast is not None and not self._checked:
                self._check(texts)
            if self._fast is not None:
                return self._encode_fast(texts)
        except Exception as error:  # such as a limit of its regular expressions
            self._give_up(error)
        return self._encode(texts)

    def _check(self, texts: Sequence[str]) -> None:
        sample, size = [], 0
        for text in texts:
            sample.append(text[: CHECKED_CHARACTERS - size])
            size += len(sample[-1])
            if size >= CHECKED_CHARACTERS:
                break
        if not all(map(np.array_equal, self._encode_fast(sample), self._encode(sample))):
            raise ValueError("it gives other tokens")
        self._checked = True

    def _encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def _encode_fast(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        ids, offsets = self._fast.encode_batch_flat(list(texts), split_special_tokens=True)
        return np.split(np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64)[1:-1].astype(np.int64))

    def _give_up(self, error: Exception) -> None:
        self._fast = None
        self.slow_because = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
