"""The data of a recipe."""

from __future__ import annotations

from trainer.config.recipe import Recipe
from trainer.config.sections import Source, Sources
from trainer.data.prepare import Shares, prepare
from trainer.data.prepared import PreparedData, shares
from trainer.data.settings import DataSettings


def prepare_for(recipe: Recipe, progress: bool = True) -> PreparedData:
    """Prepare the recipe's data where that is not done yet.

    Raises:
        UserError: see `trainer.data.prepare.prepare_source`.
    """
    d = recipe.data
    train, validation, test = d.split
    training = _settings(recipe, d.source, d.split if d.validation is None else (train + validation, 0, test))
    held_out = None if d.validation is None else _settings(recipe, d.validation, (0, 1, 0))
    return prepare(training, held_out, progress)


def _settings(recipe: Recipe, sources: Sources, split: tuple[int, int, int]) -> Shares:
    """The settings of each source, and its share. The section's `max_tokens` is of what is trained on."""
    d, m = recipe.data, recipe.model
    max_tokens = d.max_tokens if split[0] else None
    listed = (Source(source=sources),) if isinstance(sources, str) else sources
    settings = [
        DataSettings(
            source=s.source,
            tokenizer=d.tokenizer,
            vocab=m.vocab,
            seq_len=m.seq_len,
            split=split,
            text_field=s.text_field or d.text_field,
            max_documents=s.max_documents or d.max_documents,
            directory=d.dir,
            max_tokens=s.max_tokens or max_tokens,
            max_bad_share=d.max_bad_share,
            end_of_document=d.end_of_document,
        )
        for s in listed
    ]
    return list(zip(settings, shares([s.weight for s in listed]), strict=True))
