"""The worked examples of CONTRIBUTING.md run as they are."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import pytest
import torch

from pool import loop_experts
from pool.counts import Counts
from tests.docs.markdown import ROOT


def blocks(example: str) -> list[str]:
    """Return the blocks of Python code of a worked example, by the end of its heading."""
    (section,) = re.findall(
        rf"^### Add an? {example}\n(.*?)(?=^##|\Z)", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S
    )
    return [textwrap.dedent(block) for block in re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)]


def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run a block among the names of a module; return these and what it has defined."""
    names = dict(names)
    exec(compile(code, "CONTRIBUTING.md", "exec", dont_inherit=True), names)
    return names


def test_router() -> None:
    import router.routers as module

    source, case, export, reference = blocks("router")
    router = run(source, vars(module))["ReluRouter"](5, 7, 7, "raw", False)
    router.reset_parameters(1.0, torch.Generator().manual_seed(0))
    h_TD = torch.randn(11, 5, generator=torch.Generator().manual_seed(1))
    routing = router(h_TD)
    logits_TM = h_TD @ router.weight_MD.detach().T
    assert torch.equal(routing.topk_expert_ids_TK, logits_TM.topk(7).indices)
    torch.testing.assert_close(routing.topk_scores_TK, logits_TM.topk(7).values.relu())
    match = "def build(kind, hidden, num_experts, top_k, scores, z_loss):\n    match kind:\n" + textwrap.indent(
        case, " " * 8
    )
    names = {**vars(module), "ReluRouter": type(router)}
    assert isinstance(run(match, names)["build"]("relu", 5, 7, 2, "raw", False), type(router))
    exported = f"if False:\n    pass\n{export}"
    kind = type("Kind", (), {"kind": "relu"})
    scores = run(exported, {"self": kind, "logits_TM": logits_TM})["scores_TM"]
    assert torch.equal(scores, logits_TM.relu())
    scalar = f"def loop_scores(kind, z):\n{textwrap.indent(reference, '    ')}"
    assert run(scalar, {})["loop_scores"]("relu", [1.5, -2.0]) == [1.5, 0]


def test_recipe_key() -> None:
    import trainer.config.constraints as constraints
    import trainer.config.sections as sections
    from trainer.config.recipe import load_recipe

    field, constraint, use = blocks("recipe key")
    data = run(f"class Wider(Data):\n{textwrap.indent(field, '    ')}", vars(sections))["Wider"]
    recipe = load_recipe("small")
    tree = recipe.data.model_dump()
    assert data.model_validate(tree).shuffle and data.model_fields["shuffle"].description.endswith(".")
    check = run(f"def check(r):\n    d = r.data\n{textwrap.indent(constraint, '    ')}", vars(constraints))["check"]
    for source, shuffle, message in (
        ("a", False, None),
        ([{"source": "a"}], True, None),
        ([{"source": "a"}], False, "data.shuffle = False"),
    ):
        changed = recipe.model_copy(
            update={"data": data.model_validate({**tree, "source": source, "shuffle": shuffle})}
        )
        if message:
            with pytest.raises(ValueError, match=message):
                check(changed)
        else:
            check(changed)
    replaced = 'prepared.stream("train", recipe.run.seed)'
    assert replaced in (ROOT / "trainer/train/start.py").read_text() and replaced[:-1] in use


def test_metric() -> None:
    import router.load as module
    import trainer.telemetry.step_scalars as telemetry

    formula, test, field, filled = blocks("metric")
    names = run(formula, vars(module))
    run(f"{test}test_cold_experts()", names)
    declared = f"from dataclasses import dataclass\n@dataclass\nclass Wider:\n{textwrap.indent(field, '    ')}"
    (metric,) = (f.metadata["metric"] for f in telemetry.fields(run(declared, vars(telemetry))["Wider"]))
    assert metric.name == "unipool_cold_experts" and metric.needs_pool
    assert run(f"made = dict({filled})", {**names, "load_M": torch.tensor([9, 0, 9])})["made"] == {"cold_experts": 1}


@pytest.mark.parametrize("recompute", [False, True])
def test_expert_back_end(recompute: bool) -> None:
    (source,) = blocks("expert back end")
    kernels = run(source, {})
    draw, counts = torch.Generator().manual_seed(0), Counts.of([3, 0, 4])
    x_ND, dy_ND, w13_e2FD, w2_eDF = (torch.randn(*s, generator=draw) for s in ((7, 6), (7, 6), (3, 10, 6), (3, 6, 5)))
    results = []
    for forward, backward, add in (
        (loop_experts.forward, loop_experts.backward, loop_experts.add_weight_gradients),
        (kernels["forward"], kernels["backward"], kernels["add_weight_gradients"]),
    ):
        y_ND, hidden = forward(x_ND, w13_e2FD, w2_eDF, [counts])
        dx_ND, kept = backward(x_ND, None if recompute else hidden, dy_ND, w13_e2FD, w2_eDF, [counts])
        gradients = torch.zeros_like(w13_e2FD), torch.zeros_like(w2_eDF)
        add(*gradients, [(x_ND, dy_ND, kept, counts)], slice(0, 3))
        results.append((y_ND, dx_ND, *gradients))
    torch.testing.assert_close(*results)
