"""Texts that show what the model has learned so far: it continues given prompts."""

from __future__ import annotations

from trainer.config.recipe import Recipe
from trainer.data.prepared_data import PreparedData
from trainer.train.pool_rank import PoolRank
from trainer.train.trunk_rank import TrunkRank

NOT_FINITE = "(none: the model's logits are not finite)"


def continued(recipe: Recipe, prepared: PreparedData, role: TrunkRank, done: int) -> list[tuple[str, str]]:
    """Return the prompts of the recipe with their continuations by the most probable tokens, on every trunk rank.

    A prompt that is longer than a sequence loses its beginning.
    """
    samples, tokenizer = [], prepared.tokenizer()
    for prompt in recipe.eval.prompts:
        given = tokenizer.encode(prompt, add_special_tokens=False).ids or [prepared.end_id]
        ids = role.generate(given, recipe.eval.prompt_tokens, done, temperature=0.0)
        samples.append((prompt, NOT_FINITE if ids is None else tokenizer.decode(ids)))
    return samples


def serve_samples(recipe: Recipe, role: PoolRank, done: int) -> None:
    """Serve the trunk ranks meanwhile."""
    for _ in recipe.eval.prompts:
        role.generate(recipe.eval.prompt_tokens, done)
