"""The router of a UniPool layer, and the pool of experts.

Dimensions: T tokens, D hidden size, F expert width, E experts in the pool, M experts that a layer can choose, K experts
per token, N = T * K rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from .configuration_unipool import UniPoolConfig

EPS = 1e-8  # of Eq. 7 of the paper
SIGMOID_EPS = 1e-20  # for sigmoid gate values that are all nearly 0

# Up to this many rows, weights are copied for each row, so that the host need not wait for the chosen experts.
_FEW_ROWS = 64


def _grouped_linear(x_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply rows by the weights of their experts, in the type of the rows.

    Args:
        x_ND: Rows, sorted by expert.
        weight_EFD: Weights of all experts; those of experts without rows are not read.
        counts_E: Number of rows of each expert.
    """
    y_NF = x_ND.new_empty(x_ND.shape[0], weight_EFD.shape[1])
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            rows = slice(start, start + count)
            torch.mm(x_ND[rows], weight_EFD[expert].to(x_ND.dtype).T, out=y_NF[rows])
            start += count
    return y_NF


def _grouped_linear_of_subclass(x_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """The same for a subclass of Tensor, for example quantised weights, which need not support more than this."""
    if torch.is_inference_mode_enabled():  # in which torchao's stacks cannot be indexed
        with torch.inference_mode(False):
            return _grouped_linear_of_subclass(x_ND, weight_EFD, counts_E)
    parts = x_ND.split(counts_E.tolist())
    return torch.cat([F.linear(x_nD, weight_EFD[expert]) for expert, x_nD in enumerate(parts) if len(x_nD)])


def _grouped_linear_backward(
    grad_NF: Tensor, x_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the rows and of the weights, which are zero for experts without rows."""
    grad_x_ND, grad_weight_EFD = torch.empty_like(x_ND), torch.zeros_like(weight_EFD)
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            rows = slice(start, start + count)
            torch.mm(grad_NF[rows], weight_EFD[expert].to(x_ND.dtype), out=grad_x_ND[rows])
            grad_weight_EFD[expert] = grad_NF[rows].T @ x_ND[rows]
            start += count
    return grad_x_ND, grad_weight_EFD


# Custom operators, because the number of rows per expert is known only at run time: torch.compile does not trace them.
_operator = torch.library.custom_op(
    "unipool::grouped_linear",
    _grouped_linear,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor counts) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
_operator.register_fake(lambda x, weight, counts: x.new_empty(x.shape[0], weight.shape[1]))
_operator_backward = torch.library.custom_op(
    "unipool::grouped_linear_backward",
    _grouped_linear_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor counts) -> (Tensor, Tensor)",
    tags=(torch.Tag.cudagraph_unsafe,),
)
_operator_backward.register_fake(lambda grad, x, weight, counts: (x.new_empty(x.shape), weight.new_empty(weight.shape)))
_operator.register_autograd(
    lambda ctx, grad: (*_operator_backward(grad.contiguous(), *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, nn.Parameter)


class UniPoolMLP(nn.Module):
    """A SwiGLU FFN of a layer's own: that of a dense model, or an expert beside the pool. Also an expert on its own."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class UniPoolExperts(nn.Module):
    """The pool of experts. Each layer calls it with the experts that it chose, numbered within the whole pool."""

    def __init__(self, config: UniPoolConfig):
        super().__init__()
        experts, hidden, width = config.num_experts, config.hidden_size, config.intermediate_size
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))  # gate above up
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    @torch.no_grad()
    def unstack(self) -> None:
        """Replace the two stacks by a `UniPoolMLP` per expert, for libraries that quantise or adapt linear layers only.

        Parameters are then called as in the files, so that save_pretrained still writes the same files.
        """
        width, hidden = self.down_proj.shape[2], self.down_proj.shape[1]
        for expert, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            gate, up = gate_up.chunk(2)
            with torch.device("meta"):
                mlp = UniPoolMLP(hidden, width)
            weights = {"gate_proj": gate, "up_proj": up, "down_proj": down}
            mlp.load_state_dict({f"{name}.weight": weight.clone() for name, weight in weights.items()}, assign=True)
            self.add_module(str(expert), mlp)
        for name in ("gate_up_proj", "down_proj"):
            self.register_parameter(name, None)

    def forward(self, x_TD: Tensor, topk_expert_ids_TK: Tensor, topk_scores_TK: Tensor) -> Tensor:
        """Return sum_i g_i(x) e_i(x) over the chosen experts, summed in fp32."""
        device, ids_N = x_TD.device.type, topk_expert_ids_TK.flatten()
        rows_ND = x_TD.repeat_interleave(topk_expert_ids_TK.shape[1], dim=0)
        if torch.is_autocast_enabled(device):
            rows_ND = rows_ND.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            few = device != "cpu" and ids_N.shape[0] <= _FEW_ROWS and _is_plain(self.gate_up_proj)
            y_ND = self.row_by_row(rows_ND, ids_N) if few else self.expert_by_expert(rows_ND, ids_N)
            y_TKD = y_ND.float().view(*topk_scores_TK.shape, -1)
            return (topk_scores_TK[..., None] * y_TKD).sum(dim=1).to(x_TD.dtype)

    def expert_by_expert(self, x_ND: Tensor, ids_N: Tensor) -> Tensor:
        """Return e_i(x) of each row, with one matrix product per chosen expert."""
        order_N = ids_N.argsort(stable=True)
        counts_E = torch.zeros(self.num_experts, dtype=torch.int64, device=ids_N.device)
        counts_E = counts_E.index_add(0, ids_N, torch.ones_like(ids_N))
        if self.gate_up_proj is None:
            parts = x_ND[order_N].split(counts_E.tolist())
            y_ND = torch.cat([self.get_submodule(str(i))(x_nD) for i, x_nD in enumerate(parts) if len(x_nD)])
            return y_ND[order_N.argsort()]
        linear = _grouped_linear_of_subclass
        if _is_plain(self.gate_up_proj):  # calling the operator takes longer than computing a single row
            linear = _operator if torch.is_grad_enabled() or torch.compiler.is_compiling() else _grouped_linear
        gate_NF, up_NF = linear(x_ND[order_N], self.gate_up_proj, counts_E).chunk(2, dim=-1)
        y_ND = linear(F.silu(gate_NF) * up_NF, self.down_proj, counts_E)
        return y_ND[order_N.argsort()]

    def row_by_row(self, x_ND: Tensor, ids_N: Tensor) -> Tensor:
        """Return e_i(x) of each row, with a copy of its expert's weights; shapes do not depend on the choice."""
        gate_up_ND, down_ND = self.gate_up_proj[ids_N].to(x_ND.dtype), self.down_proj[ids_N].to(x_ND.dtype)
        gate_NF, up_NF = (gate_up_ND @ x_ND[..., None]).squeeze(-1).chunk(2, dim=-1)
        return (down_ND @ (F.silu(gate_NF) * up_NF)[..., None]).squeeze(-1)


register_checkpoint_conversion_mapping(
    UniPoolConfig.model_type,
    [
        WeightConverter(
            source_patterns=["experts.*.gate_proj.weight", "experts.*.up_proj.weight"],
            target_patterns="experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns=["experts.*.down_proj.weight"],
            target_patterns="experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ],
    overwrite=True,  # this file may be loaded from several folders
)


class UniPoolRouter(nn.Module):
    """Chooses K experts for each token, and computes their gate values in fp32."""

    expert_bias: Tensor
    foreign_M: Tensor | None

    def __init__(self, config: UniPoolConfig, layer_idx: int):
        super().__init__()
        self.kind, self.top_k = config.router, config.num_experts_per_tok
        self.constant = config.router_constant * config.router_constant_factor
        experts = config.num_experts // config.num_expert_groups
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        if self.kind in ("norm", "norm_bias"):
            self.sigma = nn.Parameter(torch.ones(1))
        self.renormalize = config.norm_topk_prob
        self.bias = nn.Parameter(torch.zeros(experts)) if config.router_bias else None
        if self.kind in ("norm_bias", "sigmoid_bias"):
            self.register_buffer("expert_bias", torch.zeros(experts))
        # True for experts that other layers own. It is not stored; config.json names the owners.
        self.owned_elsewhere = [owner != layer_idx for owner in config.expert_owners or ()]
        self.foreign_factor = config.foreign_expert_factor
        marks_M = torch.empty(experts, dtype=torch.bool) if self.owned_elsewhere else None
        self.register_buffer("foreign_M", marks_M, persistent=False)
        self.mark_foreign()

    @torch.no_grad()
    def mark_foreign(self) -> None:
        """Fill `foreign_M`, which has no values after it has been moved from torch's meta device."""
        if self.foreign_M is not None:
            self.foreign_M.copy_(torch.tensor(self.owned_elsewhere))

    def preference(self, logits_TM: Tensor) -> Tensor:
        """Return what NormRouter's top-k compares, which also makes the scores: the logits of experts in reach."""
        if self.foreign_M is None:
            return logits_TM
        if self.foreign_factor == 0:
            return logits_TM.masked_fill(self.foreign_M, -torch.inf)
        faded_TM = torch.minimum(logits_TM, logits_TM * self.foreign_factor)
        return torch.where(self.foreign_M, faded_TM, logits_TM)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (logits_TM, topk_scores_TK, topk_expert_ids_TK); ids count from the layer's first expert."""
        with torch.autocast(x_TD.device.type, enabled=False):
            bias_M = None if self.bias is None else self.bias.float()
            logits_TM = F.linear(x_TD.float(), self.weight.float(), bias_M)
            if self.kind in ("norm", "norm_bias"):  # Eq. 7
                norm_T1 = torch.linalg.vector_norm(logits_TM, dim=-1, keepdim=True)
                gain_T1 = self.sigma.float() * self.constant / (norm_T1 + EPS)
                # Neither the norm nor the scale changes the order of a token's experts.
                preference_TM = faded_TM = self.preference(logits_TM)
                if self.kind == "norm_bias":  # the bias is for experts with a positive score only
                    bias_M = self.expert_bias.float()
                    raised_TM = logits_TM * gain_T1 + (bias_M - bias_M.min())
                    preference_TM = torch.where(logits_TM > 0, raised_TM, logits_TM)
                ids_TK = preference_TM.topk(self.top_k, dim=-1).indices
                return logits_TM, faded_TM.gather(-1, ids_TK).relu() * gain_T1, ids_TK
            if self.kind == "softmax":
                scores_TM = preference_TM = logits_TM.softmax(dim=-1)
            else:  # the bias affects the choice, but not the gate values
                scores_TM = logits_TM.sigmoid()
                preference_TM = scores_TM + self.expert_bias.float()
            ids_TK = preference_TM.topk(self.top_k, dim=-1).indices
            scores_TK = scores_TM.gather(-1, ids_TK)
            if self.renormalize or (self.kind == "sigmoid_bias" and self.top_k > 1):
                scores_TK = scores_TK / (scores_TK.sum(dim=-1, keepdim=True) + SIGMOID_EPS)
            return logits_TM, scores_TK, ids_TK
