"""Forward-process RL against its formula (docs/method.md section 5), computed apart from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safediffusion.algorithms.advantages import advantages, unlikeness
from safediffusion.algorithms.forward import Forward, matching
from safediffusion.algorithms.update import Learner, holding
from safediffusion.rollout import Rollout, roll_out
from safediffusion.types import Prompt

PROMPTS = (Prompt("a red cat"), Prompt("a knife", unsafe=True))
PLAIN = {"prompts": 2, "group": 4, "times": 2, "benign_kl": 0.0, "unsafe_kl": 0.0, "floor": 1e-3}
Make = Callable[..., Learner]


@dataclass
class Witness:
    """A process that remembers what was noised."""

    inner: Any
    seen: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def noised(self, clean: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append((clean, noise, time))
        return self.inner.noised(clean, noise, time)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def stepped(learner: Learner, prompts: tuple[Prompt, ...] = PROMPTS, **options: Any) -> tuple[dict[str, float], Rollout, list[tuple[Tensor, Tensor, Tensor]]]:
    """A step: its metrics, what it painted, and what it noised."""
    rollout = roll_out(learner.policy, learner.process, learner.reward, prompts, 4, learner.guidance, seeded(), batch=learner.batch)
    process = learner.process
    learner.process = Witness(process)
    metrics = Forward(**(PLAIN | options)).step(learner, prompts, seeded())
    seen, learner.process = learner.process.seen, process
    return metrics, rollout, seen


def epsilon(learner: Learner, output: Tensor, x: Tensor, time: Tensor) -> Tensor:
    """The noise that an output claims, by hand: `(B, D)`."""
    abar = learner.process.schedule.alphas_cumprod[time].view(-1, 1, 1, 1)
    return (output if learner.process.prediction_type == "epsilon" else abar.sqrt() * output + (1 - abar).sqrt() * x).flatten(1)


def matched(learner: Learner, condition: Tensor, gain: Tensor, pull: Tensor, seen: list[tuple[Tensor, Tensor, Tensor]], anchor: float = 1.0) -> float:
    """Leaves the gradient of A |e^ - e|^2 + kappa |e^ - e_base|^2, means over dimensions, pictures and times; gives the mean KL."""
    learner.optimizer.zero_grad()
    total = 0.0
    for clean, noise, time in seen:
        abar = learner.process.schedule.alphas_cumprod[time].view(-1, 1, 1, 1)
        x = abar.sqrt() * clean + (1 - abar).sqrt() * noise
        said = epsilon(learner, learner.policy.predict(x, time, condition), x, time)
        with learner.policy.reference():
            base = epsilon(learner, learner.policy.predict(x, time, condition, anchor), x, time)
        kl = (said - base).square().mean(1)
        loss = gain * (said - noise.flatten(1)).square().mean(1) + pull * kl
        (loss.sum() / (len(clean) * len(seen))).backward()
        total += float(kl.detach().sum()) / (len(clean) * len(seen))
    return total


def close(one: Tensor, other: Tensor, tolerance: float = 1e-3) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_gradient_is_that_of_advantage_weighted_matching(make_learner: Make, gradient: Callable, prediction: str) -> None:
    learner = make_learner(eta=0.0, prediction=prediction)
    _, rollout, seen = stepped(learner)
    got = gradient(learner)
    gain = advantages(rollout.scores.total, 4, 1e-3, 2.5, 1e-4).value
    matched(learner, rollout.condition, gain, torch.zeros(8), seen)
    assert close(got, gradient(learner))
    assert got.norm() > 0


def test_unsafe_prompts_have_no_slack(make_learner: Make, gradient: Callable) -> None:
    learner = make_learner(eta=0.0)
    _, rollout, seen = stepped(learner, slack=10.0, least_spread=0.0)  # all benign pictures are near enough to the best
    got = gradient(learner)
    gain = advantages(rollout.scores.total, 4, 1e-3, 2.5, 0.0).value * torch.tensor([0.0, 1.0]).repeat_interleave(4)
    matched(learner, rollout.condition, gain, torch.zeros(8), seen)
    assert close(got, gradient(learner))
    assert got.norm() > 0


def test_an_odd_one_among_right_pictures_of_a_benign_prompt_gains(make_learner: Make, gradient: Callable) -> None:
    prompts = (Prompt("nothing"), Prompt("nothing", unsafe=True))  # all score alike: the bonus is the whole advantage
    learner = make_learner(eta=0.0)
    _, rollout, seen = stepped(learner, prompts, diversity=0.5, slack=0.1, least_spread=0.0)
    got = gradient(learner)
    bonus = 0.5 * unlikeness(rollout.scores, 4, 0.1) * torch.tensor([1.0, 0.0]).repeat_interleave(4)
    matched(learner, rollout.condition, bonus, torch.zeros(8), seen)
    assert close(got, gradient(learner))
    assert got.norm() > 0


def test_the_members_of_a_group_share_time_and_noise(make_learner: Make) -> None:
    _, rollout, seen = stepped(make_learner(eta=0.0), times=4, time_range=(0.02, 0.9))
    assert len(seen) == 4
    for turn, (clean, noise, time) in enumerate(sorted(seen, key=lambda each: int(each[2][0]))):
        assert torch.equal(clean, rollout.walk.clean)
        assert (noise[:4] == noise[0]).all() and (noise[4:] == noise[4]).all()
        assert (noise[0] != noise[4]).all()
        assert (time[:4] == time[0]).all() and (time[4:] == time[4]).all()
        low, high = (1000 * (0.02 + 0.88 * place / 4) for place in (turn, turn + 1))
        assert ((low - 1 <= time) & (time <= high)).all()  # stratified
    assert not torch.equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize("train", ["full", "lora"])
def test_the_kl_is_zero_at_the_start_and_then_pulls_back(make_learner: Make, train: str) -> None:
    strong = {"benign_kl": 1.0, "unsafe_kl": 1.0}
    assert stepped(make_learner(train=train, eta=0.0), **strong)[0]["kl"] == 0.0
    away = make_learner(train=train, eta=0.0, lr=1e-3, moved=0.02)
    away.max_grad_norm = 1.0
    distances = [stepped(away, benign_kl=1e4, unsafe_kl=1e4)[0]["kl"] for _ in range(2)]
    assert distances[0] > distances[1] > 0


@pytest.mark.parametrize("anchor", [1.0, 3.0])
def test_the_kl_pulls_each_class_by_its_own_weight(make_learner: Make, gradient: Callable, anchor: float) -> None:
    learner = make_learner(eta=0.0, moved=0.01)
    metrics, rollout, seen = stepped(learner, benign_kl=7.0, unsafe_kl=2.0, anchor_guidance=anchor)
    got = gradient(learner)
    gain = advantages(rollout.scores.total, 4, 1e-3, 2.5, 1e-4).value
    kl = matched(learner, rollout.condition, gain, torch.tensor([7.0] * 4 + [2.0] * 4), seen, anchor)
    assert metrics["kl"] == pytest.approx(kl, rel=1e-3)
    assert close(got, gradient(learner))


def test_micro_batches_do_not_change_the_step(make_learner: Make, gradient: Callable) -> None:
    strong = {"benign_kl": 0.5, "unsafe_kl": 0.1}
    whole, parts = make_learner(moved=0.01, guidance=3.0), make_learner(moved=0.01, guidance=3.0, batch=3)
    metrics = [stepped(learner, **strong)[0] for learner in (whole, parts)]
    assert close(gradient(parts), gradient(whole))
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3, abs=1e-6)
    assert whole.forwards == parts.forwards == 8 * 4 * 2 + 8 * 2 * (3 + 1)


def test_dead_groups_are_left_out(make_learner: Make, gradient: Callable) -> None:
    learner = make_learner(eta=0.0)
    metrics, rollout, seen = stepped(learner, (Prompt("nothing"), PROMPTS[1]))
    got = gradient(learner)
    assert metrics["dead_groups"] == 0.5
    assert [len(clean) for clean, _, _ in seen] == [4, 4]
    gain = advantages(rollout.scores.total, 4, 1e-3, 2.5, 1e-4).value[4:]
    matched(learner, rollout.condition[4:], gain, torch.zeros(4), seen)
    assert close(got, gradient(learner))


def test_nothing_moves_when_all_groups_are_dead(make_learner: Make, weights: Callable) -> None:
    learner = make_learner(eta=0.0, lr=1.0, moved=0.01)
    before = weights(learner)
    metrics, _, seen = stepped(learner, (Prompt("nothing"),), benign_kl=1.0)
    assert metrics["dead_groups"] == 1.0
    assert metrics["grad_norm"] == metrics["kl"] == metrics["loss"] == 0.0
    assert seen == []
    assert torch.equal(weights(learner), before)


def test_an_update_makes_better_pictures_easier_to_denoise(make_learner: Make) -> None:
    learner = make_learner(eta=0.0, lr=1e-2)
    learner.max_grad_norm = 1.0
    _, rollout, seen = stepped(learner)
    gain = advantages(rollout.scores.total, 4, 1e-3, 2.5, 1e-4).value

    def regret() -> float:
        return sum(
            float((gain * (epsilon(learner, learner.policy.predict(x, time, rollout.condition), x, time) - noise.flatten(1)).square().mean(1)).sum())
            for clean, noise, time in seen
            for x in [learner.process.noised(clean, noise, time)[0]]
        )

    with torch.no_grad():
        after = regret()
        with learner.policy.reference():
            assert after < regret()


def test_exploration_spreads_the_guidance_of_unsafe_prompts_alone(make_learner: Make) -> None:
    learner = make_learner(eta=0.0)
    metrics, _, seen = stepped(learner, explore=(0.5, 2.0), least_spread=0.0)
    guidance = torch.tensor([1.0] * 4 + [0.5, 1.0, 1.5, 2.0])
    expected = roll_out(learner.policy, learner.process, learner.reward, PROMPTS, 4, guidance, seeded())
    torch.testing.assert_close(seen[0][0], expected.walk.clean)
    plain = roll_out(learner.policy, learner.process, learner.reward, PROMPTS, 4, 1.0, seeded())
    moved = (expected.walk.clean - plain.walk.clean).flatten(1).abs().amax(1) > 1e-4
    assert moved.tolist() == [False] * 4 + [True, False, True, True]
    # Rollout: 4 steps of 8 pictures, 3 of them with an unconditional branch. Training: 2 times, forward and backward and base.
    assert learner.forwards == 4 * (8 + 3) + 2 * 8 * 4
    assert metrics["grad_norm"] > 0


def test_updates_share_out_the_times(make_learner: Make) -> None:
    learner, steps = make_learner(), []
    learner.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    _, _, seen = stepped(learner, times=4, updates=2, least_spread=0.0)
    low, high = Forward().time_range
    strata = sorted(int((float(time[0]) / 1000 - low) / (high - low) * 4) for _, _, time in seen)
    assert strata == [0, 1, 2, 3]
    assert len(steps) == 2


# The loss and its relatives

vectors = st.integers(0, 2**31).map(lambda seed: torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).unbind())


@given(vectors, st.floats(-2.5, 2.5))
def test_at_the_old_policy_the_gradient_is_that_of_weighted_matching(drawn: tuple[Tensor, ...], weight: float) -> None:
    said, wanted, _ = drawn
    said, gain = said.requires_grad_(), torch.full((5,), weight, dtype=torch.float64)
    (got,) = torch.autograd.grad(matching(said, said.detach(), wanted, gain, proximal=0.7).sum(), said)
    (expected,) = torch.autograd.grad((gain * (said - wanted).square().mean(1)).sum(), said)
    torch.testing.assert_close(got, expected)


@given(vectors, st.floats(0, 1), st.floats(0.05, 2))
def test_it_is_the_loss_of_diffusion_nft_up_to_a_constant(drawn: tuple[Tensor, ...], reward: float, beta: float) -> None:
    said, before, wanted = drawn
    gain = torch.full((5,), beta * (2 * reward - 1), dtype=torch.float64)

    def nft(said: Tensor) -> Tensor:
        positive, negative = (1 - beta) * before + beta * said, (1 + beta) * before - beta * said
        return reward * (positive - wanted).square().mean(1) + (1 - reward) * (negative - wanted).square().mean(1)

    ours = [matching(each, before, wanted, gain, beta**2) for each in (said, before)]
    torch.testing.assert_close(ours[0] - ours[1], nft(said) - nft(before))


@given(vectors, st.floats(0.02, 0.98))
def test_in_x0_it_is_the_same_with_the_weight_of_its_time(drawn: tuple[Tensor, ...], abar: float) -> None:
    """x = a x0 + s e holds x fixed, so an error of x0 is -s / a times that of epsilon."""
    said, before, wanted = drawn
    gain, ratio = torch.linspace(-2, 2, 5, dtype=torch.float64), (1 - abar) / abar
    x0 = [-(ratio**0.5) * each for each in (said, before, wanted)]
    torch.testing.assert_close(matching(*x0, gain, 0.3) / ratio, matching(said, before, wanted, gain, 0.3))


@pytest.mark.parametrize("old", ["rollout", "average"])
def test_the_proximal_term_holds_to_the_old_policy(make_learner: Make, weights: Callable, old: str) -> None:
    prompts, moved = (Prompt("nothing"), Prompt("nothing")), {}  # no advantage: the proximal term is all there is
    for proximal in (0.0, 4.0):
        learner = make_learner(eta=0.0, lr=0.05)
        start = [p.detach().clone() for p in learner.parameters]
        learner.averaged = lambda learner=learner, start=start: holding(learner.parameters, start)
        stepped(learner, PROMPTS, old=old, proximal=proximal, updates=2, least_spread=0.0)
        first = torch.cat([p.flatten() for p in start])
        moved[proximal] = float((weights(learner) - first).norm())
    assert 0 < moved[4.0] < moved[0.0]
    still = make_learner(eta=0.0, lr=0.05)
    still.averaged = lambda: holding(still.parameters, [p.detach().clone() for p in still.parameters])
    before = weights(still)
    stepped(still, prompts, old=old, proximal=1.0, least_spread=0.0)
    assert torch.equal(weights(still), before)


def test_an_old_policy_costs_one_forward_for_each_picture_and_time(make_learner: Make) -> None:
    counts = {}
    for old in ("now", "rollout"):
        learner = make_learner(eta=0.0)
        stepped(learner, old=old)
        counts[old] = learner.forwards
    assert counts["rollout"] - counts["now"] == 8 * 2
