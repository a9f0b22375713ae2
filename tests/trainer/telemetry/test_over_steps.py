"""What only several steps tell: durations, stragglers, spikes of the loss."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainer.telemetry.catalogue import STEP_SECONDS
from trainer.telemetry.over_steps import Spikes, Stragglers


def test_buckets_follow_each_other_closely() -> None:
    """So closely that a median that doubles changes its bucket, from the tiny recipes to the largest models."""
    ratios = np.array(STEP_SECONDS[1:]) / np.array(STEP_SECONDS[:-1])
    assert ratios.min() > 1.3 and ratios.max() <= 2
    assert (STEP_SECONDS[0], STEP_SECONDS[-1]) == (0.01, 700.0)


def test_spikes_of_a_loss() -> None:
    """A noisy loss that falls has none; each of three spikes counts; so does a loss that stays high, for a while."""
    noise = np.random.default_rng(0).standard_normal(3000)
    falling = 2 + 8 * np.exp(-np.arange(3000) / 300) + 0.03 * noise
    spikes = Spikes()
    assert not any(map(spikes.add, falling.tolist()))
    assert [spikes.add(loss) is not None for loss in (2.0, 5.0, 2.0, 9.0, math.nan, math.inf, 2.0, 2.5, 2.0)] == [
        *(False, True, False, True, False, False, False, True, False),
    ]
    stays = [spikes.add(4 + 0.03 * float(n)) is not None for n in noise[:200]]
    assert all(stays[:40]) and not any(stays[60:])


def test_a_spike_says_how_far_away_it_is() -> None:
    spikes = Spikes(deviations=3.0)
    for value in (1.0, 2.0, 3.0) * 8:
        spikes.add(value)
    found = spikes.add(9.0)
    assert found and (found.value, found.median) == (9.0, 2.0) and found.deviations == pytest.approx(7 / 1.4826)


def test_few_losses_tell_nothing_and_a_constant_one_may_move_a_little() -> None:
    spikes = Spikes()
    assert not any(spikes.add(loss) for loss in [1.0] * 19 + [50.0])
    assert [spikes.add(loss) is not None for loss in (1.01, 1.03)] == [False, True]


@pytest.mark.parametrize(("peers", "rank"), [(range(3), 1), (range(3, 7), 5), (range(3, 4), 3)])
def test_a_straggler_is_compared_with_the_median_of_its_role(peers: range, rank: int) -> None:
    """The median knows neither the other role nor how slow the slowest is."""
    seconds = [1.0] * 7
    seconds[rank] = 3.0
    others = Stragglers(peers, peers[0])
    own = Stragglers(peers, rank)
    for _ in range(3):
        score, other = own.add(seconds), others.add(seconds)
    alone = len(peers) == 1
    assert score == pytest.approx(1.0 if alone else 3.0)
    assert other == pytest.approx(1.0)


def test_a_score_follows_the_last_twenty_steps_or_so() -> None:
    stragglers = Stragglers(range(3), 0)
    assert stragglers.add([0.0] * 3) is None, "on a GPU nothing is known of the first step in time"
    for _ in range(100):
        score = stragglers.add([1.0, 1.0, 1.0])
    assert score == pytest.approx(1.0)
    scores = [stragglers.add([2.0, 1.0, 1.0]) for _ in range(100)]
    assert scores[0] is not None and 1.0 < scores[0] < 1.1
    assert scores[-1] == pytest.approx(2.0, rel=0.01)
