"""FID and KID against closed forms, the textbook's matrix root, explicit loops, and torch-fidelity's own arithmetic."""

import ast
import importlib
import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from safediffusion.errors import UserError
from safediffusion.evaluate.frechet import Moments, fid, fid_interval, frechet, kid, kid_reach, load_moments, merged, moments, save_moments


def sample(count, dimensions=12, seed=0, shift=0.0):
    """Correlated features, float32 as a network gives them, all positive as after a ReLU."""
    generator = np.random.default_rng([seed, count])
    mixing = np.random.default_rng(seed).normal(size=(dimensions, dimensions))
    return np.abs(generator.normal(size=(count, dimensions)) @ mixing + shift).astype(np.float32)


def textbook(a, b):
    a, b = (np.asarray(features, dtype=np.float64) for features in (a, b))
    root = sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root)


@pytest.fixture(scope="module")
def theirs(torch_fidelity):
    """torch-fidelity's functions of features. Its modules as a whole need torchvision, so the functions are taken out of their files."""
    helpers = importlib.import_module("torch_fidelity.helpers")
    names = {"np": np, "torch": torch, "tqdm": lambda steps, **options: steps}
    names |= {name: getattr(helpers, name) for name in ("get_kwarg", "vassert", "vprint")}
    for file in ("metric_fid.py", "metric_kid.py"):
        tree = ast.parse((Path(torch_fidelity.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.Assign)]
        exec(compile(tree, file, "exec"), names)
    return names


def test_fid_of_known_gaussians_is_the_closed_form():
    # Diagonal covariances commute: the distance is that of the means and of the standard deviations.
    mean, stds = np.array([1.0, -2.0, 0.5]), np.array([[1.0, 2.0, 0.0], [3.0, 2.0, 0.5]])
    a, b = Moments(None, np.zeros(3), np.diag(stds[0] ** 2)), Moments(None, mean, np.diag(stds[1] ** 2))
    assert frechet(a, b) == pytest.approx((mean**2).sum() + ((stds[0] - stds[1]) ** 2).sum(), abs=1e-12)


@pytest.mark.parametrize(("rows", "others", "dimensions"), [(300, 200, 12), (40, 30, 4), (6, 50, 3)])
def test_fid_is_the_textbook_formula(rows, others, dimensions):
    a, b = sample(rows, dimensions), sample(others, dimensions, seed=1, shift=0.3)
    assert fid(a, b) == pytest.approx(textbook(a, b), rel=1e-6)
    assert fid(a, b) == pytest.approx(fid(b, a), rel=1e-9)


def test_fewer_pictures_than_dimensions_are_no_trouble():
    features = sample(20, 64)
    assert fid(features, features) < 1e-4
    moved = features + np.float32(0.5)
    assert fid(features, moved) == pytest.approx(64 * 0.25, rel=1e-4)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(-1e4, 1e4))
@settings(max_examples=25)
def test_moments_of_parts_are_those_of_the_whole(sizes, offset):
    features = np.random.default_rng(sum(sizes)).normal(offset, 1, size=(sum(sizes) + 1, 5))
    edges = np.cumsum([0, *sizes, 1])
    whole = merged(moments(features[low:high]) for low, high in itertools.pairwise(edges))
    assert whole.count == len(features)
    np.testing.assert_allclose(whole.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(features, rowvar=False), atol=1e-8)


def test_many_pictures_are_taken_block_by_block():
    features = sample(2500, 6)
    np.testing.assert_allclose(moments(features).covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-10)
    assert moments(torch.from_numpy(features)).count == 2500


def test_a_reference_survives_the_disk(tmp_path):
    reference = moments(sample(50))
    save_moments(tmp_path / "reference.npz", reference)
    loaded = load_moments(tmp_path / "reference.npz")
    assert loaded.count == 50
    assert np.array_equal(loaded.mean, reference.mean) and np.array_equal(loaded.covariance, reference.covariance)


def test_a_reference_of_pytorch_fid_is_read(tmp_path):
    features = sample(50).astype(np.float64)
    np.savez_compressed(tmp_path / "theirs.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    loaded = load_moments(tmp_path / "theirs.npz")
    assert loaded.count is None
    assert frechet(moments(sample(60, seed=1)), loaded) == pytest.approx(textbook(sample(60, seed=1), features), rel=1e-6)
    with pytest.raises(ValueError, match="unknown number"):
        merged([loaded, loaded])


def test_files_that_are_no_reference_say_so(tmp_path):
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(tmp_path / "missing.npz", mu=np.zeros(2), sigma=np.full((2, 2), np.nan))
    np.savez(tmp_path / "names.npz", mean=np.zeros(3))
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("mu")
    for name in ("shapes.npz", "missing.npz", "names.npz", "pickled.npz", "array.npy", "text.npz"):
        with pytest.raises(UserError, match="is no FID reference"):
            load_moments(tmp_path / name)
    with pytest.raises(UserError, match="does not exist"):
        load_moments(tmp_path / "none.npz")


def test_what_cannot_be_compared_says_so():
    features = sample(10)
    with pytest.raises(UserError, match="at least 2 pictures"):
        fid(features[:1], features)
    with pytest.raises(UserError, match="dimensions do not compare"):
        fid(features, features[:, :3])
    with pytest.raises(UserError, match="NaN or infinity"):
        fid(np.where(features > 1, np.nan, features), features)
    with pytest.raises(ValueError, match="pictures, dimensions"):
        fid(features[0], features)
    with pytest.raises(UserError, match="needs pictures of at least 2 prompts"):
        fid_interval(features, moments(features), of_prompt=np.zeros(len(features)))
    with pytest.raises(UserError, match="lower the subset size or make more pictures"):
        kid(features, features)
    with pytest.raises(UserError, match="at least 2"):
        kid(features, features, subset_size=1)


@pytest.mark.parametrize(("per_prompt", "spread"), [(1, 0.0), (4, 1.0)])
def test_the_interval_covers_what_such_a_sample_gives_on_average(per_prompt, spread):
    """With pictures of one prompt alike, too: groups of whole prompts."""
    generator = np.random.default_rng(0)
    reference = Moments(None, np.zeros(6), np.eye(6))
    estimates = []
    for _ in range(150):
        prompts = np.repeat(generator.normal(0.4, spread, size=(160 // per_prompt, 6)), per_prompt, axis=0)
        estimates.append(fid_interval(prompts + generator.normal(size=(160, 6)), reference, np.arange(160) // per_prompt))
    average = np.mean([estimate.value for estimate in estimates])
    covered = np.mean([estimate.low <= average <= estimate.high for estimate in estimates])
    assert 0.90 <= covered <= 0.99
    assert all(estimate.n == 160 for estimate in estimates)


def test_kid_is_the_double_loop():
    a, b = (sample(9, 4, seed).astype(np.float64) for seed in (0, 1))

    def kernel(x, y):
        return (x @ y / 4 + 1) ** 3

    own = [np.mean([kernel(rows[i], rows[j]) for i in range(9) for j in range(9) if i != j]) for rows in (a, b)]
    across = np.mean([kernel(x, y) for x in a for y in b])
    mean, std = kid(a, b, subsets=2, subset_size=9)
    assert mean == pytest.approx(own[0] + own[1] - 2 * across)
    assert std == pytest.approx(0, abs=1e-12)


def test_kid_has_no_bias_and_its_subsets_depend_on_the_seed_alone():
    values = [kid(sample(60, 6), sample(61, 6), subsets=20, subset_size=50, seed=seed) for seed in (3, 3, 4)]
    assert values[0] == values[1] != values[2]
    generator = np.random.default_rng(0)
    alike = [kid(*generator.normal(size=(2, 30, 3)), subsets=1, subset_size=30)[0] for _ in range(400)]
    assert abs(np.mean(alike)) < 4 * np.std(alike) / 20


def test_fid_is_that_of_torch_fidelity(theirs):
    a, b = (torch.from_numpy(sample(rows, 64, seed)) for rows, seed in ((400, 0), (300, 1)))
    statistics = [theirs["fid_features_to_statistics"](features) for features in (a, b)]
    expected = theirs["fid_statistics_to_metric"](*statistics, False)["frechet_inception_distance"]
    assert fid(a, b) == pytest.approx(expected, rel=1e-5)


def test_kid_is_that_of_torch_fidelity(theirs):
    a, b = (torch.from_numpy(sample(rows, 64, seed)) for rows, seed in ((150, 0), (120, 1)))
    expected = theirs["kid_features_to_metric"](a, b, kid_subsets=10, kid_subset_size=100, rng_seed=7, verbose=False)
    mean, std = kid(a, b, subsets=10, subset_size=100, seed=7)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-3)


def test_the_reach_of_kid_is_the_jackknife_over_prompts():
    a, b = sample(24, 5, 0).astype(np.float64), sample(15, 5, 1).astype(np.float64)
    of_prompt = np.arange(24) // 3

    def distance(rows):
        within = np.mean([(x @ y / 5 + 1) ** 3 for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j])
        return within - 2 * np.mean([(x @ y / 5 + 1) ** 3 for x in rows for y in b])

    without = np.array([distance(a[of_prompt % 4 != group]) for group in range(4)])
    error = np.sqrt(3 * without.var())
    assert kid_reach(a, b, of_prompt, groups=4) == pytest.approx(error * 3.1824463, rel=1e-6)  # Student's quantile at three degrees of freedom


@pytest.mark.parametrize(("per_prompt", "spread"), [(1, 0.0), (4, 1.0)])
def test_the_interval_of_kid_covers_the_mean(per_prompt, spread):
    generator = np.random.default_rng(0)
    reference, found = generator.normal(size=(400, 6)), []
    for _ in range(120):
        prompts = np.repeat(generator.normal(0.2, spread, size=(160 // per_prompt, 6)), per_prompt, axis=0)
        rows = prompts + generator.normal(size=(160, 6))
        found.append((kid(rows, reference, subsets=1, subset_size=160)[0], kid_reach(rows, reference, np.arange(160) // per_prompt)))
    average = np.mean([value for value, _ in found])
    assert np.mean([abs(value - average) <= reach for value, reach in found]) >= 0.88
