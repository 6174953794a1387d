"""A user's reward: taken as it is, and named when it errs."""

import pytest
import torch

from safediffusion.errors import UserError
from safediffusion.rewards.callable import CallableReward, load_callable
from safediffusion.types import Prompt, Scores

IMAGES, PROMPTS = torch.rand(3, 3, 4, 4), [Prompt("a"), Prompt("b"), Prompt("c")]


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def test_a_tensor_becomes_scores():
    scores = CallableReward(brightness, "brightness", differentiable=True)(IMAGES, PROMPTS)
    torch.testing.assert_close(scores.total, IMAGES.mean((1, 2, 3)))
    assert scores.parts.keys() == {"brightness"}


def test_scores_pass_through():
    given = Scores(torch.ones(3), {"one": torch.ones(3)})
    assert CallableReward(lambda images, prompts: given, "mine")(IMAGES, PROMPTS) is given


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda images, prompts: images.mean(), r"total of shape \(\); it must be \(3,\)"),
        (lambda images, prompts: torch.full((3,), float("inf")), "no finite total for 3 of 3 pictures"),
        (lambda images, prompts: Scores(torch.ones(3), {"x": torch.ones(2)}), r"gave x of shape \(2,\)"),
        (lambda images, prompts: [1.0, 2.0, 3.0], "gave a list"),
        (lambda images, prompts: torch.arange(3), r"gave total as a tensor of int64; it must be a tensor of floats, such as values\.float\(\)"),
        (lambda images, prompts: Scores(torch.ones(3), {"x": [1.0, 2.0, 3.0]}), "gave x as a list"),
        (lambda images, prompts: prompts[5], "failed: IndexError"),
    ],
)
def test_mistakes_name_the_reward(function, message):
    with pytest.raises(UserError, match=f"the reward 'mine' .*{message}|the reward 'mine' {message}"):
        CallableReward(function, "mine")(IMAGES, PROMPTS)


def test_the_users_exception_stays_in_the_chain():
    def fails(images, prompts):
        raise KeyError("weights")

    with pytest.raises(UserError) as raised:
        CallableReward(fails, "mine")(IMAGES, PROMPTS)
    assert isinstance(raised.value.__cause__, KeyError)


def test_functions_are_found_by_name():
    import os.path

    assert load_callable("os.path:join") is os.path.join


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(images, prompts) return 0", "importing own_reward failed .SyntaxError: .*mend the module"),
        ("scale = unheard_of", "importing own_reward failed .NameError: name 'unheard_of' is not defined.; mend the module"),
        ("import no_such_module", "importing own_reward failed .ModuleNotFoundError: No module named 'no_such_module'.; mend the module"),
        ("raise SystemExit(3)", "importing own_reward failed .SystemExit: 3.; mend the module"),
        ("open('no-such-file')", "'own_reward:f': importing own_reward failed .FileNotFoundError: "),
    ],
)
def test_a_module_that_fails_while_it_is_imported(tmp_path, monkeypatch, source, message):
    (tmp_path / "own_reward.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        load_callable("own_reward:f")
    assert "PYTHONPATH" not in str(raised.value)


def leaving(images, prompts):
    raise SystemExit("my own exit")


def test_a_function_that_ends_the_program_and_parts_of_taken_names():
    with pytest.raises(UserError, match="'mine' failed: SystemExit: my own exit"):
        CallableReward(leaving, "mine")(IMAGES, PROMPTS)
    for taken in ("total", "kl", "drift"):
        total = torch.zeros(len(IMAGES))
        with pytest.raises(UserError, match=f"'mine' gave a part '{taken}', which is what metrics and constraints call something else"):
            CallableReward(lambda images, prompts, part=taken, total=total: Scores(total, {part: total}), "mine")(IMAGES, PROMPTS)


def test_what_is_not_finite_is_the_functions_unless_the_pictures_are_not():
    mine = CallableReward(lambda images, prompts: images.mean((1, 2, 3)) / 0, "mine")
    with pytest.raises(UserError, match="'mine' gave no finite total for . of . pictures; mend the function"):
        mine(IMAGES, PROMPTS)
    with pytest.raises(UserError, match="the pictures hold NaN: lower the learning rate"):
        mine(IMAGES * float("nan"), PROMPTS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("brightness", "write module:attribute"),
        ("no_such_module:f", "cannot import no_such_module.*PYTHONPATH"),
        ("os.path:no_such_function", "os.path has no no_such_function"),
        ("os.path:sep", "is of the type str, and not a function"),
    ],
)
def test_names_that_lead_nowhere(name, message):
    with pytest.raises(UserError, match=message):
        load_callable(name)
