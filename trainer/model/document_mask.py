"""Attention within documents, for `data.document_mask`.

Rows of prepared data hold documents end to end, each followed by an end-of-document token. In the paper a token attends
to everything before it in the row; with the mask it attends to its own document only.

Letters: B batch, S sequence.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.config.recipe import Recipe
    from trainer.data.prepared_data import PreparedData


def document_end(recipe: Recipe, prepared: PreparedData) -> int | None:
    """Return the id that ends a document in the prepared data, or None if the recipe does not mask documents."""
    return prepared.end_id if recipe.data.document_mask else None


def attention_of(tokens_BS: Tensor, end: int | None) -> dict[str, Any]:
    """Return the arguments with which a transformers model (sdpa attention) masks documents as in training."""
    return {} if end is None else {"attention_mask": document_mask(tokens_BS, end)}


def document_mask(tokens_BS: Tensor, end: int) -> Tensor:
    """Return which keys each query attends to: (B, 1, S, S), bool.

    A token attends to itself and to the earlier tokens of its document, whose last token is the end-of-document token.
    The tokens at the start of a row count as a document of their own, even if they continue one of another row.

    Rotary positions need not restart with each document, because attention depends on them only through the difference
    between query and key (arXiv:2104.09864, Eq. 16).

    Args:
        end: Id of the end-of-document token.
    """
    ends_BS = tokens_BS == end
    document_BS = ends_BS.cumsum(-1) - ends_BS.long()  # how many documents have ended before this token
    same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    return same_BSS.tril()[:, None]


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what to add to the attention's logits: 0 where a bool mask allows a key, else minus infinity.

    Attention would make this of a bool mask in every layer, and keep each for the backward pass.
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)
