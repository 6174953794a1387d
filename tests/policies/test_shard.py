"""A base that processes hold together, as far as one process sees it; tests/train/test_processes.py has two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from safediffusion.config import resolve
from safediffusion.errors import UserError
from safediffusion.policies.latent import PolicySettings, load_policy
from safediffusion.policies.shard import check_shard, gathered_bytes, units
from safediffusion.recipe import Recipe, check

SHARDED = PolicySettings(lora_rank=4, shard=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"train": "full"}, '"full" freezes none'), ({"quantise": "int8"}, '"int8" packs them in few bits'), ({"compile": True}, "policy.compile sees no blocks")],
)
def test_what_cannot_be_divided_is_said(change: dict[str, Any], words: str) -> None:
    check_shard(SHARDED)
    with pytest.raises(UserError, match=words):
        check_shard(replace(SHARDED, **change))


def test_a_torch_that_knows_no_other_process_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    check_shard(replace(SHARDED, shard=False))
    with pytest.raises(UserError, match=r"policy.shard needs torch.distributed, which this torch was built without"):
        check_shard(SHARDED)


@pytest.mark.parametrize("kind", ["draft", "refl"])
def test_methods_that_go_back_through_the_reward_are_refused(kind: str) -> None:
    table = {"model": "pictograms", "steps": 1, "reward": {"kind": "similarity", "encoder": "pictograms"}, "policy": {"shard": True}}
    check(resolve(Recipe, table))
    with pytest.raises(UserError, match=f"algorithm.kind = '{kind}' follows"):
        check(resolve(Recipe, {**table, "algorithm": {"kind": kind}}))


def test_a_lone_process_holds_all_of_it(tiny_pipeline: Path) -> None:
    alone, plain = load_policy(tiny_pipeline, SHARDED), load_policy(tiny_pipeline, replace(SHARDED, shard=False))
    assert not alone.sharded
    x, time, condition = torch.randn(2, *alone.sample_shape, generator=torch.Generator().manual_seed(0)), torch.tensor(500), alone.encode(["a cat", "a dog"])
    assert torch.equal(alone.predict(x, time, condition, 3.0), plain.predict(x, time, condition, 3.0))


@pytest.mark.parametrize(("name", "blocks"), [("sd3", 2), ("flux-dev", 2), ("sdxl", 18)])
def test_blocks_are_fetched_by_themselves(folder_of: Callable[[str], Path], name: str, blocks: int) -> None:
    network: Any = load_policy(folder_of(name), replace(SHARDED, image_size=32)).denoiser
    found = units(network)
    assert len(found) == blocks + 1
    assert found[-1] is network
    frozen = {name: weight for name, weight in network.named_parameters() if not weight.requires_grad}
    if name != "sdxl":  # where blocks lie in no other block
        inside = [4 * sum(w.numel() for key, w in frozen.items() if key.startswith(f"{at}.")) for at, module in network.named_modules() if module in found[:-1]]
        outside = 4 * sum(weight.numel() for weight in frozen.values()) - sum(inside)
        assert gathered_bytes(network) == outside + 3 * max(inside)


def test_of_no_picture_the_network_runs_as_often_as_of_one(tiny_pipeline: Path) -> None:
    policy = load_policy(tiny_pipeline, SHARDED)
    calls = []
    policy.denoiser.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    x, condition = torch.randn(1, *policy.sample_shape), policy.encode(["a cat"])
    for guidance, stop in ((1.0, False), (3.0, False), (3.0, True)):
        ran = []
        for some in (slice(0, 1), slice(0, 0)):
            calls.clear()
            output = policy.predict(x[some], torch.tensor(500).expand(1)[some], condition[some], guidance, stop)
            ran.append(list(calls))
        assert ran[0] == ran[1]
        assert output.shape == x[:0].shape
    output.sum().backward()
    assert not any(weight.grad.any() for weight in policy.parameters())
