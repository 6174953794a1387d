"""Advantages and the one optimizer step that every algorithm takes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safediffusion.algorithms.advantages import advantages, class_weights, reward_metrics, unlikeness
from safediffusion.algorithms.update import Learner
from safediffusion.errors import UserError
from safediffusion.types import Prompt, Scores

NO_CLIP = 1e9


@st.composite
def scored(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Scores of 1 to 4 groups of 2 to 8 pictures, some of them alike."""
    group, count = draw(st.integers(2, 8)), draw(st.integers(1, 4))
    values = st.floats(-10, 10, width=32) | st.sampled_from([0.0, 1.0])
    return torch.tensor(draw(st.lists(values, min_size=group * count, max_size=group * count))), group


@given(scored(), st.floats(0.001, 1))
def test_advantages_of_a_group_sum_to_zero(given: tuple[Tensor, int], floor: float) -> None:
    total, group = given
    value = advantages(total, group, floor, NO_CLIP, 1e-4).value.view(-1, group)
    torch.testing.assert_close(value.sum(1), torch.zeros(len(value)), atol=1e-3, rtol=0)


@given(scored(), st.floats(0.001, 1), st.floats(0.5, 5))
def test_advantages_keep_the_order_within_bounds(given: tuple[Tensor, int], floor: float, clip: float) -> None:
    total, group = given
    value, raw = advantages(total, group, floor, clip, 1e-4).value.view(-1, group), total.view(-1, group)
    assert value.abs().max() <= clip
    better = raw[:, :, None] > raw[:, None, :]
    assert (value[:, :, None] >= value[:, None, :])[better].all()
    spread = raw.std(1, correction=0)
    bound = (raw - raw.mean(1, keepdim=True)).abs() / floor  # the floor keeps small differences small
    assert (value.abs() <= bound + 1e-4).all()
    assert (value.square().mean(1).sqrt() <= spread / (spread + floor) + 1e-3).all()


@given(scored(), st.floats(-5, 5), st.integers(0, 100))
def test_advantages_see_neither_an_offset_nor_the_neighbours(given: tuple[Tensor, int], offset: float, seed: int) -> None:
    total, group = given
    plain = advantages(total, group, 0.1, 2.5, 1e-4).value
    torch.testing.assert_close(advantages(total + offset, group, 0.1, 2.5, 1e-4).value, plain, atol=2e-3, rtol=0)
    order = torch.randperm(len(total) // group, generator=torch.Generator().manual_seed(seed))
    moved = advantages(total.view(-1, group)[order].flatten(), group, 0.1, 2.5, 1e-4).value
    torch.testing.assert_close(moved.view(-1, group), plain.view(-1, group)[order], atol=1e-6, rtol=0)


def test_what_an_outlier_is_clipped_to() -> None:
    value = advantages(torch.tensor([1.0] + [0.0] * 15), 16, 0.0, 2.5, 1e-4).value
    assert value[0] == 2.5  # unclipped it would be sqrt(15)
    torch.testing.assert_close(value[1:], torch.full((15,), -(15**-0.5)))


def test_dead_groups_have_no_advantage_and_no_members() -> None:
    gain = advantages(torch.tensor([0.3, 0.3, 0.1, 0.9, 0.5, 0.50001]), 2, 1e-6, 2.5, 1e-4)
    assert gain.alive.tolist() == [False, True, False]
    assert gain.value[[0, 1, 4, 5]].tolist() == [0, 0, 0, 0]
    assert gain.members(2).tolist() == [2, 3]
    assert gain.dead_share == pytest.approx(2 / 3)


def test_scores_near_the_best_count_as_equal() -> None:
    gain = advantages(torch.tensor([0.70, 0.75, 0.5, 0.4, 0.6, 0.61, 0.55, 0.63]), 4, 0.01, 2.5, 1e-4, slack=0.1)
    assert gain.alive.tolist() == [True, False]  # all of the second group are near enough
    assert gain.value[0] == gain.value[1] > gain.value[2] > gain.value[3]
    assert gain.value[4:].tolist() == [0, 0, 0, 0]


def test_each_group_may_have_its_own_slack() -> None:
    gain = advantages(torch.tensor([0.70, 0.75, 0.70, 0.75]), 2, 0.01, 2.5, 1e-4, slack=torch.tensor([0.1, 0.0]))
    assert gain.alive.tolist() == [False, True]
    assert gain.value[:2].tolist() == [0, 0] and gain.value[2] < 0 < gain.value[3]


def test_the_odd_one_of_the_good_pictures_stands_out() -> None:
    angle = torch.tensor([0.0, 0.1, 0.1, 1.0, 3.0, 0.0, 0.5, 0.7, 0.8, 0.9])  # the last of the first group is the most unlike, and not good
    total = torch.tensor([0.7, 0.75, 0.72, 0.7, 0.3, 0.5, 0.5, 0.1, 0.1, 0.1])
    worth = unlikeness(Scores(total, {}, torch.stack([angle.cos(), angle.sin()], 1)), 5, 0.1).view(2, 5)
    assert worth[0].argmax() == 3 and worth[0, 4] == 0
    torch.testing.assert_close(worth[0].sum(), torch.tensor(0.0), atol=1e-6, rtol=0)
    distance = [torch.tensor([1 - math.cos(a - b) for j, b in enumerate((0.0, 0.1, 0.1, 1.0)) if j != i]).mean() for i, a in enumerate((0.0, 0.1, 0.1, 1.0))]
    torch.testing.assert_close(worth[0, :4], torch.stack(distance) - torch.stack(distance).mean())
    torch.testing.assert_close(worth[1], torch.zeros(5), atol=1e-6, rtol=0)  # two good ones are equally unlike each other


def test_unlikeness_asks_for_embeddings() -> None:
    with pytest.raises(UserError, match="algorithm.diversity needs the embeddings"):
        unlikeness(Scores(torch.zeros(4), {}), 4, 0.1)


def test_weights_go_by_the_class_of_the_prompt() -> None:
    torch.testing.assert_close(class_weights(torch.tensor([True, False, True]), 0.5, 0.1), torch.tensor([0.1, 0.5, 0.1]))


def test_rewards_are_reported_in_all_and_by_class() -> None:
    total, prompts = torch.tensor([1.0, 2.0, 3.0, 6.0]), [Prompt("a")] * 2 + [Prompt("b", unsafe=True)] * 2
    gain = advantages(total, 2, 0.1, 2.5, 1e-4)
    metrics = reward_metrics(prompts, Scores(total, {"part": total * 2}), gain)
    assert metrics == {"reward/total": 3.0, "reward/part": 6.0, "reward/total/benign": 1.5, "reward/total/unsafe": 4.5, "dead_groups": 0.0}
    assert "reward/total/unsafe" not in reward_metrics(prompts[:2], Scores(total[:2], {}), advantages(total[:2], 2, 0.1, 2.5, 1e-4))


# One optimizer step


def losses(learner: Learner, size: int) -> list[Callable[[], Tensor]]:
    """The mean of a loss over 8 latents, `size` at a time."""
    policy, draw = learner.policy, torch.Generator().manual_seed(3)
    x, time = torch.randn(8, *policy.sample_shape, generator=draw), torch.randint(1000, (8,), generator=draw)
    condition = policy.encode([f"a red cat {i}" for i in range(8)])
    parts = [slice(i, i + size) for i in range(0, 8, size)]
    return [lambda part=part: policy.predict(x[part], time[part], condition[part]).square().mean((1, 2, 3)).sum() / 8 for part in parts]


def test_one_batch_of_eight_is_eight_batches_of_one(make_learner: Callable[..., Learner], gradient: Callable, weights: Callable) -> None:
    whole, parts = make_learner(lr=0.1), make_learner(lr=0.1)
    before = weights(whole)
    norms = [learner.descend(loss() for loss in losses(learner, size)) for learner, size in ((whole, 8), (parts, 1))]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert (gradient(whole) - gradient(parts)).norm() < 1e-4 * gradient(whole).norm()
    assert (weights(whole) - weights(parts)).norm() < 1e-4 * (weights(whole) - before).norm()


def test_the_gradient_is_clipped_and_its_norm_before_clipping_reported(make_learner: Callable[..., Learner], gradient: Callable, weights: Callable) -> None:
    learner = make_learner(lr=0.1)
    before, free = weights(learner), learner.descend(loss() for loss in losses(learner, 8))
    assert free == pytest.approx(float(gradient(learner).norm()), rel=1e-4)
    bound = make_learner(lr=0.1)
    bound.max_grad_norm = free / 10
    assert bound.descend(loss() for loss in losses(bound, 8)) == pytest.approx(free, rel=1e-4)
    assert float(gradient(bound).norm()) == pytest.approx(free / 10, rel=1e-3)
    torch.testing.assert_close(weights(bound) - before, -0.1 * gradient(bound), atol=1e-6, rtol=1e-2)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(make_learner: Callable[..., Learner], gradient: Callable, weights: Callable, factor: float) -> None:
    learner = make_learner(lr=0.1)
    good, bad = losses(learner, 4)
    before = weights(learner)
    with pytest.raises(FloatingPointError, match="the gradient norm is"):
        learner.descend(iter([good(), bad() * factor]))
    assert torch.equal(weights(learner), before)
    learner.descend(iter([good(), bad()]))  # and nothing of it is left behind
    assert gradient(learner).isfinite().all()
    assert not torch.equal(weights(learner), before)
