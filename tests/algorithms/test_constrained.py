"""A constraint that weighs heavily leads every method where the cost alone, as a reward to be lowered, would have led it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from safediffusion.algorithms.d3po import D3po
from safediffusion.algorithms.ddpo import Ddpo
from safediffusion.algorithms.dpo import Dpo
from safediffusion.algorithms.dpok import Dpok
from safediffusion.algorithms.draft import Draft
from safediffusion.algorithms.forward import Forward
from safediffusion.algorithms.grpo import Grpo
from safediffusion.algorithms.kto import Kto
from safediffusion.algorithms.lagrangian import AugmentedLagrangian
from safediffusion.algorithms.objective import Constraint, Objective
from safediffusion.algorithms.raft import Raft
from safediffusion.algorithms.refl import Refl
from safediffusion.algorithms.rwr import Rwr
from safediffusion.algorithms.update import Learner
from safediffusion.types import Prompt, Scores

PROMPTS = (Prompt("a red cat"), Prompt("a knife", unsafe=True))
PLAIN: dict[str, Any] = {"prompts": 2, "group": 4, "benign_kl": 0.0, "unsafe_kl": 0.0}
METHODS = {
    "forward": Forward(**PLAIN),
    "grpo": Grpo(**PLAIN),
    "ddpo": Ddpo(**PLAIN),
    "dpok": Dpok(**PLAIN),
    "d3po": D3po(**PLAIN, pairs="all"),
    "rwr": Rwr(**PLAIN),
    "raft": Raft(**PLAIN),
    "dpo": Dpo(**PLAIN),
    "kto": Kto(**PLAIN),
    "draft": Draft(**PLAIN),
    "refl": Refl(**PLAIN),
}


class LessBlue:
    """The cost below as a reward, of which no floor takes anything off."""

    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        blue = images.mean((2, 3))[:, 2]
        return Scores(-100 * blue, {"blue": blue}, torch.nn.functional.normalize(images.flatten(1)))


@pytest.mark.parametrize("name", METHODS)
def test_a_heavy_cost_leads(make_learner: Callable[..., Learner], gradient: Callable[[Learner], Tensor], name: str) -> None:
    free, bound, cost = (make_learner() for _ in range(3))
    bound.objective = Objective(constraints=(Constraint(cost="blue", budget=-1.0, prompts="all"),), lagrangian=AugmentedLagrangian(rho=100.0))
    cost.reward = LessBlue()
    for learner in (free, bound, cost):
        METHODS[name].step(learner, PROMPTS, torch.Generator().manual_seed(4))
    towards, without = (torch.nn.functional.cosine_similarity(gradient(learner), gradient(cost), 0) for learner in (bound, free))
    assert towards > 0.9 > without, (towards, without)
