"""What a run says of itself when it starts."""

from __future__ import annotations

import pytest

from trainer.config.recipe import load_recipe
from trainer.telemetry.console import describe


@pytest.mark.parametrize(
    ("overrides", "model"),
    [
        ([], "8 layers share 64 experts; "),
        (["model.groups=8"], "8 groups of 1 layer with 8 experts each; "),
        (["model.groups=4"], "4 groups of 2 layers with 16 experts each; "),
        (["lock={full_fraction: 0.1, anneal_fraction: 0.2}"], "8 layers share 64 experts, locked after step 300; "),
        (["lock={allocation: random}"], "8 layers share 64 experts, locked from the first step; "),
    ],
)
def test_the_first_line_says_which_layers_share_experts(overrides: list[str], model: str) -> None:
    assert f": {model}" in describe(load_recipe("small", overrides))
