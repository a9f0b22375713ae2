"""Contract with DeepSpeed: replaced internals, the repeated schedule, and what monitors receive."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tests.distributed import join, run_ranks
from tests.training import tiny
from trainer.config.recipe import Recipe
from trainer.engine.ds_config import scheduled_rate
from trainer.model.trunk import Trunk

CLIP, TOTAL_NORM = 0.7, 40.0


def one_step(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """A skipped step, a step with a known gradient, and a save. The norm over both roles is not the role's own."""
    from trainer.engine.role_engine import RoleEngine, squared_norm

    job = join(recipe)
    module = nn.Linear(5, 3, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(-1, 1, 15).view(3, 5))
    engine = RoleEngine(module, recipe, "trunk", job.role_size)
    found: dict[str, Any] = {"norms": [], "applied": [], "weights": [], "files": []}
    for norm in (math.nan, TOTAL_NORM):
        with engine.accumulating():
            module(torch.arange(5.0)).sum().backward()
        found["norms"].append(squared_norm(float(engine.grad_norm())))
        found["applied"].append(engine.step(norm))
        found["weights"].append(whole(engine))
    found["lr"] = engine.learning_rate
    engine.save(folder, lambda path, state: found["files"].append(path.name))
    found["on disk"] = [str(path) for path in folder.rglob("*")]
    job.close()
    return found


def whole(engine: Any) -> Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([engine.module.weight], enabled=engine.stage == 3):
        return engine.module.weight.detach().clone()  # type: ignore[no-any-return]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_clips_by_the_given_norm(stage: int, tmp_path: Path) -> None:
    """By hand: AdamW's first step with clipped gradients. Its eps (1e-3) makes their scale visible."""
    recipe = tiny(parallel={"trunk_zero": stage})
    (found,) = run_ranks(1, one_step, recipe, tmp_path)
    gradient = torch.arange(5.0).expand(3, 5)
    assert found["norms"] == pytest.approx([float(gradient.square().sum())] * 2)
    assert found["applied"] == [False, True]
    t, before = recipe.train, torch.linspace(-1, 1, 15).view(3, 5)
    torch.testing.assert_close(found["weights"][0], before, rtol=0, atol=0)
    clipped = gradient * CLIP / TOTAL_NORM
    lr = scheduled_rate(recipe, 0)
    expected = before * (1 - lr * t.weight_decay) - lr * clipped / (clipped.abs() + t.eps)
    torch.testing.assert_close(found["weights"][1], expected, rtol=1e-5, atol=1e-6)
    assert found["lr"] == pytest.approx(scheduled_rate(recipe, 1))
    assert found["files"] and not found["on disk"], "whoever calls `save` writes the files"


def rates(recipe: Recipe) -> list[float]:
    """DeepSpeed's learning rate before every step and after the last."""
    from trainer.engine.role_engine import RoleEngine

    job = join(recipe)
    engine = RoleEngine(nn.Linear(2, 2), recipe, "trunk", job.role_size)
    found = [engine.learning_rate]
    for _ in range(recipe.train.steps):
        with engine.accumulating():
            engine.module(torch.ones(2)).sum().backward()
        engine.step(1.0)
        found.append(engine.learning_rate)
    job.close()
    return found


@pytest.mark.parametrize("schedule, warmup", [("cosine", 0.0), ("cosine", 0.4), ("linear", 0.4), ("wsd", 0.4)])
def test_a_frozen_role_knows_the_rate_of_the_other(schedule: str, warmup: float) -> None:
    recipe = tiny(train={"steps": 12, "warmup_fraction": warmup, "schedule": schedule, "decay_fraction": 0.5})
    (found,) = run_ranks(1, rates, recipe)
    assert found == pytest.approx([scheduled_rate(recipe, step) for step in range(13)], rel=1e-12)
    assert len(set(found)) > 5


@pytest.mark.parametrize(
    "schedule, shares",
    [
        ("linear", [1 - n / 8 for n in range(1, 9)]),
        ("wsd", [1, 1, 1, 1, *(1 - (n / 4) ** 0.5 for n in range(1, 5))]),
    ],
)
def test_the_rate_after_the_warm_up(schedule: str, shares: list[float]) -> None:
    """Two of ten steps warm up; with `wsd` four decay. The last step has the lowest rate, and so have later ones."""
    train = {"steps": 10, "warmup_fraction": 0.2, "lr": 3.0, "min_lr": 1.0, "decay_fraction": 0.4}
    recipe = tiny(train={**train, "schedule": schedule})
    found = [scheduled_rate(recipe, update) for update in range(12)]
    assert found == pytest.approx([1.5, 2.25, *(1 + 2 * share for share in shares), 1.0, 1.0])


def test_a_decay_must_leave_room_for_the_warm_up() -> None:
    with pytest.raises(ValueError, match=r"train.decay_fraction = 0.9: must be at most 1 - train.warmup_fraction"):
        tiny(train={"schedule": "wsd", "warmup_fraction": 0.2, "decay_fraction": 0.9})


def misaligned(recipe: Recipe) -> list[str]:
    from trainer.engine.role_engine import RoleEngine

    job = join(recipe)
    engine = RoleEngine(Trunk(recipe, torch.device("cpu")), recipe, "trunk", job.role_size)
    found = [name for name, weight in engine.module.named_parameters() if weight.data_ptr() % 16]
    job.close()
    return found


@pytest.mark.parametrize("stage", [1, 2])
def test_weights_stay_aligned(stage: int) -> None:
    """The trunk is compiled before ZeRO moves its weights, and the compiler then takes them to be aligned as before.

    On CUDA a kernel would fail at a norm's weight that follows the one number of a router's sigma.
    """
    recipe = tiny(router={"kind": "norm"}, parallel={"trunk_zero": stage})
    assert run_ranks(1, misaligned, recipe) == [[]]


def memory_of_a_gpu(visible: str) -> int:
    """What DeepSpeed takes for a GPU's free memory, where pynvml is installed."""
    from trainer.engine.role_engine import _import_deepspeed

    pynvml = SimpleNamespace(NVMLError=OSError, nvmlInit=lambda: None)
    properties = SimpleNamespace(total_memory=80)
    with (
        mock.patch.dict(sys.modules, {"pynvml": pynvml}),
        mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": visible}),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.cuda, "memory_allocated", return_value=30),
    ):
        from deepspeed.accelerator import cuda_accelerator

        accelerator = cuda_accelerator.CUDA_Accelerator()
        assert cuda_accelerator.pynvml is pynvml
        _import_deepspeed()
        return int(accelerator.available_memory(0))


def test_gpus_may_be_named_by_uuid() -> None:
    assert run_ranks(1, memory_of_a_gpu, "GPU-8f1b3a5e-7f0c-4f8e-9d53-0a4c4d1e2f30") == [50]


def norm_of_infinite_gradients(recipe: Recipe) -> float:
    from trainer.engine.role_engine import RoleEngine, squared_norm

    job = join(recipe)
    engine = RoleEngine(nn.Linear(5, 3, bias=False), recipe, "trunk", job.role_size)
    with engine.accumulating():
        engine.module(torch.full((5,), math.inf)).sum().backward()
    norm = squared_norm(float(engine.grad_norm()))
    job.close()
    return norm


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_norm_that_is_not_finite_is_infinite(stage: int) -> None:
    assert run_ranks(1, norm_of_infinite_gradients, tiny(parallel={"trunk_zero": stage})) == [math.inf]
