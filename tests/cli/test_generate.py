"""`safediffusion generate`: pictures that depend on prompt and seed alone, screened, resumable."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from rich.progress import Progress

from safediffusion.files import read_jsonl
from safediffusion.generation import Setting, generate
from safediffusion.hub import EMBEDDED
from safediffusion.policies.latent import LatentPolicy, PolicySettings
from safediffusion.policies.variant import Variant
from safediffusion.types import Prompt

FEW = ("--steps", 2)


def pictures(folder: Path) -> dict[tuple[str, int], bytes]:
    return {(row["prompt"], row["seed"]): (folder / row["file"]).read_bytes() for row in read_jsonl(folder / "manifest.jsonl")}


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)), dtype=int)


def test_a_picture_depends_on_its_prompt_and_seed_alone(command, tmp_path: Path) -> None:
    asked = ("--prompt", "a red circle", "--prompt", "two blue rings", "--samples", 2)
    assert command("generate", "pictograms", *asked, *FEW, "--out", tmp_path / "together").code == 0
    assert command("generate", "pictograms", "--prompt", "two blue rings", "--seed", 1, *FEW, "--batch-size", 1, "--out", tmp_path / "alone").code == 0
    together, alone = pictures(tmp_path / "together"), pictures(tmp_path / "alone")
    assert list(together) == [("a red circle", 0), ("a red circle", 1), ("two blue rings", 0), ("two blue rings", 1)]
    # Another batch size sums in another order: a grey level here and there, and never another picture.
    assert np.abs(pixels(alone[("two blue rings", 1)]) - pixels(together[("two blue rings", 1)])).max() <= 1


@dataclass(frozen=True)
class Cramped:
    """The model of a folder, on a device that holds `most` of its latents."""

    variant: Variant
    most: int

    @property
    def folder(self) -> Path:
        return self.variant.folder

    @property
    def description(self) -> dict[str, Any]:
        return self.variant.description

    def load(self, device: torch.device, settings: PolicySettings, texts: Sequence[str]) -> LatentPolicy:
        policy: Any = self.variant.load(device, settings, texts)
        predict = policy.predict

        def cramped(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
            if len(x) > self.most:
                raise torch.OutOfMemoryError(f"CUDA out of memory: {len(x)} pictures")
            return predict(x, *arguments)

        policy.predict = cramped
        return policy


def test_where_memory_runs_out_fewer_pictures_are_painted_at_once(tmp_path: Path) -> None:
    model, asked = Variant(EMBEDDED / "pipeline"), [Prompt("a red circle"), Prompt("two blue rings")]
    for most in (6, 2):
        options = {"setting": Setting(steps=2), "seed": 0, "samples": 3, "device": torch.device("cpu"), "progress": Progress(disable=True)}
        done = generate(cast("Variant", Cramped(model, most)), asked, tmp_path / str(most), **options)
        assert done.painted == 6
    roomy, cramped = (pictures(tmp_path / str(most)) for most in (6, 2))
    assert roomy.keys() == cramped.keys()
    assert all(np.abs(pixels(roomy[each]) - pixels(cramped[each])).max() <= 1 for each in roomy)


def test_what_is_there_is_not_painted_again(command, tmp_path: Path) -> None:
    asked = ("generate", "pictograms", "--prompt", "a red circle", *FEW, "--out", tmp_path)
    command(*asked)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "0 new, 1 there before" in command(*asked).out
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    next(tmp_path.glob("*.png")).unlink()
    assert "2 pictures: 2 new" in command(*asked, "--samples", 2).out
    assert len(read_jsonl(tmp_path / "manifest.jsonl")) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()}.items() >= {name: before[name] for name in before if name.endswith("png")}.items()


def test_text_encoders_that_are_dropped_paint_the_same(command, tmp_path: Path) -> None:
    asked = ("generate", "pictograms", "--prompt", "a red circle", "--prompt", "two blue rings", *FEW)
    assert command(*asked, "--text-encoders", "drop", "--out", tmp_path / "dropped").code == 0
    assert command(*asked, "--out", tmp_path / "kept").code == 0
    assert pictures(tmp_path / "dropped") == pictures(tmp_path / "kept")
    assert "0 new" in command(*asked, "--out", tmp_path / "dropped").out


def test_weights_in_few_bits_paint_pictures_of_their_own(command, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    asked = ("generate", "pictograms", "--prompt", "a red circle", *FEW, "--out", tmp_path)
    exact, few = (command(*asked, "--quantise", kind) for kind in ("none", "int8"))
    assert exact.code == few.code == 0 and "1 new, 0 there" in few.out
    one, other = (pixels((tmp_path / row["file"]).read_bytes()) for row in read_jsonl(tmp_path / "manifest.jsonl"))
    assert 0 < np.abs(one - other).mean() < 5
    assert [row.get("quantise") for row in read_jsonl(tmp_path / "manifest.jsonl")] == [None, "int8"]


def test_a_run_folder_and_a_prompt_file(command, run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red circle"}\n{"text": "a skull", "unsafe": true}\n')
    assert command("generate", run, "--prompts", tmp_path / "prompts.jsonl", *FEW, "--out", tmp_path / "out").code == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_screened_and_long_prompts_are_counted(command, tmp_path: Path) -> None:
    long = "a red circle" + " and a red circle" * 20
    ended = command("generate", "pictograms", "--prompt", long, "--prompt", "a child with a knife, explicit", *FEW, "--out", tmp_path)
    assert ended.code == 0
    assert "1 of 2 prompts were refused" in ended.out
    assert "warning: 1 of 1 prompts have more than 24 tokens" in ended.err
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_nothing_is_painted_when_every_prompt_is_refused(command, tmp_path: Path) -> None:
    command("generate", "pictograms", "--prompt", "explicit picture of a child", "--out", tmp_path / "out").refused("refused all 1 prompts")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("nothing to paint", "--prompt")),
        (("--prompt", " "), ("--prompt is empty",)),
        (("--prompts", "none.txt"), ("none.txt does not exist",)),
        (("--prompt", "a\udcff", "--steps", 2), ("--prompt: its prompt holds half of a surrogate pair",)),
        (("--prompt", "a" * 10_001, "--steps", 2), ("--prompt: its prompt has 10,001 characters",)),
        (("--prompt", "a", "--device", "meta"), ("the device 'meta' cannot be used",)),
        (("--prompt", "a", "--steps", 0), ("--steps should be at least 1",)),
        (("--prompt", "a", "--guidance", 0.5), ("--guidance should be a finite number of at least 1",)),
        (("--prompt", "a", "--batch-size", 0), ("--batch-size should be auto or a number of at least 1, but is 0",)),
        (("--prompt", "a", "--size", 30), ("image_size = 30 is not a multiple of 4",)),
    ],
)
def test_what_cannot_be_painted(command, tmp_path: Path, arguments: tuple, words: tuple[str, ...]) -> None:
    command("generate", "pictograms", *arguments, "--out", tmp_path / "out").refused(*words)


def test_more_steps_than_the_schedule_has(command, tmp_path: Path) -> None:
    command("generate", "pictograms", "--prompt", "a", "--steps", 5000, "--out", tmp_path / "out").refused("steps")


def test_guides_steer_the_same_seeds_and_have_pictures_of_their_own(command, tmp_path: Path) -> None:
    asked = ("generate", "pictograms", "--prompt", "a dangerous picture of a ring", "--steps", 4, "--out", tmp_path)
    guides = {"none": (), "sld": ("--guide", "sld", "--guide-set", "level=max", "--guide-set", "concept=a dangerous picture"), "reward": ("--guide", "reward")}
    for guide in guides.values():
        assert "1 new" in command(*asked, *guide).out
        assert "0 new, 1 there before" in command(*asked, *guide).out
    rows = read_jsonl(tmp_path / "manifest.jsonl")
    assert [row.get("guide", {}).get("kind") for row in rows] == [None, "sld", "reward"]
    assert len({(tmp_path / row["file"]).read_bytes() for row in rows}) == 3
    (tmp_path / "guide.toml").write_text('[guide]\nkind = "reward"\nscale = 0.0\n')
    command(*asked, "--guide", tmp_path / "guide.toml")
    plain, *_, idle = read_jsonl(tmp_path / "manifest.jsonl")
    assert (tmp_path / idle["file"]).read_bytes() == (tmp_path / plain["file"]).read_bytes()


def test_guides_that_there_are_not(command, tmp_path: Path) -> None:
    asked = ("generate", "pictograms", "--prompt", "a ring", "--out", tmp_path / "out")
    command(*asked, "--guide", "slf").refused("--guide should be sld, reward or a TOML file with a [guide] table, but is 'slf'")
    command(*asked, "--guide", "nothing.toml").refused("nothing.toml does not exist")
    command(*asked, "--guide", "sld", "--guide-set", "levle=max").refused("guide.levle is not a setting", "did you mean guide.level?")
    command(*asked, "--guide", "reward", "--guide-set", "reward.kind=jpeg").refused("no gradient to be guided by")
    command(*asked, "--guide-set", "level=max").refused("there is none")
    (tmp_path / "empty.toml").write_text("")
    command(*asked, "--guide", tmp_path / "empty.toml").refused("has no [guide] table")


def test_one_step_is_enough_for_a_distilled_model(command, tmp_path: Path) -> None:
    command("generate", "pictograms", "--prompt", "a red circle", "--steps", 1, "--out", tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 1
