"""What the wire checks in every message with `WireSettings.check`: payloads, and conservation of tokens.

Each end adds a fingerprint to the headers it sends: how many rows follow, and a checksum of their bits. An answer then
has a header of its own, with the tokens of each expert that were served. Each check returns what is wrong, or "".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FINGERPRINT_FIELDS = 2
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(rows_ND: Tensor) -> list[int]:
    """Return the number of rows and the sum of their bits read as integers, which one flipped bit changes."""
    return [len(rows_ND), int(rows_ND.view(_BITS[rows_ND.element_size()]).sum(dtype=torch.int64))]


def not_finite(rows_ND: Tensor) -> str:
    """Check that all values of a payload are finite."""
    finite = int(rows_ND.isfinite().sum())
    return "" if finite == rows_ND.numel() else f"{rows_ND.numel() - finite} of {rows_ND.numel()} values are not finite"


def not_conserved(sent_e: Sequence[int], rows_sent: int, served_e: Sequence[int], rows_returned: int) -> str:
    """Check that tokens sent = served by expert of the shard, and rows sent = returned."""
    for expert, (sent, served) in enumerate(zip(sent_e, served_e, strict=True)):
        if sent != served:
            return f"{sent} tokens were sent to expert {expert} of the shard, {served} were served"
    return "" if rows_sent == rows_returned else f"{rows_sent} rows were sent, {rows_returned} returned"


def altered(rows_ND: Tensor, sent: Sequence[int]) -> str:
    """Check that a payload is finite and has the fingerprint with which it was sent."""
    wrong = not_finite(rows_ND)
    if not wrong and (received := fingerprint(rows_ND)) != list(sent):
        wrong = f"the checksum was {sent[1]} when they were sent, but is {received[1]}"
    return wrong
