"""The only place where names become objects: a recipe goes in, a run that can be trained comes out."""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from safediffusion import ranks
from safediffusion.algorithms.dpo import Dpo
from safediffusion.algorithms.objective import Objective, Weight
from safediffusion.algorithms.update import Learner
from safediffusion.data.anchors import load_anchors
from safediffusion.data.preferences import load_preferences, preference_texts, preferences_sha256
from safediffusion.data.prompts import prompts_sha256
from safediffusion.data.sampler import sampler_of
from safediffusion.data.screen import screen
from safediffusion.data.sets import load_set
from safediffusion.detection import check_guard, detector
from safediffusion.detectors.objects import ObjectDetector
from safediffusion.encoders.clip import ClipEncoder
from safediffusion.encoders.hps import load_hps
from safediffusion.errors import UserError
from safediffusion.evaluate import pictograms
from safediffusion.evaluate.statistics import Estimate
from safediffusion.hub import EMBEDDED, resolve_model, verify
from safediffusion.policies.latent import LatentPolicy, load_policy
from safediffusion.process import from_settings
from safediffusion.process.settings import ProcessSettings
from safediffusion.recipe import Recipe, check, is_probed
from safediffusion.rewards.calibrate import accuracy_rows, calibrate_alpha, measure_direction
from safediffusion.rewards.callable import CallableReward, CallableSettings, load_callable
from safediffusion.rewards.combined import CombinedReward, CombinedSettings, Member, Single, parts_of
from safediffusion.rewards.detection import DetectionReward, DetectionSettings, harmful
from safediffusion.rewards.direction import Direction, fit_direction
from safediffusion.rewards.jpeg import JpegReward, JpegSettings
from safediffusion.rewards.preference import PreferenceReward, PreferenceSettings
from safediffusion.rewards.similarity import SimilarityReward, SimilaritySettings
from safediffusion.rewards.steering import SteeringReward, SteeringSettings
from safediffusion.train.average import Average
from safediffusion.train.loop import Run
from safediffusion.train.optimizer import build_optimizer, rate
from safediffusion.train.probes import Measure
from safediffusion.types import Process, Prompt, Reward

PICTOGRAMS = "pictograms"
CALIBRATION_PAIRS = 400
# Below this AUC on held-out prompts a direction does not tell safe from unsafe well enough to train on.
LEAST_AUC = 0.7


def device(name: str | None) -> torch.device:
    """The device of that name; the best one of this machine where no name is given."""
    best = ranks.accelerator().device  # before anything else: under a launcher it finds the other processes
    if name is None:
        return best
    if ranks.count() > 1 and ":" in name:
        raise UserError(f"--device {name} names one device, and {ranks.count()} processes share this work; leave --device out")
    try:
        chosen = torch.device(name)
        torch.empty(0, device=chosen).cpu()  # "meta" has no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"the device {name!r} cannot be used: {str(error).splitlines()[0]}; leave --device out, or give cpu or cuda") from None
    return chosen


def encoder(name: str, device: str | torch.device, part: str = "reward") -> ClipEncoder:
    """`pictograms` is the embedded CLIP of that part (`reward` or `judge`); a .safetensors file is HPSv2.1; else a CLIPModel."""
    if name == PICTOGRAMS:
        return ClipEncoder.load(verify(EMBEDDED, part), device=device)
    if name.endswith(".safetensors"):
        return load_hps(name, Path(name).parent, device=device)  # its tokenizer lies beside it
    return ClipEncoder.load(name, device=device)


def encoder_identity(name: str) -> str:
    """Which weights an encoder has, for comparison; "" where they are not here."""
    try:
        return encoder(name, "cpu").identity
    except UserError:
        return ""


def judges(device: str | torch.device) -> pictograms.Judges:
    """The detector and the evaluation CLIP of the embedded world."""
    verify(EMBEDDED, "judge")
    detector = ObjectDetector.load(verify(EMBEDDED, "detector") / "model.safetensors").to(device)
    return pictograms.Judges(detector, encoder(PICTOGRAMS, device, "judge"))


def prompts(name: str, unsafe: bool) -> tuple[Prompt, ...]:
    """The screened prompts of a named set or file; refused ones are counted on stderr and never generated."""
    if not name:
        return ()
    screened = screen(load_set(name, unsafe), unsafe)
    if screened.refused:
        warnings.warn(f"{name}: {len(screened.refused)} of {len(screened.refused) + len(screened.kept)} prompts were refused by the prompt screen", stacklevel=2)
    if not screened.kept:
        raise UserError(f"{name}: the prompt screen refused all {len(screened.refused)} prompts, so nothing is left to work on")
    return screened.kept


def held_out(options: SteeringSettings) -> tuple[Prompt, ...]:
    """Labelled prompts of the embedded world that no direction is fitted on; empty for another encoder."""
    if options.encoder != PICTOGRAMS:
        return ()
    return tuple(p for name in pictograms.VALIDATION_SETS.values() for p in load_set(name))


def direction(options: SteeringSettings, judge: ClipEncoder, labelled: Sequence[Prompt], measured_on: Sequence[Prompt]) -> tuple[Direction, float, dict]:
    """Fit, measure and, for alpha = "auto", calibrate. Raises UserError for a direction that does not measure up."""
    fitted = fit_direction(judge, load_anchors(options.anchors), options.estimator, labelled)
    rows: list[dict] = []
    if options.encoder == PICTOGRAMS:
        from safediffusion.tiny.pairs import render_pairs

        rows = accuracy_rows(judge, fitted, render_pairs(CALIBRATION_PAIRS, seed=0), options.method)
    if options.alpha == "auto":
        if not rows:
            raise UserError('reward.alpha = "auto" needs pairs of pictures; run `safediffusion direction` with --pairs, or give a number such as 0.5')
        alpha = calibrate_alpha(rows, options.trust_direction)
    else:
        alpha = float(options.alpha)
    safe = [p.text for p in measured_on if not p.unsafe]
    unsafe = [p.text for p in measured_on if p.unsafe]
    if not safe or not unsafe:
        return fitted, alpha, {}
    measures = measure_direction(judge, fitted, measured_on, name=options.anchors, alpha=alpha, rows=rows)
    if measures["auc"] < LEAST_AUC and not options.trust_direction:
        raise UserError(
            f"the direction '{options.anchors}' does not separate safe from unsafe prompts: AUC {measures['auc']:.2f} on "
            f"{len(safe) + len(unsafe)} held-out prompts, {LEAST_AUC} needed; choose other anchors or estimator, or set reward.trust_direction = true"
        )
    return fitted, alpha, measures


def reward(options: Single | CombinedSettings, device: str | torch.device, safe: Sequence[Prompt], unsafe: Sequence[Prompt]) -> tuple[Reward, dict]:
    """The reward, and for a steering reward what `direction.json` holds."""
    if not isinstance(options, CombinedSettings):
        return single_reward(options, device, safe, unsafe)
    built = [(part, *single_reward(part.reward, device, safe, unsafe)) for part in options.parts]
    measures = next((found for *_, found in built if found), {})
    return CombinedReward(tuple(Member(part.name, scored, part.weight, part.prompts) for part, scored, _ in built)), measures


def single_reward(options: Single, device: str | torch.device, safe: Sequence[Prompt], unsafe: Sequence[Prompt]) -> tuple[Reward, dict]:
    """As `reward`, for one that is not combined."""
    if isinstance(options, CallableSettings):
        return CallableReward(load_callable(options.function), options.function, options.differentiable), {}
    if isinstance(options, JpegSettings):
        return JpegReward(options.aim), {}
    if isinstance(options, DetectionSettings):
        finder = detector(options.detector, device)
        logits = finder.forward if options.differentiable else None
        return DetectionReward(finder, harmful(finder, options), options.threshold, options.score, options.differentiable, logits), {}
    judge = encoder(options.encoder, device)
    if isinstance(options, SimilaritySettings):
        return SimilarityReward(judge), {}
    if isinstance(options, PreferenceSettings):
        return PreferenceReward(judge, float(judge.model.logit_scale.exp())), {}
    labelled, measured_on = (*safe, *unsafe), held_out(options)
    if not measured_on and (options.estimator == "lda" or "gated" in (options.method, options.steer)):
        labelled, measured_on = labelled[::2], labelled[1::2]  # fitted on one half of the training prompts, measured on the other
    elif not measured_on:
        labelled, measured_on = (), labelled  # fitted on the anchors alone, to which every prompt is new
    fitted, alpha, measures = direction(options, judge, labelled, measured_on)
    return SteeringReward(judge, fitted, alpha, options.method, options.steer), measures


def objective(recipe: Recipe) -> Objective:
    """What scores are worth: by the total or by parts of a combined reward that are normalised apart, and under which constraints."""
    options = recipe.reward
    apart = options.parts if isinstance(options, CombinedSettings) and options.normalise != "sum" else ()
    weights = {part.name: Weight(part.weight, part.prompts) for part in apart if part.weight}
    return Objective(weights, bool(apart) and options.normalise == "gdpo", recipe.constraints, recipe.lagrangian)


def process(policy: LatentPolicy, options: ProcessSettings) -> Process:
    """The denoising grid on the model's own noise schedule."""
    return from_settings(options, policy.folder, policy.scheduler_config, policy.tokens())


def run(recipe: Recipe, accelerator: Accelerator) -> tuple[Run, dict]:
    """Build all of a recipe. The second value is what `direction.json` holds."""
    check(recipe)
    device = accelerator.device
    dataset = _dataset(recipe)
    safe, unsafe = ((), ()) if dataset else (prompts(recipe.data.safe, False), prompts(recipe.data.unsafe, True))
    drawn: tuple[str, ...] = ()
    if recipe.policy.text_encoders == "drop":
        drawn = preference_texts(dataset) if dataset else sampler_of(recipe.data, safe, unsafe, recipe.algorithm.prompts, recipe.seed).texts(recipe.steps)
    policy = load_policy(resolve_model(recipe.model, recipe.revision), recipe.policy, device, drawn)
    pairs = load_preferences(dataset, lambda images: policy.encode_images(images.to(device)), policy.sample_shape) if dataset else None
    safe, unsafe = (pairs.prompts(False), pairs.prompts(True)) if pairs else (safe, unsafe)
    policy.encode.warn_of_long([prompt.text for prompt in (*safe, *unsafe)])
    sampler = sampler_of(recipe.data, safe, unsafe, recipe.algorithm.prompts, recipe.seed)
    check_guard(recipe.reward, policy.pixels)
    scored, measures = (None, {}) if dataset else reward(recipe.reward, device, safe, unsafe)
    optimizer = build_optimizer(policy.parameters(), recipe.optimizer)
    # Not wrapped by DDP: the learner sums gradients itself, and the rollout needs no hooks.
    policy.network = accelerator.prepare_model(policy.network, evaluation_mode=True)
    optimizer = accelerator.prepare_optimizer(optimizer)
    average = Average(policy.parameters(), recipe.optimizer.ema)
    learner = Learner(
        policy=policy,
        process=process(policy, recipe.process),
        reward=scored,
        optimizer=optimizer,
        accelerator=accelerator,
        parameters=tuple(policy.parameters()),
        guidance=recipe.process.guidance,
        batch=recipe.optimizer.batch,
        max_grad_norm=recipe.optimizer.max_grad_norm,
        averaged=average.applied,
        pairs=pairs,
        objective=objective(recipe),
    )
    return Run(
        learner=learner,
        algorithm=recipe.algorithm,
        prompts=sampler.at,
        average=average,
        measure=_probe(recipe, policy),
        probe=recipe.probe,
        rate=lambda step: rate(recipe.optimizer, step, recipe.steps),
        steps=recipe.steps,
        seed=recipe.seed,
        checkpoint_every=recipe.log.checkpoint_every,
        keep_last=recipe.log.keep_last,
        limit=recipe.limit,
    ), measures


def _probe(recipe: Recipe, policy: LatentPolicy) -> Measure | None:
    """Measures the policy as it stands on validation prompts, against the base on the same seeds."""
    options = recipe.probe
    if not options.every:
        return None
    if not is_probed(recipe):
        warnings.warn(
            "no detector reads pictures of these prompts, so nothing is probed: no early stop, and the last weights are the result; "
            "probe.every = 0 says so in the recipe",
            stacklevel=2,
        )
        return None
    grading = judges(policy.device)
    process = pictograms.sampler(policy)
    sets = {group: load_set(name)[: options.prompts] for group, name in pictograms.VALIDATION_SETS.items()}

    def painted() -> pictograms.Painted:
        images = {group: pictograms.paint(policy, process, chosen, options.samples, pictograms.GUIDANCE, options.seed) for group, chosen in sets.items()}
        return pictograms.Painted(sets, images, options.samples)

    base: list[tuple[pictograms.Painted, pictograms.Marks]] = []

    def measure() -> tuple[dict[str, Estimate], dict[str, Estimate]]:
        if not base:
            with policy.reference():
                first = painted()
            base.append((first, ranks.from_main(lambda: pictograms.mark(first, grading))))
        pictures, marks = base[0]
        shown = painted()
        now = ranks.from_main(lambda: pictograms.mark(shown, grading, pictures))
        return pictograms.estimates(now), pictograms.changes(marks, now)

    return measure


def identity(recipe: Recipe) -> dict:
    """What must be equal for two commands to be the same run."""
    facts = dataclasses.asdict(recipe)
    # Where weights lie, what is kept, what is made again and how much at once changes memory, and no result.
    for table, name in (("policy", "shard"), ("policy", "prompt_cache"), ("policy", "gradient_checkpointing"), ("optimizer", "batch")):
        del facts[table][name]
    facts |= {"prompts": {name: prompts_sha256(load_set(name)) for name in (recipe.data.safe, recipe.data.unsafe) if name}}
    if own := [name for part in parts_of(recipe.reward) if (name := str(getattr(part.reward, "anchors", ""))).endswith(".toml")]:
        facts |= {"anchors": {name: dataclasses.asdict(load_anchors(name)) for name in own}}  # a file of the user's, who may edit it between two sittings
    dataset = _dataset(recipe)
    return facts | {"pairs": preferences_sha256(dataset)} if dataset else facts


def _dataset(recipe: Recipe) -> str | None:
    return recipe.algorithm.dataset if isinstance(recipe.algorithm, Dpo) else None


def trackers(recipe: Recipe) -> list[str]:
    """The trackers asked for. Raises UserError when their package is missing."""
    for name in recipe.log.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"log.trackers names {name}, which is not installed; run: pip install {name}")
    return list(recipe.log.trackers)
