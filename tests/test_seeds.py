"""Randomness depends on what a thing is, not on what came before it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safediffusion.seeds import derive, generator, noise_for

quick = settings(max_examples=50)

parts = st.lists(st.integers() | st.text(), max_size=4)
ITEMS = [("a red circle", 0), ("a red circle", 1), ("a skull", 0), ("", -5)]


@quick
@given(parts, parts)
def test_different_parts_give_different_seeds_of_63_bits(first, second):
    assert 0 <= derive(*first) < 2**63
    assert (derive(*first) == derive(*second)) == (first == second)


def test_parts_keep_their_type_and_their_bounds():
    assert len({derive("a", 1), derive("a", "1"), derive("a1"), derive(1, "a"), derive("a", "", 1)}) == 5


def test_a_seed_is_the_same_in_another_interpreter_and_release():
    assert derive("rollout", 7, "é") == 5854548648041359503


def test_a_generator_starts_anew_each_time():
    first, again = (torch.randn(3, generator=generator("step", 4)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.randn(3, generator=generator("step", 5)))


@quick
@given(st.permutations(range(4)), st.integers(1, 4))
def test_noise_does_not_depend_on_the_batch(order, count):
    whole = noise_for(ITEMS, (3, 4, 4))
    some = noise_for([ITEMS[i] for i in order[:count]], (3, 4, 4))
    assert torch.equal(some, whole[list(order[:count])])


def test_noise_is_standard_normal_and_differs_by_text_and_by_seed():
    noise = noise_for(ITEMS, (4, 64, 64))
    assert noise.shape == (4, 4, 64, 64)
    assert noise.dtype == torch.float32
    flat = noise.flatten(1)
    assert flat.mean(1).abs().max() < 0.03
    assert (flat.std(1) - 1).abs().max() < 0.03
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.05


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    noise_for(ITEMS, (2, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_items_give_no_noise():
    assert noise_for([], (3, 2, 2)).shape == (0, 3, 2, 2)
