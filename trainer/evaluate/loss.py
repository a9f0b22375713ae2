"""Loss on text, in the windows of training: `model.seq_len` tokens each, without overlap.

Every token but the first is predicted once. The first token of a window is predicted from the last token of the window
before, without further context.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from trainer.checkpoint.format import read_info
from trainer.common.errors import UserError
from trainer.common.format import loss, perplexity
from trainer.common.tables import new_table
from trainer.config.sections import LOSS_CHUNK, source_names
from trainer.data.batches import evaluation_steps
from trainer.data.reading.documents import read_text_option
from trainer.export.loaded_model import LoadedModel
from trainer.export.saved_run import data_of
from trainer.model.document_mask import attention_of, document_end
from trainer.model.loss import cross_entropies

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class TextLoss:
    """How well a model predicts a text.

    Attributes:
        loss: The mean cross-entropy in nats per predicted token.
        tokens: The number of predicted tokens.
        bytes: The size of the text in UTF-8; an estimate for the validation split.
        bits_per_byte: The cross-entropy of all predicted tokens in bits, over `bytes`.
        window: The number of tokens in a window.
    """

    loss: float
    perplexity: float
    tokens: int
    bytes: int
    bits_per_byte: float
    window: int
    precision: str

    def tables(self) -> list[Table]:
        made = new_table("", "", "")
        made.add_row("loss", f"{loss(self.loss)} nats/token")
        made.add_row("perplexity", perplexity(self.loss))
        made.add_row("bits per byte", f"{self.bits_per_byte:.4f}")
        made.add_row("tokens", f"{self.tokens:,} in windows of {self.window}, {self.precision}")
        made.add_row("bytes", f"{self.bytes:,}")
        return [made]

    def notes(self) -> list[str]:
        return []


def validation_loss(loaded: LoadedModel, batches: int | None, batch_size: int) -> TextLoss:
    """Compute a run's loss on its validation split, as training does; `batches` defaults to the recipe's.

    Raises:
        UserError: The model is an export, or the run's data is missing or has changed.
    """
    if loaded.run is None:
        raise UserError(
            f"{loaded.path}: an export has no held-out text; evaluate the run, or give --text FILE or --tasks"
        )
    recipe = loaded.run.recipe
    prepared = data_of(loaded.run)
    if read_info(loaded.run.folder).data != prepared.identity:
        raise UserError(
            f"data.source = {source_names(recipe.data.source)}: the text or its tokenizer has changed since "
            f"{loaded.name} of {loaded.folder} was saved; restore the old data, or give --text FILE"
        )
    stream = prepared.stream("validation", None)
    wanted = recipe.eval.batches if batches is None else batches
    count = evaluation_steps(stream.rows, wanted, recipe.train.global_batch) * recipe.train.global_batch
    rows = (row_1S1[0] for row_1S1 in stream.micro_batches(0, count, 0, 1, 1))
    nats, tokens = total_loss(loaded, rows, count, batch_size, document_end(recipe, prepared))
    return _text_loss(loaded, nats, tokens, round(tokens * prepared.bytes_per_token))


def text_loss(loaded: LoadedModel, file: Path, batch_size: int) -> TextLoss:
    """Compute the loss on a text in any format of `data.source`; a plain-text file is one document.

    Raises:
        UserError: The file cannot be read, or has fewer than two tokens.
    """
    documents = list(read_text_option(file))
    ids = list(token_ids(loaded.tokenizer, documents))
    if loaded.tokenizer.eos_token_id is not None:
        ids = ids[:-1]  # the end of the last document, which nothing follows
    if len(ids) < 2:
        raise UserError(f"--text {file}: has {len(ids)} tokens; at least 2 are required")
    rows = windows(ids, loaded.window)
    nats, tokens = total_loss(loaded, map(torch.tensor, rows), len(rows), batch_size)
    return _text_loss(loaded, nats, tokens, sum(len(document.encode()) for document in documents))


def token_ids(tokenizer: Any, documents: Iterable[str]) -> Iterator[int]:
    """Tokenise documents as for training, each followed by the end-of-text token if the tokenizer has one."""
    for document in documents:
        # In training, text that is spelled like a special token is ordinary text.
        yield from tokenizer(document, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            yield tokenizer.eos_token_id


def windows(ids: Sequence[int], seq_len: int) -> list[Sequence[int]]:
    """Split tokens into rows of seq_len + 1 (or fewer in the last) that overlap by one token."""
    return [ids[start : start + seq_len + 1] for start in range(0, len(ids) - 1, seq_len)]


@torch.inference_mode()
def total_loss(
    loaded: LoadedModel, rows: Iterable[Tensor], count: int, batch_size: int, end: int | None = None
) -> tuple[float, int]:
    """Return the cross-entropy in nats, and the number, of all tokens but the first of every row.

    Args:
        loaded: The model.
        rows: Token ids, int64, (S + 1,) each.
        count: The number of rows.
        batch_size: The number of rows in a forward pass.
        end: The id of the token that ends a document, if attention stays within documents.
    """
    nats, tokens = 0.0, 0
    with tqdm(desc="evaluating", total=count, unit=" windows", disable=not sys.stderr.isatty()) as bar:
        for batch in _batches(rows, batch_size):
            with loaded.autocast():
                nats += summed_loss(loaded.model, torch.stack(batch), end)
            tokens += sum(len(row) - 1 for row in batch)
            bar.update(len(batch))
    return nats, tokens


def summed_loss(model: Any, rows_BS1: Tensor, end: int | None) -> float:
    """Return the cross-entropy in nats of all tokens but the first of every row; see `total_loss`."""
    rows_BS1 = rows_BS1.to(model.device)
    tokens_BS = rows_BS1[:, :-1]
    h_BSD = model.model(tokens_BS, use_cache=False, **attention_of(tokens_BS, end)).last_hidden_state
    loss_T = cross_entropies(model.lm_head, h_BSD.flatten(0, 1), rows_BS1[:, 1:].flatten(), LOSS_CHUNK)
    return float(loss_T.double().sum())


def _batches(rows: Iterable[Tensor], batch_size: int) -> Iterator[list[Tensor]]:
    """Yield up to batch_size adjacent rows of equal length."""
    for _, same in groupby(rows, key=len):
        while batch := list(islice(same, batch_size)):
            yield batch


def _text_loss(loaded: LoadedModel, nats: float, tokens: int, size: int) -> TextLoss:
    mean, bits_per_byte = nats / tokens, nats / math.log(2) / size
    exp_mean = float(torch.tensor(mean, dtype=torch.float64).exp())  # infinite if a float cannot hold it
    return TextLoss(mean, exp_mean, tokens, size, bits_per_byte, loaded.window, loaded.precision)
