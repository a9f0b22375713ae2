"""Balance losses as gradient coefficients, and the memory of loads that they are made from.

Letters: L layers, M experts that a layer sees (the pool's experts / groups).
"""

from typing import Any, Literal

from torch import Tensor

Scope = Literal["micro_batch", "global_batch"]


def balance_coefficients(fractions_LM: Tensor, layer_coeff: float, pool_coeff: float, groups: int) -> Tensor:
    """d(balance loss) / d(mean_scores_M of layer l), for every layer l.

    The loads f are constants, so that only routers get gradient and the loss is linear in the mean scores P^(l):
    layer l adds (coeffs_LM[l] * mean_scores_M).sum() to the loss, and no layer needs another one's scores. Two terms:
    - per layer (Switch): layer_coeff * M * sum_i f_i^(l) P_i^(l), hence layer_coeff * M * f^(l);
    - pool level (eq. 4-6): pool_coeff * M * sum_i fbar_i Pbar_i with the means over the layers of one group. Pbar is
      a mean, hence pool_coeff * M * fbar / (layers of the group).
    Group g is the L / groups adjacent layers that share a sub-pool; groups = 1 is UniPool.

    fractions_LM: f, each row sums to 1. Returns: coeffs_LM, the dtype of fractions_LM.
    Errors: ValueError if groups does not divide L.
    Source: arXiv:2605.06665, eq. 4-6; Switch Transformer, arXiv:2101.03961, eq. 4.
    """
    num_layers, num_experts = fractions_LM.shape
    if num_layers % groups:
        raise ValueError(f"model.groups is {groups}: it must divide model.layers, {num_layers}")
    layers_per_group = num_layers // groups
    group_means = fractions_LM.view(groups, layers_per_group, num_experts).mean(dim=1)
    fbar_LM = group_means.repeat_interleave(layers_per_group, dim=0)
    return num_experts * (layer_coeff * fractions_LM + pool_coeff / layers_per_group * fbar_LM)


class LoadStatistics:
    """The loads that f and fbar are made from: which tokens, and how old (METHOD.md, "Which tokens make fbar").

    scope "micro_batch": micro-batch i of this rank uses the load of micro-batch i - delay; 0 is exact, 1 the paper.
    scope "global_batch": every micro-batch of step s uses the load of step s - delay, summed over all trunk ranks and
    micro-batches; delay >= 1, for a step's load is complete only at its end.
    Micro-batches and steps are counted from 0 over the whole run. Loads are kept by that number and never added up
    here, so that several micro-batches in flight cannot mix.

    num_layers: L. num_experts: M.
    Errors: ValueError for an unknown scope or a delay that it does not allow.
    """

    def __init__(self, scope: Scope, delay: int, num_layers: int, num_experts: int) -> None:
        if scope not in ("micro_batch", "global_batch"):
            raise ValueError(f"balance.scope is {scope!r}: it must be micro_batch or global_batch")
        least_delay = 0 if scope == "micro_batch" else 1
        if delay < least_delay:
            raise ValueError(f"balance.delay is {delay}: with balance.scope {scope} it must be {least_delay} or more")
        self.scope = scope
        self.delay = delay
        self.shape = (num_layers, num_experts)
        self._loads: dict[int, Tensor] = {}  # tokens_per_expert_LM by micro-batch or step
        self._first = 0

    def record_micro_batch(self, index: int, tokens_per_expert_LM: Tensor) -> None:
        """The load of micro-batch `index`, int64 counts. Nothing happens with scope global_batch."""
        if self.scope == "micro_batch":
            self._record(index, tokens_per_expert_LM)

    def record_step(self, step: int, tokens_per_expert_LM: Tensor) -> None:
        """The load of `step`, int64 counts that the caller has summed over trunk ranks and micro-batches.

        Nothing happens with scope micro_batch.
        """
        if self.scope == "global_batch":
            self._record(step, tokens_per_expert_LM)
            # Step + 1 comes next: it and its followers need no load older than this.
            self._loads = {s: load for s, load in self._loads.items() if s > step - self.delay}

    def fractions(self, micro_batch_index: int, step: int) -> Tensor | None:
        """fractions_LM for a micro-batch, fp32, each row sums to 1; None while there is no balance loss yet.

        With scope micro_batch ask once a micro-batch: its load has no other reader and is dropped here.
        Errors: RuntimeError if the load should be there and is not (not recorded yet, or asked for twice).
        """
        unit = "micro-batch" if self.scope == "micro_batch" else "step"
        reader = micro_batch_index if self.scope == "micro_batch" else step
        source = reader - self.delay
        if source < self._first:
            return None
        if source not in self._loads:
            raise RuntimeError(
                f"balance loss of {unit} {reader} (micro-batch {micro_batch_index}, step {step}) needs the load of "
                f"{unit} {source}, but has only {sorted(self._loads)}: it is not recorded yet or was dropped"
            )
        load_LM = self._loads.pop(source) if self.scope == "micro_batch" else self._loads[source]
        return load_LM.float() / load_LM.sum(dim=-1, keepdim=True)

    def begin_at(self, index: int) -> None:
        """Loads before micro-batch or step `index` are not known: there is no balance loss from them."""
        self._first = index

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to have the same balance losses; tensors stay on their device."""
        loads = {i: load.clone() for i, load in self._loads.items()}
        return {"scope": self.scope, "delay": self.delay, "first": self._first, "loads": loads}

    def load_state_dict(self, state: dict[str, Any], shift: int = 0) -> None:
        """Take over what state_dict gave.

        shift: added to the numbers of its loads, where micro-batches are counted otherwise now.
        Errors: ValueError if it was saved with another scope or delay: the loads needed now are not in it.
        """
        if (state["scope"], state["delay"]) != (self.scope, self.delay):
            raise ValueError(
                f"balance.scope and balance.delay are {self.scope} and {self.delay}, the checkpoint has "
                f"{state['scope']} and {state['delay']}: they must be the same to resume"
            )
        self._loads = {}
        self._first = max(0, state["first"] + shift)
        for index, load_LM in state["loads"].items():
            self._record(index + shift, load_LM)

    def _record(self, index: int, tokens_per_expert_LM: Tensor) -> None:
        assert tokens_per_expert_LM.shape == self.shape, (tuple(tokens_per_expert_LM.shape), self.shape)
        self._loads[index] = tokens_per_expert_LM.clone()  # the caller may go on counting in its tensor
