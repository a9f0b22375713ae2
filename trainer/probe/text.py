"""The held-out text that a probe reads, and a model's loss on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from trainer.common.errors import UserError
from trainer.data.reading.documents import read_text_option
from trainer.export.source import SavedRun, data_of
from trainer.model.document_mask import attention_of
from trainer.probe.adapters import MoEModel, Source

LONGEST = 1024
"""Tokens of a sequence at most, the paper's length: windows of some families are far longer than a CPU likes."""
BATCH_TOKENS = 4096
"""Of one forward, about."""
_CHARACTERS = 32
"""Of a token, at most on average: no more of a long text is tokenised than is needed."""


@dataclass(frozen=True)
class Text:
    """Sequences to read.

    Attributes:
        name: what it is, for titles.
        rows_NS1: int64; inputs are [:, :-1], targets [:, 1:].
        document_end: id of the token that ends a document, for a run that was trained with `data.document_mask`.
    """

    name: str
    rows_NS1: Tensor
    document_end: int | None = None

    @property
    def tokens(self) -> int:
        """That the model reads, and as many that it predicts."""
        return self.rows_NS1[:, 1:].numel()

    @property
    def batches(self) -> tuple[Tensor, ...]:
        """The rows, about BATCH_TOKENS at a time."""
        rows: tuple[Tensor, ...] = self.rows_NS1.split(max(1, BATCH_TOKENS // (self.rows_NS1.shape[1] - 1)))
        return rows


def read_text(source: Source, file: Path | None, tokens: int) -> Text:
    """About `tokens` tokens: of the file, or of the text that the run has held out.

    Args:
        file: in any of the formats that can be trained on; documents are packed as for training.

    Raises:
        UserError: a file that cannot be read, or data that is not the run's own.
    """
    masked = source.run is not None and source.run.recipe.data.document_mask
    document_end = source.tokenizer.eos_token_id if masked else None
    if file:
        rows_NS1 = _pack(_token_ids(source.tokenizer, file, tokens), file, source.model.window, tokens)
        return Text(file.name, rows_NS1, document_end)
    assert source.run, "only a run has text of its own"
    return Text("held-out text", _held_out(source.run, source.tokenizer, tokens), document_end)


def _held_out(run: SavedRun, tokenizer: Any, tokens: int) -> Tensor:
    """The first sequences of the run's validation split, as the trainer evaluates them."""
    prepared = data_of(run)
    if prepared.tokenizer().get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{prepared.files('validation')}: was prepared with another tokenizer than the run's; restore the data "
            "that the run was trained on, or give --text"
        )
    stream = prepared.stream("validation", None)
    wanted = min(max(1, tokens // run.recipe.model.seq_len), max(1, stream.rows))
    (row_RS1,) = stream.micro_batches(0, wanted, 0, 1, wanted)
    return row_RS1


def _token_ids(tokenizer: Any, file: Path, tokens: int) -> Iterator[int]:
    for document in read_text_option(file):
        yield from tokenizer(document[: _CHARACTERS * tokens], add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            yield tokenizer.eos_token_id


def _pack(ids: Iterator[int], file: Path, window: int, tokens: int) -> Tensor:
    """Rows of S+1, each starting with the last token of the one before; a short text is one short row."""
    length = min(window, LONGEST)
    rows: list[list[int]] = []
    row: list[int] = []
    for token in ids:
        row.append(token)
        if len(row) == length + 1:
            rows.append(row)
            row = [token]
            if len(rows) * length >= tokens:
                break
    if not rows and len(row) > 1:
        rows = [row]
    if not rows:
        raise UserError(f"--text {file}: has {len(row)} token; at least 2 are needed")
    return torch.tensor(rows)


@contextmanager
def progress(what: str, batches: int) -> Iterator[Callable[[], object]]:
    """A bar on stderr; call what it gives after each batch. Its ETA is by the mean, as batches differ."""
    with tqdm(desc=what, total=batches, unit=" batches", disable=None, leave=False, smoothing=0) as bar:
        yield bar.update


@torch.no_grad()
def mean_loss(model: MoEModel, text: Text, done: Callable[[], object]) -> float:
    """Mean cross-entropy of the text, nats a token."""
    total = 0.0
    for rows_BS1 in text.batches:
        rows_BS1 = rows_BS1.to(model.model.device)
        tokens_BS = rows_BS1[:, :-1]
        attention = attention_of(tokens_BS, text.document_end)
        logits_BSV = model.model(input_ids=tokens_BS, use_cache=False, **attention).logits
        loss_T = F.cross_entropy(logits_BSV.flatten(0, 1).float(), rows_BS1[:, 1:].flatten(), reduction="none")
        total += float(loss_T.double().sum())
        done()
    return total / text.tokens


@torch.no_grad()
def read(model: MoEModel, text: Text, done: Callable[[], object]) -> None:
    """All layers of the model over the text, without its head."""
    for rows_BS1 in text.batches:
        tokens_BS = rows_BS1[:, :-1].to(model.model.device)
        model.model.model(input_ids=tokens_BS, use_cache=False, **attention_of(tokens_BS, text.document_end))
        done()
