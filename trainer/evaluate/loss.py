"""Loss on text, in windows as training has them: seq_len tokens each, every token but the first predicted once.

Windows do not overlap: the first token of one is predicted with no context but the last token of the one before.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from trainer.checkpoint.format import read_about
from trainer.common.errors import UserError
from trainer.config.sections import source_names
from trainer.data.batches import evaluation_steps
from trainer.data.reading.documents import read_text
from trainer.evaluate.subject import Subject
from trainer.export.source import data_of
from trainer.model.document_mask import attention_of, document_end
from trainer.train.summary import perplexity


@dataclass(frozen=True)
class TextLoss:
    """How well a model predicts a text.

    Attributes:
        loss: mean cross-entropy, nats a predicted token.
        tokens: predicted ones.
        bytes: of the whole text in UTF-8; of the validation split, estimated by its mean bytes a token.
        bits_per_byte: bits that the predicted tokens cost together, over `bytes`.
        window: tokens a window.
        precision: of the arithmetic, fp32 or bf16.
    """

    loss: float
    perplexity: float
    tokens: int
    bytes: int
    bits_per_byte: float
    window: int
    precision: str


def validation_loss(subject: Subject, batches: int | None, batch_size: int) -> TextLoss:
    """The run's loss on its held-out split, on the rows on which training evaluates: the same number.

    Args:
        batches: global batches at most; default: the recipe's eval.batches.

    Raises:
        UserError: it is no run, or its data are gone or have changed.
    """
    if subject.run is None:
        raise UserError(
            f"{subject.path}: an export has no held-out text; give the run, or --text FILE or --tasks for the export"
        )
    recipe = subject.run.recipe
    prepared = data_of(subject.run)
    if read_about(subject.run.folder).data != prepared.identity:
        raise UserError(
            f"data.source = {source_names(recipe.data.source)}: its text or its tokenizer has changed since "
            f"{subject.name} of {subject.folder}; restore the old data, or give --text FILE"
        )
    stream = prepared.stream("validation", None)
    wanted = recipe.eval.batches if batches is None else batches
    count = evaluation_steps(stream.rows, wanted, recipe.train.global_batch) * recipe.train.global_batch
    rows = (row_1S1[0] for row_1S1 in stream.micro_batches(0, count, 0, 1, 1))
    nats, tokens = total_loss(subject, rows, count, batch_size, document_end(recipe, prepared))
    return _summary(subject, nats, tokens, round(tokens * prepared.bytes_per_token))


def text_loss(subject: Subject, file: Path, batch_size: int) -> TextLoss:
    """The loss on a text: all tokens but the first are predicted, from those before; documents end as in training.

    Args:
        file: in any of the formats that can be trained on; a plain-text file is one document.

    Raises:
        UserError: the file cannot be read, or has fewer than two tokens.
    """
    ids: list[int] = []
    size = 0
    for document in read_text(file):
        if ids:
            ids.append(subject.tokenizer.eos_token_id)
        # As in training: what is spelled like a special token is text.
        ids += subject.tokenizer(document, split_special_tokens=True, verbose=False)["input_ids"]
        size += len(document.encode())
    if len(ids) < 2:
        raise UserError(f"--text {file}: has {len(ids)} tokens; one cannot be predicted from another")
    rows = windows(ids, subject.model.config.max_position_embeddings)
    nats, tokens = total_loss(subject, map(torch.tensor, rows), len(rows), batch_size)
    return _summary(subject, nats, tokens, size)


def windows(ids: Sequence[int], seq_len: int) -> list[Sequence[int]]:
    """Rows of seq_len + 1 tokens, the last one maybe shorter; each begins with the last token of the one before."""
    return [ids[start : start + seq_len + 1] for start in range(0, len(ids) - 1, seq_len)]


@torch.inference_mode()
def total_loss(
    subject: Subject, rows: Iterable[Tensor], count: int, batch_size: int, end: int | None = None
) -> tuple[float, int]:
    """(cross-entropy in nats, tokens) of predicting all tokens but the first of every row.

    Args:
        rows: int64, (S + 1,) each.
        count: how many they are, for the progress bar.
        end: id of the token that ends a document, where attention stays within documents.
    """
    nats, tokens = 0.0, 0
    with tqdm(desc="evaluating", total=count, unit=" windows", disable=not sys.stderr.isatty()) as bar:
        for batch in _batches(rows, batch_size):
            row_BS1 = torch.stack(batch).to(subject.model.device)
            targets_T = row_BS1[:, 1:].flatten()
            with subject.autocast():
                tokens_BS = row_BS1[:, :-1]
                logits_BSV = subject.model(tokens_BS, use_cache=False, **attention_of(tokens_BS, end)).logits
            mean = F.cross_entropy(logits_BSV.float().flatten(0, 1), targets_T)
            nats += float(mean) * len(targets_T)
            tokens += len(targets_T)
            bar.update(len(batch))
    return nats, tokens


def _batches(rows: Iterable[Tensor], batch_size: int) -> Iterator[list[Tensor]]:
    """Up to batch_size rows of equal length each, in order."""
    for _, same in groupby(rows, key=len):
        while batch := list(islice(same, batch_size)):
            yield batch


def _summary(subject: Subject, nats: float, tokens: int, size: int) -> TextLoss:
    loss = nats / tokens
    window = subject.model.config.max_position_embeddings
    return TextLoss(
        loss=loss,
        perplexity=perplexity(loss),
        tokens=tokens,
        bytes=size,
        bits_per_byte=nats / math.log(2) / size,
        window=window,
        precision=subject.precision,
    )
