"""Damaged profiles, plans and recorded loads end in one line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.fuzzing import JSON_TEXTS, changed, fuzz, json_values, user_error
from tests.training import tiny
from trainer.config.recipe import load_recipe
from trainer.planning.hardware import find_hardware, load_profile
from trainer.planning.report import make_cost_report
from trainer.planning.schedule import make_schedule, schedule_of
from trainer.planning.what_if import read_loads

HARDWARE = json.loads(json.dumps(find_hardware("h100").__dict__, default=vars))
PROFILE = {"hardware": HARDWARE, "figures": []}


@fuzz(60)
@given(st.randoms(use_true_random=False), json_values)
def test_hardware_profiles(tmp_path_factory: pytest.TempPathFactory, chosen: random.Random, value: Any) -> None:
    """A profile that passes predicts a step, or is refused with the recipe."""
    file = tmp_path_factory.getbasetemp() / "profile.json"
    file.write_text(json.dumps(changed(PROFILE, chosen, value)), encoding="utf-8", errors="surrogatepass")
    user_error(lambda: make_cost_report(load_recipe("quickstart", [f"parallel.hardware={json.dumps(str(file))}"])))
    user_error(lambda: find_hardware(str(file)))


@pytest.mark.parametrize("number", range(len(JSON_TEXTS)))
def test_texts_that_are_no_profile_and_no_plan(number: int, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(JSON_TEXTS[number].encode(errors="surrogatepass"))
    assert user_error(lambda: load_profile(file))
    assert schedule_of(tiny(), file, resume=True) == make_schedule(tiny()) and not file.exists()


def test_loads_that_promise_more_than_they_hold(tmp_path: Path) -> None:
    """A header of a terabyte, an empty file, a pickle, an archive."""
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (8, 12500000000), }".ljust(117) + b"\n"
    contents = {
        "huge": b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header,
        "empty": b"",
        "deep": b"\x93NUMPY\x01\x00" + (2000).to_bytes(2, "little") + b"(" * 2000,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "several.npz", a=np.ones(3))
    np.save(tmp_path / "text.npy", np.array(["a"]))
    np.save(tmp_path / "negative.npy", np.full((8, 64), -1))
    np.save(tmp_path / "floats.npy", np.full((8, 64), np.nan))
    for file in tmp_path.iterdir():
        text = user_error(lambda file=file: read_loads(file, load_recipe("quickstart")))
        assert text and text.startswith(f"--loads {file}: "), text
