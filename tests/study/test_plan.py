"""A study file becomes runs, or one sentence that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from safediffusion.cost.forwards import forwards
from safediffusion.errors import UserError
from safediffusion.study.plan import Study, laid_over, read_study
from safediffusion.train.limit import Limit

REPOSITORY = Path(__file__).parents[2]
BASE = """
[base]
model = "pictograms"
reward = {kind = "similarity", encoder = "pictograms"}
optimizer = {lr = 1e-3, ema = 0.5}
algorithm = {kind = "forward", prompts = 4, group = 4}
"""
ENTRANT = '[[entrants]]\nname = "forward"\n'


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], Study]:
    def written(text: str) -> Study:
        (tmp_path / "study.toml").write_text(text)
        return read_study(tmp_path / "study.toml")

    return written


def test_tables_are_laid_over_each_other_and_another_kind_takes_their_place() -> None:
    base = {"algorithm": {"kind": "forward", "times": 2}, "optimizer": {"lr": 1.0, "ema": 0.5}, "model": "here"}
    merged = laid_over(base, {"optimizer": {"lr": 2.0}, "algorithm": {"times": 3}})
    assert merged == {"algorithm": {"kind": "forward", "times": 3}, "optimizer": {"lr": 2.0, "ema": 0.5}, "model": "here"}
    assert laid_over(base, {"algorithm": {"kind": "grpo"}})["algorithm"] == {"kind": "grpo"}


def test_every_seed_runs_every_entrant_for_the_nearest_number_of_iterations(read: Callable[[str], Study]) -> None:
    second = '[[entrants]]\nname = "grpo"\nlabel = "GRPO"\nrecipe = {algorithm = {kind = "grpo", prompts = 2}, process = {eta = 1.0}}\n'
    study = read("budget = {forwards = 5000}\nseeds = [3, 5]\nprobes = 3\n" + BASE + ENTRANT + second)
    assert [job.name for job in study.jobs] == ["forward-3", "grpo-3", "forward-5", "grpo-5"]
    assert [entrant.label for entrant in study.entrants] == ["forward", "GRPO"]
    for job in study.jobs:
        counted = forwards(job.recipe).counted
        assert abs(counted * job.recipe.steps - 5000) <= counted / 2
        assert job.recipe.seed == job.seed
        assert job.recipe.probe.count == 3
        assert job.recipe.optimizer.ema == 0.5


def test_seconds_end_the_runs_by_their_limit(read: Callable[[str], Study]) -> None:
    (job,) = read("budget = {seconds = 7}\nseeds = [0]\n" + BASE + ENTRANT).jobs
    assert job.recipe.limit == Limit(cpu_seconds=7)
    assert job.recipe.steps > 1000
    (job,) = read("budget = {wall = 7}\nseeds = [0]\n" + BASE + ENTRANT).jobs
    assert job.recipe.limit == Limit(wall_seconds=7)


def test_a_sweep_is_a_row_for_each_value(read: Callable[[str], Study]) -> None:
    sweep = '[[sweep]]\nname = "group"\nlabel = "group of"\nkey = "algorithm.group"\nvalues = [2, 8]\n'
    study = read("budget = {forwards = 5000}\n" + BASE + sweep)
    assert [(each.name, each.label, each.series, each.value, each.recipe.algorithm.group) for each in study.entrants] == [
        ("group-2", "group of, 2", "group", 2, 2),
        ("group-8", "group of, 8", "group", 8, 8),
    ]
    assert study.series == {"group": "group of"}


def test_a_sweep_of_a_switch(read: Callable[[str], Study]) -> None:
    study = read("budget = {forwards = 5000}\n" + BASE + '[[sweep]]\nname = "eager"\nkey = "policy.gradient_checkpointing"\nvalues = [true, false]\n')
    assert [(each.name, each.recipe.policy.gradient_checkpointing) for each in study.entrants] == [("eager-true", True), ("eager-false", False)]


def test_folders_of_a_sweep_over_paths_stay_in_the_studys(read: Callable[[str], Study]) -> None:
    study = read(
        "budget = {forwards = 5000}\nseeds = [0]\n" + BASE + '[[sweep]]\nname = "words"\nkey = "data.unsafe"\nvalues = ["../mine.txt", "pictograms/train-named"]\n'
    )
    assert [job.name for job in study.jobs] == ["words-..-mine.txt-0", "words-pictograms-train-named-0"]
    assert [job.recipe.data.unsafe for job in study.jobs] == ["../mine.txt", "pictograms/train-named"]
    assert study.entrants[0].label == "words, ../mine.txt"


def test_a_guide_alone_is_not_trained_and_has_one_seed(read: Callable[[str], Study]) -> None:
    rows = '[[entrants]]\nname = "sld"\nguide = {kind = "sld", level = "max"}\n'
    rows += '[[sweep]]\nname = "reward"\nguide = {kind = "reward"}\nkey = "guide.scale"\nvalues = [1, 4.5]\n'
    both = ENTRANT.replace("forward", "both") + 'recipe = {algorithm = {group = 2}}\nguide = {kind = "reward"}\n'
    study = read("budget = {forwards = 5000}\nseeds = [3, 5]\n" + BASE + both + rows)
    assert [job.name for job in study.jobs] == ["both-3", "sld-3", "reward-1-3", "reward-4.5-3", "both-5"]
    trained, sld, weak, strong = study.entrants
    assert (trained.recipe.algorithm.group, trained.guide.kind) == (2, "reward")
    assert (sld.recipe, sld.guide.level, weak.guide.scale, strong.guide.scale) == (None, "max", 1.0, 4.5)
    assert study.model == read(BASE + rows).model == "pictograms"  # without a training there is nothing to budget


def test_a_pinned_model_is_measured_as_it_is_trained(read: Callable[[str], Study]) -> None:
    pinned = BASE.replace('model = "pictograms"', 'model = "org/model"\nrevision = "v2"')
    assert read("budget = {forwards = 5000}\n" + pinned + ENTRANT).model == "org/model@v2"
    assert read(pinned + '[[entrants]]\nname = "sld"\nguide = {kind = "sld"}\n').model == "org/model@v2"


def test_a_file_takes_the_place_of_the_base(read: Callable[[str], Study], tmp_path: Path) -> None:
    (tmp_path / "theirs.toml").write_text('model = "pictograms"\nsteps = 9\nseed = 4\nreward = {kind = "similarity", encoder = "pictograms"}\noptimizer = {lr = 0.5}\n')
    study = read("budget = {forwards = 5000}\n" + BASE + ENTRANT + 'file = "theirs.toml"\nrecipe = {algorithm = {kind = "forward", group = 2}}\n')
    recipe = study.entrants[0].recipe
    assert (recipe.optimizer.lr, recipe.optimizer.ema, recipe.algorithm.group) == (0.5, 0.0, 2)


@pytest.mark.parametrize("name", ["methods", "budgets"])
def test_the_shipped_studies_can_be_run(name: str) -> None:
    study = read_study(REPOSITORY / "recipes" / "studies" / f"{name}.toml")
    for entrant in (each for each in study.entrants if each.recipe):
        assert forwards(entrant.recipe).counted * entrant.recipe.steps == pytest.approx(study.settings.budget.forwards, rel=0.1)


def test_the_shipped_study_of_methods_has_all_of_them() -> None:
    from safediffusion.methods import methods

    study = read_study(REPOSITORY / "recipes" / "studies" / "methods.toml")
    assert {entrant.recipe.algorithm.kind for entrant in study.entrants if entrant.recipe} == {method.kind for method in methods()}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BASE + ENTRANT, "budget takes one of forwards, seconds and wall"),
        ("budget = {}\n" + BASE + ENTRANT, "budget takes one of forwards, seconds and wall"),
        ("budget = {forwards = 10, seconds = 3}\n" + BASE + ENTRANT, "budget takes one of forwards, seconds and wall"),
        ("budget = {forwards = 300}\nprobes = 9\n" + BASE + ENTRANT, "9 probes are more than the 1 iterations"),
        ("budget = {forwards = 50}\n" + BASE + ENTRANT, "forward: one iteration takes 416 forwards, far more than budget.forwards = 50; raise it"),
        ("budget = {seconds = 3}\n" + BASE.rpartition("algorithm")[0] + ENTRANT, "forward: nothing says how it is trained; give recipe = "),
        ("budget = {forwards = 5000}\n" + BASE + ENTRANT + "guide = {}\n", "guide.kind is missing"),
        (BASE + '[[entrants]]\nname = "sld"\nguide = {kind = "sld", concept = ""}\n', "study.toml, sld: guide.concept is empty"),
        ("budget = {seconds = 3}\nseeds = [0.5]\n" + BASE + ENTRANT, "seeds.0 should be a whole number, but is 0.5"),
        ("budget = {seconds = 3}\nseeds = []\n" + BASE + ENTRANT, "seeds = [] is too short; it needs at least 1"),
        ("budget = {seconds = 3}\nprobes = 2\n" + BASE + ENTRANT, "nobody knows how many a budget of seconds has; set probe.every"),
        ("budget = {seconds = 3}\n" + BASE + ENTRANT + "recipe = {probe = {count = 3}}\n", "probe.count = 3 spreads probes over all steps"),
        ("budget = {forward = 10}\n" + BASE + ENTRANT, "did you mean budget.forwards?"),
        ("budget = {seconds = 3}\n" + BASE, "has no [[entrants]] and no [[sweep]]"),
        ("budget = {seconds = 3}\nseeds = [1, 1]\n" + BASE + ENTRANT, "a seed is named twice"),
        ("budget = {seconds = 3}\nseeds = [-1]\n" + BASE + ENTRANT, "seeds.0 = -1 is not allowed"),
        (
            "budget = {seconds = 3}\n" + BASE + '[[sweep]]\nname = "s"\nkey = "seed"\nvalues = [1, 2]\n',
            "s: seed is set by the study's budget and seeds, and cannot be swept",
        ),
        ("budget = {seconds = 3}\n" + BASE + '[[sweep]]\nname = "s"\nkey = "limit.forwards"\nvalues = [9]\n', "limit.forwards is set by the study's budget and seeds"),
        ("budget = {seconds = 3}\n" + BASE + "".join(f'[[sweep]]\nname = "s"\nkey = "optimizer.lr"\nvalues = [{at}]\n' for at in (1, 2)), "two sweeps are called s"),
        ("budget = {seconds = 3}\n" + BASE + ENTRANT + ENTRANT, "the name forward is given twice"),
        ("budget = {seconds = 3}\n" + BASE + ENTRANT.replace("forward", "base"), "base is the name of the untrained model's row"),
        ("budget = {seconds = 3}\n" + BASE + ENTRANT.replace("forward", "a/b"), "entrants.0.name"),
        ("budget = {seconds = 3}\n" + BASE + ENTRANT + "recipe = {steps = 3}\n", "steps of the recipe of forward is set by the study"),
        ("budget = {seconds = 3}\n" + BASE + ENTRANT + "recipe = {optimizer = {rl = 1.0}}\n", "optimizer.rl is not a setting"),
        (
            "budget = {seconds = 3}\n" + BASE + ENTRANT + 'recipe = {algorithm = {kind = "grpo"}}\n',
            "study.toml, forward: algorithm.kind = 'grpo' needs log-probabilities.*process.eta",
        ),
        ("budget = {seconds = 3}\n" + BASE + ENTRANT + '[[entrants]]\nname = "other"\nrecipe = {model = "elsewhere"}\n', "train different models"),
        (BASE + '[[entrants]]\nname = "sld"\nguide = {kind = "sld", levle = "max"}\n', "did you mean guide.level?"),
        (BASE + '[[sweep]]\nname = "sld"\nkey = "guide.scale"\nvalues = [1]\n', "guide.scale changes a guide, and there is none"),
        ('[[entrants]]\nname = "sld"\nguide = {kind = "sld"}\n', "base.model is missing"),
        ("budget = {seconds = 3}\n" + BASE + ENTRANT + 'file = "nowhere.toml"\n', "nowhere.toml does not exist"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_trained(read: Callable[[str], Study], text: str, words: str) -> None:
    with pytest.raises(UserError, match=words.replace("[", r"\[").replace("(", r"\(").replace("?", r"\?")):
        read(text)
