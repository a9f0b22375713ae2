"""Which tokens of a packed row belong to one document, for `data.document_mask`.

Rows of prepared data hold documents end to end, each followed by an end-of-document token. The paper lets a token
attend to everything before it in the row; with the mask it attends to its own document only.

Letters: B batch, S sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.config.recipe import Recipe
    from trainer.data.prepared_data import PreparedData


def document_end(recipe: Recipe, prepared: PreparedData) -> int | None:
    """The id that ends a document in the prepared data, where the recipe masks documents; else None."""
    return prepared.end_id if recipe.data.document_mask else None


def attention_of(tokens_BS: Tensor, end: int | None) -> dict[str, Any]:
    """What a transformers model (with sdpa attention) is called with, so that documents are masked as in training."""
    return {} if end is None else {"attention_mask": document_mask(tokens_BS, end)}


def document_mask(tokens_BS: Tensor, end: int) -> Tensor:
    """Which keys each query attends to: (B, 1, S, S), bool, True where it does.

    A token attends to itself and to the earlier tokens of its document; the end-of-document token is its document's
    last. A row that begins inside a document begins a new one, for what came before is in another row.

    Rotary positions need not start again with each document: attention depends on them only through the difference
    between query and key (arXiv:2104.09864, eq. 16), which is the same at any offset.

    Args:
        end: id of the end-of-document token.
    """
    ends_BS = tokens_BS == end
    document_BS = ends_BS.cumsum(-1) - ends_BS.long()  # how many documents have ended before this token
    same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    return same_BSS.tril()[:, None]
