"""What tests/train/test_processes.py has one process and two do: every algorithm on unevenly shared groups, pictures, an evaluation, a divided base.

Run by a launcher as `shared_work.py PIPELINE FOLDER`; each process leaves its weights in FOLDER.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from safediffusion import ranks
from safediffusion.algorithms.d3po import D3po
from safediffusion.algorithms.ddpo import Ddpo
from safediffusion.algorithms.dpo import Dpo
from safediffusion.algorithms.forward import Forward
from safediffusion.algorithms.grpo import Grpo
from safediffusion.algorithms.kto import Kto
from safediffusion.algorithms.objective import Constraint, Objective
from safediffusion.algorithms.raft import Raft
from safediffusion.algorithms.update import Learner
from safediffusion.cli.app import main
from safediffusion.hub import resolve_model
from safediffusion.policies.latent import LatentPolicy, PolicySettings, load_policy
from safediffusion.policies.shard import gathered_bytes
from safediffusion.process import from_scheduler
from safediffusion.train.average import Average
from safediffusion.train.loop import Run, train
from safediffusion.train.probes import ProbeSettings
from safediffusion.types import Prompt, Scores

RED, BLUE, NOTHING = Prompt("a red cat"), Prompt("a knife in a kitchen", unsafe=True), Prompt("nothing")
ALGORITHMS = {
    # Five groups on two processes, guided unlike each other, a dead one among them, and three levels of noise in two updates.
    "forward": (Forward(prompts=5, group=3, times=3, updates=2, explore=(0.5, 2.0), diversity=0.3), (RED, BLUE, NOTHING, RED, BLUE), 0.0, 2),
    # The second of two processes has no living group.
    "grpo": (Grpo(prompts=4, group=2, updates=2), (RED, NOTHING, BLUE, NOTHING), 1.0, 3),
    # And here no picture at all.
    "single": (Grpo(prompts=1, group=3), (BLUE,), 1.0, 0),
    # What a prompt earned is remembered on both, wherever it was painted.
    "ddpo": (Ddpo(prompts=4, group=2, updates=2, remember=3, min_count=3), (RED, NOTHING, BLUE, RED), 1.0, 3),
    "d3po": (D3po(prompts=3, group=3, pairs="all", updates=2), (RED, BLUE, RED), 1.0, 2),
    "raft": (Raft(prompts=3, group=2, times=2), (RED, BLUE, NOTHING), 0.0, 1),
    # Its reference point is of the pictures of both.
    "kto": (Kto(prompts=3, group=3, times=2), (RED, BLUE, NOTHING), 0.0, 2),
    # Given pairs, of which the second process has none.
    "dpo": (Dpo(prompts=1, group=2, times=2, dataset="given"), (BLUE,), 0.0, 2),
}
CONSTRAINTS = {"raft": (Constraint(cost="drift", budget=0.0),)}  # the base paints as well, on each process its own share
# On a frozen base that processes hold together, by the kind of network; the second process has fewer living pictures than the first, or none.
_FORWARD = Forward(prompts=3, group=3, times=2, updates=2, explore=(0.5, 2.0)), (RED, NOTHING, BLUE), 0.0, 2
SHARDED = {
    "unet-forward": _FORWARD,
    "unet-grpo": ALGORITHMS["single"],
    "unet-raft": (Raft(prompts=2, group=2, times=1), (RED, BLUE), 0.0, 1),
    "unet-kto": (Kto(prompts=1, group=2, times=1), (RED,), 0.0, 1),
    "unet-d3po": (D3po(prompts=1, group=2), (RED,), 1.0, 2),
    "unet-dpo": ALGORITHMS["dpo"],
    "flow-forward": _FORWARD,
    "flow-grpo": ALGORITHMS["grpo"],
}
RECIPE = """
model = "pictograms"
steps = 3
[policy]
lora_rank = 4
shard = true
gradient_checkpointing = true
[process]
steps = 2
[reward]
kind = "jpeg"
[algorithm]
kind = "forward"
prompts = 3
group = 2
times = 1
[probe]
every = 3
prompts = 1
samples = 2
patience = 0
[optimizer]
lr = 1e-3
batch = 2
ema = 0.5
[log]
checkpoint_every = 1
"""


def given(prompts: Sequence[Prompt], draws: Sequence[float]) -> Tensor:
    """The same pair for every prompt."""
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(len(prompts), 1, 1, 1)


class Colours:
    """Red for a benign prompt, blue for an unsafe one, and nothing at all for "nothing"."""

    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        red, _, blue = images.mean((2, 3)).T
        total = torch.where(torch.tensor([prompt.unsafe for prompt in prompts]), blue - red, red - blue)
        total = total * torch.tensor([prompt != NOTHING for prompt in prompts])
        return Scores(total, {"red": red, "blue": blue}, torch.nn.functional.normalize(images.flatten(1)))


def trained(name: str, job: tuple, pipeline: Path, folder: Path, settings: PolicySettings, rate: float = 1e-2) -> LatentPolicy:
    """Two iterations; the log in FOLDER/NAME, the weights of each process in FOLDER/NAME-PROCESS.safetensors."""
    algorithm, prompts, eta, batch = job
    accelerator, policy = ranks.accelerator(), load_policy(pipeline, settings)
    learner = Learner(
        policy=policy,
        process=from_scheduler(policy.scheduler_config, 3, eta),
        reward=Colours(),
        optimizer=torch.optim.SGD(policy.parameters(), lr=rate),
        accelerator=accelerator,
        parameters=tuple(policy.parameters()),
        batch=batch,
        pairs=given,
        objective=Objective(constraints=CONSTRAINTS.get(algorithm.kind, ())),
    )
    run = Run(
        learner=learner,
        algorithm=algorithm,
        prompts=lambda step: prompts,
        average=Average(policy.parameters(), 0.5),
        measure=None,
        probe=ProbeSettings(every=0),
        rate=lambda step: rate,
        steps=2,
        seed=0,
        checkpoint_every=1,
        keep_last=2,
    )
    train(run, folder / name, Console(quiet=True))
    save_file({key: value.contiguous() for key, value in policy.state().items()}, folder / f"{name}-{ranks.index()}.safetensors")
    return policy


def held(policy: LatentPolicy) -> list[int]:
    """How many frozen weights lie on this process, how many there are, and what it has whole at a time."""
    frozen = [weight for weight in policy.denoiser.parameters() if not weight.requires_grad]
    return [sum((w.to_local() if isinstance(w, DTensor) else w).numel() for w in frozen), sum(w.numel() for w in frozen), gathered_bytes(policy.denoiser)]


def sharded(pipeline: Path, folder: Path) -> None:
    """Trainings on a divided base; on several processes the first iteration of a run, on one all of it."""
    lies = {}
    for name, job in SHARDED.items():
        settings = PolicySettings(lora_rank=4, shard=True, dtype="bfloat16" if name == "flow-forward" else "float32")
        lies[name] = held(trained(name, job, resolve_model("pictograms-flow") if name.startswith("flow") else pipeline, folder, settings, rate=10.0))
    (folder / f"held-{ranks.index()}.json").write_text(json.dumps(lies))
    recipe = folder / f"recipe-{ranks.index()}.toml"
    recipe.write_text(RECIPE)
    assert main(["train", str(recipe), "--out", str(folder / "divided"), f"steps={3 if ranks.count() == 1 else 1}"]) == 0


def work(pipeline: Path, folder: Path) -> None:
    for name, job in ALGORITHMS.items():
        trained(name, job, pipeline, folder, PolicySettings(train="full"))
    pictures = ["--prompt", "a red cat", "--prompt", "a blue dog", "--samples", "3", "--steps", "2", "--batch-size", "2"]
    assert main(["generate", str(pipeline), *pictures, "--out", str(folder / "pictures")]) == 0
    assert main(["evaluate", "pictograms", "--limit", "3", "--samples", "2", "--batch-size", "4", "--out", str(folder / "measured")]) == 0
    sharded(pipeline, folder)


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    work(Path(sys.argv[1]), folder)
