"""The data of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import Recipe
from trainer.data.prepare import TRAIN, DataSettings, PreparedData, find_prepared, prepare
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def prepare_for(recipe: Recipe, progress: bool = True) -> PreparedData:
    """Prepare the recipe's data where that is not done yet; see `trainer.data.prepare.prepare`."""
    return prepare(_settings(recipe), progress)


def tokenizer_for(recipe: Recipe) -> Tokenizer:
    """The tokenizer that the recipe's data was prepared with; nothing is prepared.

    Without the prepared data a tokenizer that the recipe names is loaded again.

    Raises:
        UserError: a tokenizer trained on the source, and the prepared data that holds it is not there.
    """
    d = recipe.data
    try:
        prepared = find_prepared(_settings(recipe))
    except UserError:  # the source is gone
        prepared = None
    if prepared:
        return prepared.tokenizer()
    if d.tokenizer == TRAIN:
        raise UserError(
            f"data.dir = {d.dir}: the prepared data of {d.source}, which holds the tokenizer, is not there (seen from "
            f"{Path.cwd()}), or the source has changed since"
        )
    return load_tokenizer(d.tokenizer)


def _settings(recipe: Recipe) -> DataSettings:
    d, m = recipe.data, recipe.model
    return DataSettings(
        source=d.source,
        tokenizer=d.tokenizer,
        vocab=m.vocab,
        seq_len=m.seq_len,
        split=d.split,
        text_field=d.text_field,
        max_documents=d.max_documents,
        directory=d.dir,
    )
