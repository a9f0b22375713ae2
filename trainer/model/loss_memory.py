"""The memory that `trainer.model.loss` needs, for plans, which load no torch."""

from __future__ import annotations

from trainer.config.recipe import Recipe

FP32, BF16 = 4, 2


def loss_bytes(recipe: Recipe, tokens: int) -> int:
    """Return the most bytes that the loss of a micro-batch of so many tokens takes at once, with its gradients.

    A copy of the weight in the type of the products is not counted.
    """
    m, chunk = recipe.model, recipe.train.loss_chunk
    if tokens <= chunk:  # log-probabilities, their gradients and those of the logits
        return tokens * m.vocab * 3 * FP32
    largest = -(-tokens // -(-tokens // chunk))
    # The logits and log-probabilities of a chunk, the gradient of the weight, the hidden states and their gradients
    hidden = FP32 if recipe.train.precision == "fp32" else FP32 + BF16
    return largest * m.vocab * 2 * FP32 + m.vocab * m.hidden * FP32 + tokens * m.hidden * hidden
