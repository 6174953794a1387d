"""The sampler: prompts are a function of (seed, step), each once per epoch, in the shares asked for."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safediffusion.data.sampler import PromptSampler, repeated
from safediffusion.errors import UserError
from safediffusion.types import Prompt

quick = settings(max_examples=50)


def prompts(count, unsafe):
    return tuple(Prompt(f"{'unsafe' if unsafe else 'safe'} {i}", unsafe) for i in range(count))


def sampler(safe=7, unsafe=5, share=0.5, per_step=4, seed=0):
    return PromptSampler(prompts(safe, False), prompts(unsafe, True), share, per_step, seed)


@quick
@given(st.integers(0, 500), st.integers(0, 9))
def test_a_step_does_not_depend_on_those_before_it(step, seed):
    used = sampler(seed=seed)
    for earlier in range(3):
        used.at(earlier)
    assert used.at(step) == sampler(seed=seed).at(step)


@quick
@given(st.integers(1, 9), st.integers(0, 9), st.floats(0, 1), st.integers(1, 6))
def test_every_prompt_is_visited_once_per_epoch(safe, unsafe, share, per_step):
    source = sampler(safe, unsafe, share, per_step)
    drawn = [prompt for step in range(30) for prompt in source.at(step)]
    for kind, size in ((False, safe), (True, unsafe)):
        visits = [prompt for prompt in drawn if prompt.unsafe == kind]
        for start in range(0, len(visits) - size + 1, max(size, 1)):
            assert len(set(visits[start : start + size])) == size


@quick
@given(st.floats(0, 1), st.integers(1, 9))
def test_the_share_holds_in_each_step_and_in_the_long_run(share, per_step):
    source = sampler(share=share, per_step=per_step)
    counts = [sum(prompt.unsafe for prompt in source.at(step)) for step in range(20)]
    assert all(len(source.at(step)) == per_step for step in range(20))
    assert all(abs(count - share * per_step) < 1.001 for count in counts)
    assert abs(sum(counts) - 20 * share * per_step) <= 1.001


def test_a_share_that_divides_evenly_is_exact():
    source = sampler(share=0.1, per_step=30)
    assert {sum(prompt.unsafe for prompt in source.at(step)) for step in range(50)} == {3}


def test_one_set_may_be_empty():
    assert all(prompt.unsafe for prompt in sampler(safe=0, share=0.2).at(3))
    assert not any(prompt.unsafe for prompt in sampler(unsafe=0, share=0.8).at(3))


def test_a_step_may_ask_for_more_than_there_is():
    assert Counter(sampler(safe=2, unsafe=0, per_step=6).at(0)) == dict.fromkeys(prompts(2, False), 3)


def test_the_order_changes_with_the_epoch_and_with_the_seed():
    epochs = [sampler(safe=20, unsafe=0, per_step=20).at(step) for step in range(3)]
    assert len(set(epochs)) == 3
    assert sampler(safe=20, unsafe=0, per_step=20, seed=1).at(0) != epochs[0]


@pytest.mark.parametrize(
    "wrong, sentence",
    [({"safe": 0, "unsafe": 0}, "no prompts"), ({"share": 1.1}, "unsafe_share"), ({"per_step": 0}, "at least 1")],
)
def test_the_impossible_is_refused_at_once(wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        sampler(**wrong)


def test_a_weak_task_is_visited_more_often():
    asked = (Prompt("a", task="single"), Prompt("a left of b", task="relation"), Prompt("c"))
    twice = repeated(asked, {"relation": 3})
    source = PromptSampler(twice, (), 0.0, len(twice), 0)
    assert Counter(prompt.text for prompt in source.at(0)) == {"a": 1, "a left of b": 3, "c": 1}
    assert repeated(asked, {}) == asked


def test_texts_are_all_that_the_steps_see() -> None:
    source = sampler(safe=7, unsafe=5, share=0.5, per_step=4)
    assert set(source.texts(2)) == {prompt.text for step in (0, 1) for prompt in source.at(step)}
    assert len(source.texts(2)) == 8
    assert len(source.texts(50)) == 12
    for share, steps in ((0.25, 3), (0.25, 6), (0.0, 9), (1.0, 1)):
        source = sampler(safe=7, unsafe=5, share=share, per_step=2)
        assert set(source.texts(steps)) == {prompt.text for step in range(steps) for prompt in source.at(step)}


def test_texts_of_a_run_without_end_are_there_at_once() -> None:
    assert len(sampler(safe=7, unsafe=5, share=0.0).texts(10**15)) == 7
