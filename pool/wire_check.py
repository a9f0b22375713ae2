"""What the wire checks of every message when it is told to (`WireSettings.check`): payloads and conservation of tokens.

Either end seals what it sends: the header also says how many rows follow and a checksum of their bits. An answer then
has a header of its own, with the tokens of each expert that were served. Each function here says what is wrong, or "".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SEAL_FIELDS = 2
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def seal(rows_ND: Tensor) -> list[int]:
    """Number of rows, and the sum of their bits read as integers: one flipped bit changes it."""
    return [len(rows_ND), int(rows_ND.view(_BITS[rows_ND.element_size()]).sum(dtype=torch.int64))]


def not_finite(rows_ND: Tensor) -> str:
    """Whether a payload has values that are not finite."""
    finite = int(rows_ND.isfinite().sum())
    return "" if finite == rows_ND.numel() else f"{rows_ND.numel() - finite} of {rows_ND.numel()} values are not finite"


def not_conserved(sent_e: Sequence[int], rows_sent: int, served_e: Sequence[int], rows_returned: int) -> str:
    """Whether tokens sent = served, by expert of the shard, and rows sent = returned."""
    for expert, (sent, served) in enumerate(zip(sent_e, served_e, strict=True)):
        if sent != served:
            return f"{sent} tokens were sent to expert {expert} of the shard, {served} were served"
    return "" if rows_sent == rows_returned else f"{rows_sent} rows were sent, {rows_returned} returned"


def altered(rows_ND: Tensor, sealed: Sequence[int]) -> str:
    """Whether a payload that came is not the one that was sealed."""
    wrong = not_finite(rows_ND)
    if not wrong and (came := seal(rows_ND)) != list(sealed):
        wrong = f"the checksum was {sealed[1]} when they were sent, is {came[1]}"
    return wrong
