"""From prompts to pictures: what a picture depends on, and what is remembered of its way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from safediffusion.errors import UserError
from safediffusion.policies.latent import LatentPolicy, PolicySettings, load_policy
from safediffusion.process import from_scheduler
from safediffusion.rollout import Capacity, Rollout, chunks, painted, roll_out, walk
from safediffusion.types import Process, Prompt, Scores

PROMPTS = (Prompt("a red cat"), Prompt("a knife in a kitchen", unsafe=True), Prompt("a blue dog"))
GROUP, STEPS = 3, 4


class Redness:
    """Red where it is wanted; of each prompt something else, so that a mix-up of pictures and prompts shows."""

    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        red = images[:, 0].mean((1, 2))
        return Scores(red + torch.tensor([float(len(prompt.text)) for prompt in prompts]), {"red": red}, images.mean((2, 3)))


@pytest.fixture(scope="module")
def policy(tiny_pipeline: Path) -> LatentPolicy:
    return load_policy(tiny_pipeline, PolicySettings(train="full"))


@pytest.fixture(scope="module")
def process(policy: LatentPolicy) -> Process:
    return from_scheduler(policy.scheduler_config, STEPS, eta=1.0)


def rolled(policy: LatentPolicy, process: Process, *, guidance: float = 1.0, remember: bool = False, batch: int = 0) -> Rollout:
    return roll_out(policy, process, Redness(), PROMPTS, GROUP, guidance, torch.Generator().manual_seed(1), remember, batch)


@pytest.mark.parametrize(("eta", "guidance"), [(0.0, 3.0), (1.0, 1.0)])
def test_a_picture_does_not_depend_on_its_batch(policy: LatentPolicy, process: Process, eta: float, guidance: float) -> None:
    process = replace(process, eta=eta)
    whole = rolled(policy, process, guidance=guidance, remember=True)
    parts = rolled(policy, process, guidance=guidance, remember=True, batch=2)
    assert parts.prompts == whole.prompts
    for one, other in zip(whole.walk.states, parts.walk.states, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.scores.total, parts.scores.total, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.scores.parts, parts.scores.parts, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.scores.embedding, parts.scores.embedding, atol=1e-5, rtol=1e-5)


def test_log_probabilities_are_those_of_the_kernel_to_the_last_bit(policy: LatentPolicy, process: Process) -> None:
    rollout = rolled(policy, process, guidance=3.0, remember=True)
    assert len(rollout.walk.states) == STEPS + 1
    assert len(rollout.walk.log_probs) == STEPS
    for step in process.stochastic_steps:
        x, x_next = rollout.walk.states[step], rollout.walk.states[step + 1]
        with torch.no_grad():
            output = policy.predict(x, torch.full((len(x),), int(process.times[step])), rollout.condition, 3.0)
        assert torch.equal(process.kernel(output, x, step).log_prob(x_next), rollout.walk.log_probs[step])
        assert x_next.dtype == rollout.walk.log_probs[step].dtype == torch.float32


def test_the_last_step_is_deterministic(policy: LatentPolicy, process: Process) -> None:
    rollout = rolled(policy, process, remember=True)
    x = rollout.walk.states[-2]
    with torch.no_grad():
        output = policy.predict(x, torch.full((len(x),), int(process.times[-1])), rollout.condition)
    assert process.stochastic_steps == tuple(range(STEPS - 1))
    assert torch.equal(process.kernel(output, x, STEPS - 1).mean, rollout.walk.clean)
    assert rollout.walk.log_probs[-1].isnan().all()
    assert not torch.stack(rollout.walk.log_probs[:-1]).isnan().any()


def test_every_picture_starts_from_its_own_noise(policy: LatentPolicy, process: Process) -> None:
    starts = rolled(policy, process, remember=True).walk.states[0].flatten(1)
    assert torch.corrcoef(starts).fill_diagonal_(0).abs().max() < 0.5


def test_only_what_is_asked_for_is_remembered(policy: LatentPolicy, process: Process) -> None:
    forgetful, mindful = rolled(policy, process), rolled(policy, process, remember=True)
    assert len(forgetful.walk.states) == 1
    assert forgetful.walk.log_probs == ()
    assert torch.equal(forgetful.walk.clean, mindful.walk.clean)


def test_guidance_mixes_the_two_branches_in_every_step(policy: LatentPolicy, process: Process) -> None:
    process = replace(process, eta=0.0)
    condition = policy.encode([prompt.text for prompt in PROMPTS])
    start = torch.randn(3, *policy.sample_shape, generator=torch.Generator().manual_seed(2))
    x = start
    with torch.no_grad():
        for step, time in enumerate(process.times):
            conditional, empty = (policy.predict(x, time, c) for c in (condition, policy.encode([""] * 3)))
            x = process.kernel(empty + 2.5 * (conditional - empty), x, step).mean
    torch.testing.assert_close(walk(policy, process, condition, start, 2.5).clean, x, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(walk(policy, process, condition, start, 1.0).clean, x, atol=1e-3)


def test_a_walk_takes_one_noise_for_each_stochastic_step(policy: LatentPolicy, process: Process) -> None:
    start = torch.zeros(1, *policy.sample_shape)
    with pytest.raises(ValueError, match="zip"):
        walk(policy, process, policy.encode(["a"]), start, 1.0, [start])


def test_scores_follow_their_pictures(policy: LatentPolicy, process: Process) -> None:
    rollout = rolled(policy, process, remember=True)
    order = torch.tensor([6, 7, 8, 0, 1, 2, 3, 4, 5])
    moved = rollout[order]
    assert [prompt.text for prompt in moved.prompts[::GROUP]] == ["a blue dog", "a red cat", "a knife in a kitchen"]
    assert torch.equal(moved.scores.total, rollout.scores.total[order])
    with torch.no_grad():
        again = Redness()(policy.decode(moved.walk.clean), moved.prompts)
    torch.testing.assert_close(again.total, moved.scores.total)
    torch.testing.assert_close(again.embedding, moved.scores.embedding)
    torch.testing.assert_close(again.parts["red"], moved.scores.parts["red"])
    assert torch.equal(moved.condition, policy.encode([prompt.text for prompt in moved.prompts]))
    assert len(moved) == 9


@pytest.mark.parametrize(("count", "size", "lengths"), [(5, 2, [2, 2, 1]), (4, 0, [4]), (3, 8, [3]), (0, 0, []), (0, 3, [])])
def test_chunks_cover_everything_once(count: int, size: int, lengths: list[int]) -> None:
    parts = [list(range(count))[part] for part in chunks(count, size)]
    assert [len(part) for part in parts] == lengths
    assert [item for part in parts for item in part] == list(range(count))


def test_as_many_pictures_are_painted_at_once_as_fit() -> None:
    asked: list[list[int]] = []

    def paint(which: list[int]) -> torch.Tensor:
        asked.append(which)
        if len(which) > 3:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(which)} pictures")
        return torch.tensor(which)

    parts = list(painted(8, 1024 * 256, 0, paint))
    assert torch.equal(torch.cat([images for _, images in parts]), torch.arange(8))
    assert all(torch.equal(torch.arange(8)[part], images) for part, images in parts)
    assert [len(which) for which in asked] == [8, 4, 2, 2, 2, 2]  # 8 pictures of 512 pixels' side are what it begins with
    asked.clear()
    list(painted(200, 1, 3, paint))
    assert {len(which) for which in asked} == {3, 2}
    with pytest.raises(UserError, match="no memory for 4 pictures at once; give a smaller --batch-size, or free it"):
        list(painted(8, 1, 4, paint))
    with pytest.raises(UserError, match="no memory for one picture; free it"):
        list(painted(8, 2**30, 0, lambda which: paint([0, 1, 2, 3])))
    asked.clear()
    capacity = Capacity()
    for count, pixels in ((8, 1024 * 256), (4, 1024 * 256), (2, 1024 * 512)):
        list(painted(count, pixels, 0, paint, capacity))
    assert [len(which) for which in asked] == [8, 4, 2, 2, 2, 2, 2, 2, 1, 1]  # what did not fit is not tried again
