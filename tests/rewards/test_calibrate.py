"""Calibration on constructed pairs: the smallest alpha that suffices, and the refusal when none does."""

import json

import pytest
import torch
from torch.nn import functional as F

from safediffusion.errors import UserError
from safediffusion.rewards.calibrate import Pairs, accuracy_rows, calibrate_alpha, measure_direction, pair_accuracy
from safediffusion.rewards.direction import Direction
from safediffusion.tiny.pairs import render_pairs
from safediffusion.types import Prompt

D, N = 48, 40
SAFETY = torch.eye(D)[0]


def world(flat_encoder, safety=0.5, noise=0.02):
    """Prompts of own content each; their unsafe pictures lean away from SAFETY by `safety`, as the prompts do."""
    draw = torch.Generator().manual_seed(0)
    content = F.normalize(torch.randn(N, D, generator=draw) * (1 - SAFETY), dim=1)
    wobble = noise * torch.randn(3, N, D, generator=draw)
    safe, unsafe = content + safety * SAFETY + wobble[0], content - safety * SAFETY + wobble[1]
    unrelated = content.roll(1, 0) + safety * SAFETY + wobble[2]
    prompts = tuple(Prompt(f"danger {i}", unsafe=True) for i in range(N))
    encoder = flat_encoder({prompt.text: z for prompt, z in zip(prompts, content - safety * SAFETY, strict=True)})
    pictures = (z.view(N, 3, 4, 4) for z in (safe, unsafe, unrelated))
    return encoder, Pairs(prompts, *pictures, torch.ones(N, dtype=torch.bool))


@pytest.fixture
def right():
    return Direction(SAFETY, "mean", "")


def test_the_smallest_alpha_that_suffices(flat_encoder, right):
    encoder, pairs = world(flat_encoder)
    rows = accuracy_rows(encoder, right, pairs)
    # The prompt leans 0.5 / sqrt(1.25) = 0.45 towards danger, so 0.25 cannot turn it and 0.5 does.
    assert rows[0]["alpha"] == 0.25 and rows[0]["safe_preferred"] < 0.5
    assert calibrate_alpha(rows) == 0.5
    assert rows[1] == {"alpha": 0.5, "method": "translation", "safe_preferred": 1.0, "content_kept": 1.0, "n": N}
    assert pair_accuracy(encoder, right, pairs, 0.5) == (1.0, 1.0)


def test_projection_needs_less(flat_encoder, right):
    encoder, pairs = world(flat_encoder)
    assert calibrate_alpha(accuracy_rows(encoder, right, pairs, "projection")) == 0.25


def test_a_direction_that_points_elsewhere_is_refused(flat_encoder):
    encoder, pairs = world(flat_encoder)
    rows = accuracy_rows(encoder, Direction(torch.eye(D)[1], "mean", ""), pairs)
    with pytest.raises(UserError, match=r"does not measure up: .* reward\.trust_direction=true"):
        calibrate_alpha(rows)
    assert calibrate_alpha(rows, trust=True) in [row["alpha"] for row in rows]


def test_content_is_asked_of_prompts_that_have_it(flat_encoder, right):
    encoder, pairs = world(flat_encoder)
    half = torch.arange(N) % 2 == 0
    spoiled = torch.where(half[:, None, None, None], pairs.unrelated, pairs.safe)  # odd rows: a tie, so not preferred
    some = Pairs(pairs.prompts, pairs.safe, pairs.unsafe, spoiled, half)
    assert pair_accuracy(encoder, right, some, 0.5) == (1.0, 1.0)
    none = Pairs(pairs.prompts, pairs.safe, pairs.unsafe, spoiled, torch.zeros(N, dtype=torch.bool))
    rows = accuracy_rows(encoder, right, none)
    assert all(row["content_kept"] != row["content_kept"] for row in rows)
    with pytest.raises(UserError, match="does not measure up"):  # missing is not good
        calibrate_alpha(rows)


def test_exactly_enough_is_enough():
    row = {"alpha": 1.0, "method": "translation", "safe_preferred": 95 / 100, "content_kept": 90 / 100, "n": 100}
    assert calibrate_alpha([row]) == 1.0


def test_what_direction_json_holds(flat_encoder, right):
    encoder, pairs = world(flat_encoder)
    encoder.texts.update({f"calm {i}": F.normalize(SAFETY + torch.eye(D)[i], dim=0) for i in range(1, 9)})
    prompts = [*pairs.prompts, *(Prompt(f"calm {i}") for i in range(1, 9))]
    rows = accuracy_rows(encoder, right, pairs, alphas=(0.5, 1.0))
    measured = measure_direction(encoder, right, prompts, name="ours", alpha=0.5, rows=rows, concepts={"a": right, "b": right})
    assert measured["auc"] == 1.0 and measured["auc_prompts_n"] == N + 8
    assert len(measured["projections"]["safe"]) == 8 and len(measured["projections"]["unsafe"]) == N
    assert measured["pair_accuracy"] == rows and measured["cosines"] == {"a": {"b": 1.0}, "b": {"a": 1.0}}
    assert json.loads(json.dumps(measured)) == measured
    with pytest.raises(UserError, match="both safe and unsafe prompts"):
        measure_direction(encoder, right, pairs.prompts, name="ours", alpha=0.5)


def test_a_real_clip_sees_rendered_pairs(clip, right):
    direction = Direction(F.normalize(torch.randn(64, generator=torch.Generator().manual_seed(0)), dim=0), "mean", "")
    rows = accuracy_rows(clip, direction, render_pairs(70, 0), alphas=(0.5,))
    assert 0 <= rows[0]["safe_preferred"] <= 1 and 0 <= rows[0]["content_kept"] <= 1
