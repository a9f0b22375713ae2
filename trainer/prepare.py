"""The data of a recipe."""

from __future__ import annotations

from trainer.config import Recipe
from trainer.data.prepare import DataSettings, PreparedData, prepare


def prepare_for(recipe: Recipe, progress: bool = True) -> PreparedData:
    """Prepare the recipe's data where that is not done yet; see `trainer.data.prepare.prepare`."""
    d, m = recipe.data, recipe.model
    settings = DataSettings(
        source=d.source,
        tokenizer=d.tokenizer,
        vocab=m.vocab,
        seq_len=m.seq_len,
        split=d.split,
        text_field=d.text_field,
        max_documents=d.max_documents,
        directory=d.dir,
    )
    return prepare(settings, progress)
