"""Experts by torch's grouped matrix multiplication: the back end for GPUs in bf16.

SwiGLU is one fused kernel, its backward two, and nothing is read from the device. Letters: N rows in expert-major
order, D hidden, F expert width, e experts, b requests merged into one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pool.compiling import compiled
from pool.counts import Counts, total
from pool.permute import gather_order, merge_order, starts

# torch's grouped kernel is for these; elsewhere, and in fp32, it loops over the experts and waits for the device.
_MAJOR_CAPABILITIES = (9, 10)


@dataclass(frozen=True, eq=False)
class _Launch:
    """What is kept of a forward: [W1 x, W3 x] of all its requests, merged."""

    h_N2F: Tensor
    counts_be: list[Tensor]


class Hidden(NamedTuple):
    """What is kept of a request: its place among those of its forward."""

    launch: _Launch
    place: int


ForWeights = tuple[Tensor, Tensor]
"""dh_N2F, and the input of W2, act_NF."""


@cache
def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch has a grouped kernel for this device and dtype."""
    # _scaled_mm_allowed_device in aten/src/ATen/native/cuda/GroupedBlas.cpp decides so.
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device)[0] in _MAJOR_CAPABILITIES


def forward(x_ND: Tensor, w13_e2FD: Tensor, w2_eDF: Tensor, batches: Sequence[Counts]) -> tuple[Tensor, list[Hidden]]:
    """See `loop_experts.forward`."""
    offsets_e = total(batches).ends_e
    h_N2F = _product(x_ND, w13_e2FD.transpose(1, 2), offsets_e)
    y_ND = _product(_fused(swiglu, x_ND)(h_N2F), w2_eDF.transpose(1, 2), offsets_e)
    launch = _Launch(h_N2F, [counts.rows_e for counts in batches])
    return y_ND, [Hidden(launch, place) for place in range(len(batches))]


def backward(
    x_ND: Tensor,
    hidden: Sequence[Hidden] | None,
    dy_ND: Tensor,
    w13_e2FD: Tensor,
    w2_eDF: Tensor,
    batches: Sequence[Counts],
) -> tuple[Tensor, ForWeights]:
    """See `loop_experts.backward`."""
    offsets_e = total(batches).ends_e
    h_N2F = _product(x_ND, w13_e2FD.transpose(1, 2), offsets_e) if hidden is None else _joined(hidden, len(x_ND))
    dact_NF = _product(dy_ND, w2_eDF, offsets_e)
    dh_N2F, act_NF = _fused(swiglu_backward, x_ND)(h_N2F, dact_NF)
    return _product(dh_N2F, w13_e2FD, offsets_e), (dh_N2F, act_NF)


def add_weight_gradients(
    grad13_e2FD: Tensor, grad2_eDF: Tensor, work: Sequence[tuple[Tensor, Tensor, ForWeights, Counts]], experts: slice
) -> None:
    """See `loop_experts.add_weight_gradients`. Only for a part of the experts must the host know the counts."""
    first, end, _ = experts.indices(len(grad2_eDF))
    parts = [_part(*one, first, end) for one in work]
    rows = sum(len(x) for x, *_ in parts)
    if not rows:
        return
    counts_be = torch.stack([counts.rows_e.narrow(0, first, end - first) for *_, counts in work])
    counts_e = counts_be.sum(0)
    index_N = merge_order(counts_be, rows)[0] if len(work) > 1 else None
    offsets_e, empty_e11 = counts_e.cumsum(0, dtype=torch.int32), (counts_e == 0).view(-1, 1, 1)

    def merged(tensors: tuple[Tensor, ...]) -> Tensor:
        return tensors[0] if index_N is None else torch.cat(tensors).index_select(0, index_N)

    xs, dys, dhs, acts = zip(*parts, strict=True)
    for grad, outputs, inputs in ((grad13_e2FD, dhs, xs), (grad2_eDF, dys, acts)):
        product = F.grouped_mm(merged(outputs).t(), merged(inputs), offs=offsets_e)
        # The kernel may leave the part of an expert without rows unwritten (pytorch issue 172439).
        grad.narrow(0, first, end - first).add_(product.masked_fill_(empty_e11, 0.0))


def _part(
    x_ND: Tensor, dy_ND: Tensor, for_weights: ForWeights, counts: Counts, first: int, end: int
) -> tuple[Tensor, ...]:
    """Return x, dy, dh and act of adjacent experts: a piece of each, because rows are expert-major."""
    tensors = (x_ND, dy_ND, *for_weights)
    if end - first == len(counts.rows_e):
        return tensors
    start, size = sum(counts.listed[:first]), sum(counts.listed[first:end])
    return tuple(t.narrow(0, start, size) for t in tensors)


def swiglu(h_N2F: Tensor) -> Tensor:
    """Return silu(a) * b of h = [a, b]."""
    a_NF, b_NF = h_N2F.chunk(2, dim=1)
    return F.silu(a_NF) * b_NF


def swiglu_backward(h_N2F: Tensor, dact_NF: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient dh_N2F of h, and swiglu(h) again."""
    a_NF, b_NF = h_N2F.chunk(2, dim=1)
    sigmoid_NF = torch.sigmoid(a_NF)
    silu_NF = a_NF * sigmoid_NF
    da_NF = dact_NF * b_NF * (sigmoid_NF + silu_NF * (1 - sigmoid_NF))
    return torch.cat((da_NF, dact_NF * silu_NF), dim=1), silu_NF * b_NF


def _fused(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """Return the function compiled on a GPU, or as it is on a CPU, where tests use this back end.

    One row would have a graph of its own, and torch would compile it in the middle of a step.
    """
    return compiled(function, dynamic=True) if x.is_cuda and len(x) > 1 else function


def _product(x_NI: Tensor, w_eIO: Tensor, offsets_e: Tensor) -> Tensor:
    """Multiply the rows of expert i by `w_eIO[i]`. Every row must belong to an expert: others would stay unwritten."""
    if len(x_NI) == 0:
        return x_NI.new_empty(0, w_eIO.shape[2])
    return F.grouped_mm(x_NI, w_eIO, offs=offsets_e)


def _joined(hidden: Sequence[Hidden], rows: int) -> Tensor:
    """Merge the rows of several requests, as `merge_order` does; nothing moves if their forwards were merged so."""
    launches = list(dict.fromkeys(part.launch for part in hidden))
    places = [part.place for part in hidden]
    if len(launches) == 1 and places == list(range(len(launches[0].counts_be))):
        return launches[0].h_N2F
    starts_be, begin = {}, 0  # by launch, once their rows lie one after the other
    for launch in launches:
        starts_be[launch] = starts(torch.stack(launch.counts_be, dim=1)).t() + begin
        begin += len(launch.h_N2F)
    counts_be = torch.stack([part.launch.counts_be[part.place] for part in hidden])
    mine_be = torch.stack([starts_be[part.launch].select(0, part.place) for part in hidden])
    index_N = gather_order(mine_be, counts_be, rows)
    return torch.cat([launch.h_N2F for launch in launches]).index_select(0, index_N)
