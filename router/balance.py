"""Balance losses as gradient coefficients, and the recorded loads from which they are computed.

"Eq. M17" and the like are equations of docs/method.md.

Letters: L layers, M experts that a layer's router can choose from (the pool's experts / groups).
"""

from typing import Any, Literal

from torch import Tensor

Scope = Literal["micro_batch", "global_batch"]


def balance_coefficients(fractions_LM: Tensor, layer_coeff: float, pool_coeff: float, groups: int) -> Tensor:
    """Compute d(balance loss) / d(mean scores) of every layer (Eq. M17).

    Loads are constants, so the balance loss is linear in the mean scores: layer l adds
    `(coefficients_LM[l] * mean_scores_M).sum()`, and no layer needs another layer's scores. The coefficients cover the
    loss per layer (Eq. M15; Eq. 4 of Switch Transformer, arXiv:2101.03961) and the loss over the pool (Eq. M16; Eq. 4
    to 6 of the UniPool paper, arXiv:2605.06665).

    Args:
        fractions_LM: The loads f of Eq. M13; each row sums to 1.
        layer_coeff: Coefficient of the loss per layer.
        pool_coeff: Coefficient of the loss over the pool.
        groups: Number of sub-pools, each shared by L / groups adjacent layers; 1 is UniPool.

    Returns:
        The coefficients (L, M), in the dtype of `fractions_LM`.

    Raises:
        ValueError: `groups` does not divide L.
    """
    num_layers, num_experts = fractions_LM.shape
    if num_layers % groups:
        raise ValueError(f"model.groups is {groups}: it must divide model.layers ({num_layers})")
    layers_per_group = num_layers // groups
    group_means = fractions_LM.view(groups, layers_per_group, num_experts).mean(dim=1)
    fbar_LM = group_means.repeat_interleave(layers_per_group, dim=0)
    return num_experts * (layer_coeff * fractions_LM + pool_coeff / layers_per_group * fbar_LM)


def load_of_groups(tokens_per_expert_LM: Tensor, groups: int) -> Tensor:
    """Return, in the row of every layer, the load summed over the layers of its group: (L, M)."""
    num_layers, num_experts = tokens_per_expert_LM.shape
    sums_GM = tokens_per_expert_LM.view(groups, num_layers // groups, num_experts).sum(dim=1)
    return sums_GM.repeat_interleave(num_layers // groups, dim=0)


class LoadStatistics:
    """Recorded loads for the balance losses: which tokens count, and how old they are (Eq. M18).

    With scope "micro_batch", micro-batch n of this rank uses the load of micro-batch n - delay; delay 0 is the
    micro-batch's own load, delay 1 is what the paper does. With scope "global_batch", every micro-batch of step s uses
    the load of step s - delay, summed over all trunk ranks and micro-batches; the delay is at least 1, because the load
    of a step is complete only at its end.

    Micro-batches and steps are counted from 0 over the whole run. Loads are stored under that number and never added up
    here, so several micro-batches in flight cannot mix.

    Args:
        scope: "micro_batch" or "global_batch".
        delay: Age of the load, in micro-batches or steps.
        num_layers: L.
        num_experts: M.

    Raises:
        ValueError: The scope is unknown, or does not allow the delay.
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
        """Record the load of micro-batch `index` (int64 counts); does nothing with scope "global_batch"."""
        if self.scope == "micro_batch":
            self._record(index, tokens_per_expert_LM)

    def record_step(self, step: int, tokens_per_expert_LM: Tensor) -> None:
        """Record the load of `step`; does nothing with scope "micro_batch".

        Args:
            step: Number of the optimizer step.
            tokens_per_expert_LM: Counts, int64, which the caller has summed over trunk ranks and micro-batches.
        """
        if self.scope == "global_batch":
            self._record(step, tokens_per_expert_LM)
            # Later steps need no older load than this.
            self._loads = {s: load for s, load in self._loads.items() if s > step - self.delay}

    def fractions(self, micro_batch_index: int, step: int) -> Tensor | None:
        """Return the loads f for a micro-batch: (L, M), fp32; each row sums to 1.

        With scope "micro_batch", call it once per micro-batch, because it drops the load.

        Returns:
            None while there is no balance loss yet.

        Raises:
            RuntimeError: The load is missing, because it has not been recorded or was asked for twice.
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
        """Declare loads before micro-batch or step `index` unknown, so that no balance loss is computed from them."""
        self._first = index

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to compute the same balance losses; tensors stay on their device."""
        loads = {i: load.clone() for i, load in self._loads.items()}
        return {"scope": self.scope, "delay": self.delay, "first": self._first, "loads": loads}

    def load_state_dict(self, state: dict[str, Any], shift: int = 0) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: The saved state.
            shift: Number to add to the saved indices, for a run that now counts micro-batches differently.

        Raises:
            ValueError: The state was saved with another scope or delay.
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
