"""Steps whose gradient norm is a spike are skipped by all ranks alike, also after a resume."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.training import run_training, tiny

STEPS = 25
"""Of which the first 20 only fill the window."""


def test_ranks_skip_the_same_steps_and_a_resumed_run_does_too(tmp_path: Path) -> None:
    """The limit is so low that the noise of the norm exceeds it; hardly anything is learned, so the norm stays."""

    train = {"steps": STEPS, "skip_spikes": 0.1, "lr": 1e-5, "min_lr": 1e-6}
    recipe = tiny(train=train, parallel={"pool_ranks": 1})
    whole = run_training(recipe, save_to=tmp_path, save_after=22)
    applied = [bool(scalars["applied"]) for scalars in whole.scalars]
    assert all(applied[:20]) and 0 < applied[20:].count(False) < STEPS - 20
    norms = torch.tensor([scalars["grad_norm"] for scalars in whole.scalars], dtype=torch.float64)
    assert norms.isfinite().all(), "the norm of a step that is skipped is shown"
    for step in range(20, STEPS):
        before = norms[:step]
        middle = before.quantile(0.5)
        limit = middle + max(0.1 * 1.4826 * (before - middle).abs().quantile(0.5), 0.02 * middle)
        assert applied[step] == (norms[step] <= limit), step
    resumed = run_training(recipe, resume_from=tmp_path)
    assert [scalars["applied"] for scalars in resumed.scalars] == [float(step) for step in applied[22:]]
    for name, weight in whole.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name
