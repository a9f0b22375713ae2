"""Counts that a page or a file claims, and that no run has: nothing hangs or fills the memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.trainer.made_up import job, write_run
from tests.trainer.view.test_watch import pages, records_of, shown
from trainer.view.view import MOST_EXPERTS, Follower, View, recorded_view

MANY = 10**9
REFUSED = f"the load of the experts is not shown: there should be {MANY:,} of them, and {MOST_EXPERTS:,} are the most"


def seen(old: str, new: str) -> View:
    """A job of 16 experts, where one text on its pages is replaced."""
    texts = job(10, 16)
    changed = [text.replace(old, new) for text in texts]
    assert changed != texts
    return Follower().view(pages(changed))


@pytest.mark.parametrize(
    ("old", "new"), [('experts="16"', f'experts="{MANY}"'), ('expert="003"', f'expert="{MANY - 1}"')]
)
def test_experts_that_a_page_claims(old: str, new: str) -> None:
    view = seen(old, new)
    assert view.experts == () and view.notes == (REFUSED,)
    lines = shown(view, 200, 40)
    assert any(REFUSED in line for line in lines) and not any("load of the experts ─" in line for line in lines)
    assert view.scalars["step"] == 10 and view.roles["trunk"]


@pytest.mark.parametrize("label", ['experts="16"', 'expert="003"', 'trunk_ranks="2"', 'rank="1"'])
def test_labels_of_thousands_of_digits(label: str) -> None:
    """Python refuses to read such numbers; what they would say is left out."""
    view = seen(label, f'{label.partition("=")[0]}="{"9" * 5000}"')
    assert len(view.experts) == 16 and shown(view, 80, 24)


@pytest.mark.parametrize("number", ["NaN", "+Inf"])
def test_gpus_that_are_no_number(number: str) -> None:
    gauge = f'unipool_unused_gpus{{role="trunk",rank="0"}} {number}\n'
    view = Follower().view(pages([job(10, 16)[0] + gauge]))
    assert not view.notes


def test_experts_of_a_damaged_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 12)
    np.save(run / "load.npy", np.ones((1, MOST_EXPERTS + 1), dtype=np.int64))
    view = recorded_view(run, records_of(run), "ended", ["a note"])
    assert view.experts == () and view.notes[0] == "a note" and f"{MOST_EXPERTS + 1:,} of them" in view.notes[1]
    np.save(run / "load.npy", np.ones((1, MOST_EXPERTS), dtype=np.int64))
    view = recorded_view(run, records_of(run), "ended")
    assert len(view.experts) == MOST_EXPERTS and not view.notes and shown(view, 80, 24)
