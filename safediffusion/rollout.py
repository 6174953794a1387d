"""From prompts to pictures and scores: the policy walks the process, the reward looks at what it painted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from safediffusion import ranks
from safediffusion.errors import UserError
from safediffusion.types import Policy, Process, Prompt, Reward, Scores, mask

DRIFT = "drift"  # the part of the scores that a rollout against the base adds
_PIXELS_AT_ONCE = 8 * 512 * 512  # what `--batch-size auto` begins with, on each process
_MOST_AT_ONCE = 128


@dataclass(frozen=True)
class Walk:
    """One denoising trajectory of B images. `states[i]` is the latent before step i, `states[N]` the clean one, all float32.

    `log_probs[i]` (B,) is that of step i, summed over dimensions; NaN for a deterministic step. Unless the walk was asked
    to remember, `states` holds only the clean latent and `log_probs` nothing.
    """

    states: tuple[Tensor, ...]
    log_probs: tuple[Tensor, ...] = ()

    @property
    def clean(self) -> Tensor:
        return self.states[-1]


@dataclass(frozen=True)
class Rollout:
    """B = P x K painted pictures, the K pictures of a prompt next to each other.

    On several processes each has painted whole groups: `condition` and `walk` hold the M pictures of this one, prompts and
    scores are those of all. On one process M = B, and `mine` counts from 0.
    """

    prompts: tuple[Prompt, ...]
    condition: Tensor  # (M, L, D)
    walk: Walk
    scores: Scores
    group: int
    mine: Tensor  # (M,) long, CPU: which of the B pictures this process has painted
    forwards: float = 0.0  # denoiser forwards of one image that all of them took
    base: Tensor | None = None  # (M, C, h, w): what the base paints from the same noise, as clean latents; zeros for unsafe prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Tensor) -> Rollout:
        """The pictures at `index` (long, CPU) of the B; the same `index` on every process. Callers keep groups whole."""
        here = torch.full((len(self),), -1)
        here[self.mine] = torch.arange(len(self.mine))
        mine = (here[index] >= 0).nonzero().flatten()
        at = here[index][mine].to(self.walk.clean.device)
        return Rollout(
            prompts=tuple(self.prompts[i] for i in index.tolist()),
            condition=self.condition[at],
            walk=Walk(tuple(state[at] for state in self.walk.states), tuple(each[at] for each in self.walk.log_probs)),
            scores=self.scores[index.to(self.scores.total.device)],
            group=self.group,
            mine=mine,
            forwards=self.forwards,
            base=None if self.base is None else self.base[at],
        )


def chunks(count: int, size: int) -> list[slice]:
    """Slices of at most `size` covering `range(count)`; `size` 0 means one slice."""
    size = size or max(count, 1)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


@dataclass
class Capacity:
    """What a process paints at once, as far as is known: it falls where memory runs out, for whoever paints next."""

    pixels: int = _PIXELS_AT_ONCE


def painted(count: int, pixels: int, batch: int, paint: Callable[[list[int]], Tensor], capacity: Capacity | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Pictures that nobody trains on: some of the `count` at a time, and all of those `(n, ...)` on every process.

    `paint` paints those of this process by their numbers, `batch` at once; 0 begins with what most devices hold of pictures with so many
    `pixels`, and halves it where memory runs out on any process; `capacity` carries that from one call to the next. UserError where that is not enough.
    """
    capacity = capacity or Capacity()
    start, held = 0, batch or min(_MOST_AT_ONCE, max(1, capacity.pixels // pixels))
    while start < count:
        part, own = range(start, min(start + held * ranks.count(), count)), None
        mine = [part[i] for i in ranks.share(len(part))]
        with suppress(torch.OutOfMemoryError):
            own = paint(mine)
        if all(ranks.gathered(own is not None)) and own is not None:
            yield slice(part.start, part.stop), ranks.joined(own, len(part))
            start = part.stop
        elif len(mine) == 1:
            raise UserError("the device has no memory for one picture; free it, or paint a smaller one")
        elif batch:
            raise UserError(f"the device has no memory for {len(mine)} pictures at once; give a smaller --batch-size, or free it")
        else:
            held = len(mine) // 2
            capacity.pixels = held * pixels
            torch.cuda.empty_cache()  # only now: the exception held the frames, and the frames the tensors, that are to be freed


@torch.no_grad()
def walk(
    policy: Policy,
    process: Process,
    condition: Tensor,
    start: Tensor,
    guidance: float | Tensor,
    noises: Sequence[Tensor] = (),
    remember: bool = False,
    split: tuple[int, int] = (0, 1),
) -> Walk:
    """Denoise `start` (B, C, H, W) standard normal. `guidance` 1 is the conditional branch alone; a tensor (B,) is each image's own.

    `noises` are standard normal, one (B, C, H, W) for each stochastic step; a deterministic process has none.
    `split` = (n, K): `start` and `guidance` are of B / K images, `condition` and `noises` of B; after n steps each of the former
    becomes K alike ones.

    Latents stay float32 from step to step: rounding them after the log-probability was taken would start the ratio
    outside the clip range (docs/method.md section 4).
    """
    shared, copies = split
    x, before = start.float(), None
    states, log_probs = [x], []
    noise = dict(zip(process.stochastic_steps, noises, strict=True))
    for step, time in enumerate(process.times.tolist()):
        if step == shared and copies > 1:
            x, before, guidance = (each.repeat_interleave(copies, 0) if isinstance(each, Tensor) else each for each in (x, before, guidance))
            states, log_probs = ([each.repeat_interleave(copies, 0) for each in past] for past in (states, log_probs))
        told = condition[::copies] if step < shared else condition
        output = policy.predict(x, torch.full((len(x),), time, dtype=process.times.dtype, device=x.device), told, guidance if process.guides(step) else 1.0)
        if step in noise:
            kernel = process.kernel(output, x, step)
            x, before = kernel.sample(noise[step].to(x.device)), None
        else:
            x, before = process.advance(output, x, step, before)
        if remember:
            states.append(x)
            log_probs.append(kernel.log_prob(x) if step in noise else torch.full((len(x),), torch.nan, device=x.device))
    return Walk(tuple(states), tuple(log_probs)) if remember else Walk((x,))


@torch.no_grad()
def roll_out(
    policy: Policy,
    process: Process,
    reward: Reward,
    prompts: Sequence[Prompt],
    group: int,
    guidance: float | Tensor,
    generator: torch.Generator,
    remember: bool = False,
    batch: int = 0,
    share_prefix: bool = False,
    against_base: bool = False,
) -> Rollout:
    """Paint `group` pictures of each prompt, each from its own initial noise, and score them on exact pixels.

    `batch` bounds the images per forward (0: all at once). With `share_prefix` the pictures of a prompt start from one noise and
    go their own ways from the first stochastic step on: what comes before it is walked once. On several processes each
    paints its share of the groups, and the scores are joined; all must give the same arguments. With `against_base` the base
    paints the benign prompts as well, from the same noise, and the scores have a part "drift".
    """
    noisy = process.stochastic_steps
    shared, copies = (noisy[0], group) if share_prefix and noisy else (0, 1)
    groups = torch.tensor(ranks.share(len(prompts)), dtype=torch.long)
    own = (groups[:, None] * group + torch.arange(group)).flatten()
    condition = policy.encode([prompts[i].text for i in groups.tolist()]).repeat_interleave(group, 0)
    repeated = tuple(prompts[i] for i in groups.tolist() for _ in range(group))
    strength = torch.as_tensor(guidance, dtype=torch.float32).expand(len(prompts) * group)
    # Drawn on the CPU, and for all pictures before they are divided: neither device, `batch` nor processes change a picture.
    start = torch.randn((len(strength) // copies, *policy.sample_shape), generator=generator)[own[::copies] // copies]
    noises = [torch.randn((len(strength), *policy.sample_shape), generator=generator)[own] for _ in noisy]
    benign = torch.tensor([not prompt.unsafe for prompt in prompts]).repeat_interleave(group)
    guided, walks, scored, bases = strength[own], [], [], []
    for part in chunks(len(repeated), batch if copies == 1 else batch and max(batch // group, 1) * group):
        few = slice(part.start // copies, part.stop // copies)
        at = start[few].to(condition.device), guided[part][::copies], [noise[part] for noise in noises]
        walked = walk(policy, process, condition[part], *at, remember, (shared, copies))
        walks.append(walked)
        scores = reward(policy.sketch(walked.clean), repeated[part])
        if against_base:
            bases.append(_by_base(policy, process, condition[part], *at, (shared, copies), benign[own][part]))
            scores = with_drift(scores, walked.clean, bases[-1], repeated[part])
        scored.append(scores)
    held = ranks.held(len(prompts)) * group
    joined = Walk(
        tuple(torch.cat(each)[:held] for each in zip(*(w.states for w in walks), strict=True)),
        tuple(torch.cat(each)[:held] for each in zip(*(w.log_probs for w in walks), strict=True)),
    )
    everything = tuple(prompt for prompt in prompts for _ in range(group))
    forwards = _forwards(strength, process, shared, copies) + (_forwards(strength[benign], process, shared, copies) if against_base else 0)
    base = torch.cat(bases)[:held] if against_base else None
    return Rollout(everything, condition[:held], joined, _joined(_all(scored), group, len(prompts)), group, own[:held], forwards, base)


def with_drift(scores: Scores, clean: Tensor, base: Tensor, prompts: Sequence[Prompt]) -> Scores:
    """The scores with a part "drift": how far pictures of benign prompts lie from what the base paints from the same noise, `(B,)`, differentiable.

    The mean squared difference of the clean latents `clean` and `base` (B, C, h, w), whose numbers are about of variance 1: it needs neither decoder nor
    encoder. 0 for unsafe prompts. Raises UserError for a reward that has a part of that name.
    """
    if DRIFT in scores.parts:
        raise UserError(f'the reward has a part called "{DRIFT}", which is what a constraint calls the distance from the base; give it another name')
    far = (clean - base).float().square().flatten(1).mean(1).to(scores.total.device)
    return replace(scores, parts={**scores.parts, DRIFT: far * mask(prompts, "safe", far.device)})


def _by_base(
    policy: Policy, process: Process, condition: Any, start: Tensor, guidance: Tensor, noises: Sequence[Tensor], split: tuple[int, int], which: Tensor
) -> Tensor:
    """What the base paints of the pictures `which` (n,) bool, whole groups, as `walk` does; zeros in the place of the others."""
    clean, copies = torch.zeros((len(which), *start.shape[1:]), device=start.device), split[1]
    if which.any() or policy.sharded:
        here, few = which.nonzero().flatten().to(start.device), which[::copies]
        with policy.reference():
            clean[here] = walk(policy, process, condition[here], start[here[::copies] // copies], guidance[few], [noise[which] for noise in noises], split=split).clean
    return clean


def _forwards(strength: Tensor, process: Process, shared: int, copies: int) -> float:
    """Of one image, by pictures painted with these strengths of guidance, `(B,)`; `shared` steps are walked once for `copies` of them."""
    return sum(float((1 + (strength[:: copies if step < shared else 1] != 1) * process.guides(step)).sum()) for step in range(len(process.times)))


@torch.no_grad()
def sketch_shift(
    policy: Policy, process: Process, reward: Reward, prompts: Sequence[Prompt], group: int, guidance: float, generator: torch.Generator, batch: int = 0
) -> dict[str, float]:
    """What `sketch` does to the reward, against `decode`, on `group` pictures of each prompt, on this process alone.

    shift: mean change of the total; spread: its standard deviation; agreement: the correlation of the two totals less the mean of
    their group, which is what advantages are made of.
    """
    shown = tuple(prompt for prompt in prompts for _ in range(group))
    condition = policy.encode([prompt.text for prompt in shown])
    start, *noises = (torch.randn((len(shown), *policy.sample_shape), generator=generator) for _ in range(1 + len(process.stochastic_steps)))
    totals = []
    for part in chunks(len(shown), batch):
        clean = walk(policy, process, condition[part], start[part].to(condition.device), guidance, [noise[part] for noise in noises]).clean
        totals.append(torch.stack([reward(decode(clean), shown[part]).total for decode in (policy.sketch, policy.decode)]))
    total = torch.cat(totals, 1).double().cpu()
    change, within = total[0] - total[1], total.unflatten(1, (-1, group))
    agreement = torch.corrcoef((within - within.mean(2, keepdim=True)).flatten(1))[0, 1]
    return {"shift": change.mean().item(), "spread": change.std().item(), "agreement": agreement.item(), "pictures": len(shown)}


def _joined(scores: Scores, group: int, groups: int) -> Scores:
    """The scores of all groups, from those of the share of each process."""

    def whole(own: Tensor) -> Tensor:
        return ranks.joined(own.unflatten(0, (-1, group)), groups).flatten(0, 1)

    embedding = None if scores.embedding is None else whole(scores.embedding)
    return Scores(whole(scores.total), {name: whole(part) for name, part in scores.parts.items()}, embedding)


def _all(scored: Sequence[Scores]) -> Scores:
    parts = {name: torch.cat([scores.parts[name] for scores in scored]) for name in scored[0].parts}
    embeddings = [scores.embedding for scores in scored if scores.embedding is not None]
    return Scores(torch.cat([scores.total for scores in scored]), parts, torch.cat(embeddings) if embeddings else None)
