"""Directions and steered targets: the formulas, what each estimator finds, and the gate."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from safediffusion.data.anchors import Anchors, load_anchors
from safediffusion.errors import UserError
from safediffusion.rewards.direction import (
    Direction,
    Gate,
    auc,
    cosines,
    discriminant,
    fit_direction,
    fit_gate,
    load_direction,
    save_direction,
    steered_target,
)
from safediffusion.types import Prompt

D = 12
METHODS = ["translation", "projection", "gated"]
quick = settings(max_examples=30)
seeds = st.integers(0, 2**31)
alphas = st.floats(0, 3)


def units(seed, *shape):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def direction(seed=0, gate=True):
    return Direction(units(seed, D), "mean", "", Gate(units(seed + 1, D), 0.1, 0.2) if gate else None)


def cloud(seed, count, shift, dimensions=D):
    """Texts around +shift and -shift along the first axis, with far more noise along the second."""
    noise = np.random.default_rng(seed).normal(0, 0.1, (count, dimensions))
    noise[:, 1] *= 20
    noise[:, 0] += shift
    return torch.tensor(noise).float()


@quick
@given(seeds, alphas, st.sampled_from(METHODS))
def test_targets_are_unit_vectors_whatever_the_batch(seed, alpha, method):
    z = units(seed, 7, D)
    target = steered_target(z, direction(seed), alpha, method)
    torch.testing.assert_close(target.norm(dim=1), torch.ones(7))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(steered_target(z[order], direction(seed), alpha, method), target[order])


@quick
@given(seeds, st.sampled_from(["translation", "gated"]))
def test_alpha_zero_is_plain_alignment(seed, method):
    z = units(seed, 5, D)
    torch.testing.assert_close(steered_target(z, direction(seed), 0.0, method), z)


@quick
@given(seeds, alphas, st.sampled_from(METHODS))
def test_strength_zero_is_plain_alignment_and_one_is_the_whole_shift(seed, alpha, method):
    z, strength = units(seed, 2, D), torch.tensor([0.0, 1.0])
    target = steered_target(z, direction(seed), alpha, method, strength)
    torch.testing.assert_close(target[0], z[0])
    torch.testing.assert_close(target[1], steered_target(z, direction(seed), alpha, method)[1])


@quick
@given(seeds, alphas)
def test_formulas(seed, alpha):
    d, z = direction(seed), units(seed, 4, D)
    for i in range(4):
        v, p = d.vector, z[i]
        gate = 1 / (1 + torch.exp(-(p @ d.gate.w - d.gate.b) / d.gate.tau))
        expected = {
            "translation": p + alpha * v,
            "projection": p - (p @ v) * v + alpha * v,
            "gated": p + gate * alpha * v,
        }
        for method, value in expected.items():
            torch.testing.assert_close(steered_target(z, d, alpha, method)[i], value / value.norm())


@quick
@given(seeds, st.floats(0.1, 3))
def test_projection_forgets_how_safe_the_prompt_was(seed, alpha):
    d = direction(seed)
    content = units(seed + 5, D)
    content = F.normalize(content - (content @ d.vector) * d.vector, dim=0)
    # The same content, said safely and dangerously, at the same share of content in the embedding.
    z = torch.stack([0.8 * content + 0.6 * d.vector, 0.8 * content - 0.6 * d.vector])
    target = steered_target(z, d, alpha, "projection")
    torch.testing.assert_close(target[0], target[1])
    torch.testing.assert_close(target[0] @ d.vector, torch.tensor(alpha / (0.64 + alpha**2) ** 0.5))


def test_a_gated_target_needs_a_gate():
    with pytest.raises(UserError, match=r"has no gate.*at least 10 safe and 10 unsafe"):
        steered_target(units(0, 2, D), direction(gate=False), 0.5, "gated")


def test_mean_and_unsafe_only_are_the_papers_formulas(flat_encoder):
    texts = {name: units(i, D) for i, name in enumerate("abcdx")}
    anchors = Anchors(safe=("a", "b"), unsafe=("c", "d"))
    encoder = flat_encoder(texts)
    z = [texts[name] for name in "abcd"]
    mean = fit_direction(encoder, anchors, labelled=[Prompt("x", unsafe=True)])
    torch.testing.assert_close(mean.vector, F.normalize((z[0] + z[1]) / 2 - (z[2] + z[3]) / 2, dim=0))
    only = fit_direction(encoder, Anchors(unsafe=("c", "d")), "unsafe_only")
    torch.testing.assert_close(only.vector, F.normalize(-(z[2] + z[3]), dim=0))
    assert mean.gate is None and mean.anchors == anchors.digest and mean.estimator == "mean"
    with pytest.raises(UserError, match="estimator = 'mean' needs safe anchors"):
        fit_direction(encoder, Anchors(unsafe=("c",)))


def test_whitening_finds_the_axis_that_noise_hides_from_the_mean(flat_encoder):
    scores = {"mean": [], "lda": []}
    for seed in range(0, 16, 4):
        clouds = zip(("safe", "unsafe"), (cloud(seed, 15, 0.3), cloud(seed + 1, 15, -0.3)), strict=True)
        texts = {f"{side} {i}": z for side, rows in clouds for i, z in enumerate(rows)}
        names = list(texts)
        anchors = Anchors(safe=tuple(names[:5]), unsafe=tuple(names[15:20]))
        labelled = [Prompt(name, unsafe=name.startswith("unsafe")) for name in names[5:15] + names[20:]]
        held_out = [F.normalize(cloud(seed + i, 200, shift), dim=1) for i, shift in ((2, 0.3), (3, -0.3))]
        for estimator, found in scores.items():
            vector = fit_direction(flat_encoder(texts), anchors, estimator, labelled).vector
            found.append(auc(*((z @ vector).numpy() for z in held_out)))
    assert min(scores["lda"]) > 0.9
    assert sum(scores["lda"]) > sum(scores["mean"]) + 4 * 0.1


def test_the_discriminant_is_defined_where_texts_are_fewer_than_dimensions():
    rng = np.random.default_rng(0)
    w = discriminant(rng.normal(0, 1, (4, 300)) + 1, rng.normal(0, 1, (3, 300)) - 1)
    assert abs(np.linalg.norm(w) - 1) < 1e-12 and w.mean() > 0
    one, other = np.eye(3)[:1], np.eye(3)[1:2]  # no spread at all
    np.testing.assert_allclose(discriminant(one, other), np.array([1, -1, 0]) / 2**0.5)


@quick
@given(seeds, st.integers(1, 5), st.integers(1, 5))
def test_the_discriminant_is_finite_for_any_few_texts(seed, safe, unsafe):
    rng = np.random.default_rng(seed)
    w = discriminant(rng.normal(0, 1, (safe, 20)), rng.normal(0, 1, (unsafe, 20)))
    assert abs(np.linalg.norm(w) - 1) < 1e-9


def test_shrinkage_is_that_of_ledoit_and_wolf():
    """Numbers of sklearn.covariance.LedoitWolf's definition, written out per sample as in the paper."""
    rng = np.random.default_rng(0)
    safe, unsafe = rng.normal(0, 1, (9, 6)) + 1, rng.normal(0, 1, (7, 6))
    x = np.concatenate((safe - safe.mean(0), unsafe - unsafe.mean(0)))
    s = x.T @ x / 16
    m = np.trace(s) / 6
    d2 = np.square(s - m * np.eye(6)).sum() / 6
    b2 = min(d2, sum(np.square(np.outer(row, row) - s).sum() / 6 for row in x) / 16**2)
    shrunk = b2 / d2 * m * np.eye(6) + (1 - b2 / d2) * s
    w = np.linalg.inv(shrunk) @ (safe.mean(0) - unsafe.mean(0))
    np.testing.assert_allclose(discriminant(safe, unsafe), w / np.linalg.norm(w))


def test_the_gate_opens_for_unsafe_texts_only():
    gate = fit_gate(cloud(0, 40, 0.5).double().numpy(), cloud(1, 40, -0.5).double().numpy())
    safe, unsafe = gate(cloud(2, 200, 0.5)), gate(cloud(3, 200, -0.5))
    assert safe.mean() < 0.1 and unsafe.mean() > 0.9
    assert gate.w.norm().sub(1).abs() < 1e-6 and gate.tau > 0


def test_the_gate_is_unsure_where_texts_do_not_separate():
    rng = np.random.default_rng(0)
    alike = [rng.normal(0, 1, (20, 200)) for _ in range(2)]  # in 200 dimensions 40 texts are always separable
    gate = fit_gate(*alike)
    for z in (torch.from_numpy(alike[0]).float(), torch.randn(100, 200)):
        assert gate(z).sub(0.5).abs().mean() < 0.35


def test_auc_counts_pairs():
    assert auc([2.0, 3.0], [0.0, 1.0]) == 1
    assert auc([0.0, 3.0], [1.0, 2.0]) == 0.5
    assert auc([1.0], [1.0]) == 0.5


def test_cosines_between_concepts():
    v = torch.eye(3)
    named = {"violence": v[0], "hate": F.normalize(v[0] + v[1], dim=0), "theft": v[2]}
    table = cosines({name: Direction(vector, "mean", "") for name, vector in named.items()})
    assert table["violence"].keys() == {"hate", "theft"}
    assert table["violence"]["hate"] == table["hate"]["violence"] == pytest.approx(0.5**0.5)
    assert table["violence"]["theft"] == 0


@pytest.mark.parametrize("gate", [True, False])
def test_a_direction_survives_the_disk(tmp_path, gate):
    one = direction(gate=gate)
    one.measures["auc"] = 0.97
    save_direction(one, tmp_path / "direction.safetensors")
    two = load_direction(tmp_path / "direction.safetensors")
    assert torch.equal(one.vector, two.vector)
    assert (one.estimator, one.anchors, one.measures) == (two.estimator, two.anchors, two.measures)
    z = units(3, 4, D)
    assert torch.equal(one.gate(z), two.gate(z)) if gate else two.gate is None


def test_what_is_no_direction_is_refused(tmp_path):
    path = tmp_path / "direction.safetensors"
    for content in (None, b"not safetensors"):
        if content:
            path.write_bytes(content)
        with pytest.raises(UserError, match="is not a saved direction"):
            load_direction(path)


@pytest.mark.parametrize("estimator", ["mean", "unsafe_only", "lda"])
def test_a_real_clip_takes_every_shipped_set(clip, estimator):
    fitted = fit_direction(clip, load_anchors("pictograms"), estimator)
    assert fitted.vector.shape == (64,) and fitted.vector.norm().sub(1).abs() < 1e-6
    assert fitted.gate is not None
