"""Where memory goes: by hand, and that each setting for large models takes away what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from safediffusion.config import resolve
from safediffusion.cost.forwards import Forwards
from safediffusion.cost.room import Room, graphs, room
from safediffusion.cost.shapes import Shapes, measure_shapes
from safediffusion.policies.latent import PolicySettings, load_policy
from safediffusion.recipe import Recipe

COUNTS = Forwards(images=16, rollout=0, trained=0, reference=0)
SHAPES = Shapes(
    latent=100,
    parameters=0,
    trained=10**7,
    forward=0,
    backward=0,
    decode=0,
    weights=10**10,
    text=2 * 10**10,
    condition=10**6,
    base=0,
    activations=10**9,
    decoding=3 * 10**9,
    painting=7 * 10**9,
    gathered=10**9,
)
TABLE = {"model": "pictograms", "steps": 5, "reward": {"kind": "similarity", "encoder": "pictograms"}, "optimizer": {"batch": 4}}


def taken(**policy: object) -> Room:
    return room(resolve(Recipe, {**TABLE, "policy": policy}), COUNTS, SHAPES)


def test_what_lies_together_and_what_comes_before() -> None:
    kept, dropped, tiled = taken(), taken(text_encoders="drop"), taken(text_encoders="drop", vae_tile=512)
    assert kept.bytes == 1e10 + 2e10 + 12e7 + 4 * 3e9 + 16 * 4 * 100 + 5 * 16 * 1e6
    assert dropped.training == kept.bytes - 2e10
    assert (dropped.bytes, dropped.encoding) == (dropped.training, 2e10)
    assert tiled.training == dropped.training - 4 * 3e9 + 4 * 1e9  # the graph of four is now wider than the decoder of one
    assert tiled.bytes == 2e10
    assert [each.card for each in (kept, dropped, tiled)] == [48, 32, 24]
    assert taken(text_encoders="drop", train="full").learning == 3 * 4 * SHAPES.trained
    assert str(tiled) == "about 20 GB of memory without the reward: weights 10 GB, learning 0.1 GB, pictures 4.0 GB, prompts 0.1 GB; text encoders alone beforehand 20 GB"


def test_prompts_take_what_stays_of_them_or_what_the_run_can_draw() -> None:
    policies = ({}, {"text_encoders": "drop"}, {"text_encoders": "drop", "prompt_cache": 7}, {"prompt_cache": 0})
    taken = [room(resolve(Recipe, {**TABLE, "steps": 500, "policy": policy}), COUNTS, SHAPES).prompts for policy in policies]
    assert taken == [each * SHAPES.condition for each in (4096, 256, 7, 0)]
    assert room(resolve(Recipe, TABLE), COUNTS, SHAPES).prompts == 5 * 16 * SHAPES.condition


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_condition_is_as_large_as_one_that_is_encoded(tiny_pipeline: Path, dtype: str) -> None:
    settings = PolicySettings(dtype=dtype)
    assert measure_shapes(tiny_pipeline, settings).condition == load_policy(tiny_pipeline, settings).encode(["a cat"]).nbytes


def test_processes_that_hold_the_base_together_have_a_share_of_it_and_what_runs() -> None:
    recipe, shapes = resolve(Recipe, {**TABLE, "policy": {"shard": True}}), replace(SHAPES, base=8 * 10**9)
    alone, four = (room(recipe, COUNTS, shapes, processes) for processes in (1, 4))
    assert (alone.weights, four.weights) == (10e9, 10e9 - 6e9 + 1e9)
    assert room(resolve(Recipe, TABLE), COUNTS, shapes, 4) == alone


@pytest.mark.parametrize(
    ("algorithm", "guidance", "graph"),
    [
        ({"kind": "draft"}, 1.0, 7 + 1),
        ({"kind": "draft", "last": 3}, 1.0, 7 + 3),
        ({"kind": "draft", "last": 3}, 2.0, 7 + 3 * 2),
        ({"kind": "draft", "last": 3, "recompute": True}, 2.0, 7),
        ({"kind": "refl"}, 2.0, 7 + 2),
    ],
)
def test_a_gradient_of_the_reward_keeps_the_decoders_graph_beside_the_steps(algorithm: dict, guidance: float, graph: int) -> None:
    found = room(resolve(Recipe, {**TABLE, "algorithm": algorithm, "process": {"steps": 9, "guidance": guidance}}), COUNTS, SHAPES)
    assert found.pictures == 4 * graph * 10**9
    assert found.latents == 16 * 10 * 4 * 100  # of every step


@pytest.mark.parametrize("kind", ["grpo", "ddpo", "dpok", "d3po"])
def test_guidance_in_training_keeps_both_branches(kind: str) -> None:
    process = {"steps": 9, "guidance": 3.0, "eta": 1.0}
    pairs = {"pairs": "extremes"} if kind == "d3po" else {}  # two that are compared go into a batch of four
    algorithms = [{"kind": kind, "train_guidance": which, **pairs} for which in ("off", "stop", "both")]
    off, stop, both = (room(resolve(Recipe, {**TABLE, "algorithm": each, "process": process}), COUNTS, SHAPES).pictures for each in algorithms)
    assert (off, stop, both) == (4 * 3e9, 4 * 3e9, 4 * 3e9)  # the decoder is wider than one branch, and than two
    wide = replace(SHAPES, activations=2 * 10**9)
    off, stop, both = (room(resolve(Recipe, {**TABLE, "algorithm": each, "process": process}), COUNTS, wide).pictures for each in algorithms)
    assert (off, stop, both) == (4 * 3e9, 4 * 3e9, 4 * 4e9)
    alone = resolve(Recipe, {**TABLE, "algorithm": algorithms[2], "process": process | {"guidance": 1.0}})
    assert graphs(alone, 10.0, 0.0) == 10


@pytest.mark.parametrize("kind", ["dpo", "d3po"])
def test_pictures_that_are_compared_share_a_graph_however_small_the_batch(kind: str) -> None:
    def graphs_of(pairs: str, batch: int) -> float:
        algorithm = {"kind": kind, "prompts": 2, "group": 8, "pairs": pairs}
        recipe = resolve(Recipe, {**TABLE, "algorithm": algorithm, "process": {"eta": 1.0}, "optimizer": {"batch": batch}})
        return room(recipe, COUNTS, replace(SHAPES, activations=10**10)).pictures / 10**10

    assert [graphs_of("extremes", batch) for batch in (1, 5, 0)] == [2, 4, 16]
    assert [graphs_of("all", batch) for batch in (1, 15, 16, 99)] == [8, 8, 16, 16]


def test_both_branches_of_a_real_forward_are_two_graphs(tiny_pipeline: Path) -> None:
    policy, kept = load_policy(tiny_pipeline, PolicySettings()), {}
    weights = {weight.untyped_storage().data_ptr() for weight in policy.denoiser.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def held(guidance: float, stop: bool) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            policy.predict(torch.zeros(1, *policy.sample_shape), torch.tensor(500), policy.encode(["a cat"]), guidance, stop).sum()
        return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)

    one = held(1.0, False)
    recipe = resolve(Recipe, {**TABLE, "algorithm": {"kind": "grpo", "train_guidance": "both"}, "process": {"guidance": 3.0, "eta": 1.0}})
    assert held(3.0, True) == pytest.approx(one, rel=0.05)
    assert held(3.0, False) == pytest.approx(graphs(recipe, one, 0.0), rel=0.05)


def test_probes_hold_a_base_too() -> None:
    full, shapes = {**TABLE, "policy": {"train": "full"}}, replace(SHAPES, base=10**9)
    unknown = {"model": "someone/some-model", "data": {"safe": "benign.txt", "unsafe": "unsafe.txt"}}
    for tables, base in (({}, 10**9), ({"probe": {"every": 0}}, 0), (unknown, 0), ({"model": "someone/some-model"}, 10**9)):
        assert room(resolve(Recipe, full | tables), COUNTS, shapes).base == base
    assert room(resolve(Recipe, TABLE), COUNTS, shapes).base == 0  # adapters are switched off


def test_a_bound_on_the_drift_asks_for_a_base_and_keeps_its_latents() -> None:
    full, shapes = {**TABLE, "policy": {"train": "full"}, "probe": {"every": 0}}, replace(SHAPES, base=10**9)
    plain, bound = (room(resolve(Recipe, full | {"constraints": each}), COUNTS, shapes) for each in ([], [{"cost": "drift", "budget": 0.1}]))
    assert (plain.base, bound.base, bound.latents) == (0, 10**9, 2 * plain.latents)


def test_no_card_is_promised_for_what_is_too_large() -> None:
    assert Room(weights=1e12, encoders=0, learning=0, base=0, pictures=0, latents=0, prompts=0, encoding=0).card is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_keeps_what_goes_into_blocks_and_costs_a_forward(tiny_pipeline: Path, dtype: str) -> None:
    plain, saving = (measure_shapes(tiny_pipeline, PolicySettings(dtype=dtype, gradient_checkpointing=on)) for on in (False, True))
    assert saving.activations < 0.7 * plain.activations
    assert saving.backward == plain.backward + plain.forward
    assert saving.forward == plain.forward


def test_tiles_take_their_share_of_the_decoder(tiny_pipeline: Path) -> None:
    whole, tiles = (measure_shapes(tiny_pipeline, PolicySettings(image_size=128, vae_tile=tile)).decoding for tile in (None, 64))
    assert tiles == whole // 4
