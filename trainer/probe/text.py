"""The text that a probe reads."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from trainer.common.errors import UserError
from trainer.data.reading.documents import read_text_option
from trainer.evaluate.loss import summed_loss, token_ids, windows
from trainer.export.loaded_model import LoadedModel
from trainer.export.saved_run import data_of
from trainer.model.document_mask import attention_of
from trainer.probe.adapters import Choice, MoELayer, MoEModel, Observer, observed

LONGEST = 1024
"""Maximum tokens in a sequence, as in the paper: the windows of some families are too long for a CPU."""
BATCH_TOKENS = 4096
"""Approximate tokens in a forward pass."""
_CHARACTERS = 32
"""Upper bound on the mean characters per token, so that only the required part of a long document is tokenised."""


@dataclass(frozen=True)
class Text:
    """Sequences to read.

    Attributes:
        name: The name in titles.
        rows_NS1: Token ids, int64; inputs are [:, :-1], and targets are [:, 1:].
        document_end: The id of the token that ends a document, if the run was trained with `data.document_mask`.
    """

    name: str
    rows_NS1: Tensor
    document_end: int | None = None

    @property
    def tokens(self) -> int:
        """The number of tokens that the model reads, which is also the number that it predicts."""
        return self.rows_NS1[:, 1:].numel()

    @property
    def batches(self) -> tuple[Tensor, ...]:
        """The rows, about BATCH_TOKENS at a time."""
        rows: tuple[Tensor, ...] = self.rows_NS1.split(max(1, BATCH_TOKENS // (self.rows_NS1.shape[1] - 1)))
        return rows


def read_text(loaded: LoadedModel, file: Path | None, tokens: int) -> Text:
    """Read about `tokens` tokens of a file (in any format of `data.source`), or of the run's held-out text.

    Raises:
        UserError: The file cannot be read, or the data is not the run's own.
    """
    masked = loaded.run is not None and loaded.run.recipe.data.document_mask
    document_end = loaded.tokenizer.eos_token_id if masked else None
    if not file:
        return Text("held-out text", _held_out(loaded, tokens), document_end)
    length = min(loaded.window, LONGEST)
    documents = (document[: _CHARACTERS * tokens] for document in read_text_option(file))
    ids = list(islice(token_ids(loaded.tokenizer, documents), -(-tokens // length) * length + 1))
    rows = windows(ids, length)
    if not rows:
        raise UserError(f"--text {file}: has {len(ids)} tokens; at least 2 are required")
    whole = [row for row in rows if len(row) == length + 1]
    return Text(file.name, torch.tensor(whole or rows), document_end)


def _held_out(loaded: LoadedModel, tokens: int) -> Tensor:
    """Return the first sequences of the run's validation split, as the trainer evaluates them."""
    assert loaded.run, "only a run has held-out text"
    prepared = data_of(loaded.run)
    if prepared.tokenizer().get_vocab() != loaded.tokenizer.get_vocab():
        raise UserError(
            f"{prepared.files('validation')}: was prepared with another tokenizer than the run's; restore the data "
            "that the run was trained on, or give a text with --text FILE"
        )
    stream = prepared.stream("validation", None)
    wanted = min(max(1, tokens // loaded.run.recipe.model.seq_len), max(1, stream.rows))
    (row_RS1,) = stream.micro_batches(0, wanted, 0, 1, wanted)
    return row_RS1


@torch.no_grad()
def mean_loss(model: MoEModel, text: Text) -> float:
    """Return the mean cross-entropy of a text in nats per token."""
    return sum(summed_loss(model.model, rows_BS1, text.document_end) for rows_BS1 in text.batches) / text.tokens


@torch.no_grad()
def read(model: MoEModel, text: Text, see: Observer) -> None:
    """Run all layers over a text, without the head, and call `see` with the choice of each layer."""
    with observed(model, see):
        for rows_BS1 in tqdm(text.batches, "reading", unit=" batches", disable=None, leave=False):
            tokens_BS = rows_BS1[:, :-1].to(model.model.device)
            model.model.model(input_ids=tokens_BS, use_cache=False, **attention_of(tokens_BS, text.document_end))


class ExpertCounts:
    """Counts the assignments of each layer to the experts of its bank; to be called by `observed`.

    Attributes:
        by_layer: The counts (E,) of each layer, int64, by the layer's number.
    """

    def __init__(self, model: MoEModel):
        self.by_layer = {layer.number: torch.zeros(layer.bank.experts, dtype=torch.int64) for layer in model.layers}

    def __call__(self, layer: MoELayer, choice: Choice) -> None:
        own = (choice.topk_expert_ids_TK - layer.bank.first).flatten().cpu()
        self.by_layer[layer.number] += torch.bincount(own, minlength=layer.bank.experts)
