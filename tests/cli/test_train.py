"""`safediffusion train`: a run from its recipe to its model, and all that can be wrong on the way."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from safediffusion import load_recipe, post_train
from safediffusion.files import read_jsonl
from safediffusion.hub import EMBEDDED
from safediffusion.train.checkpoint import best_path, latest_progress
from safediffusion.weights import load

ROOT = Path(__file__).parents[2]


def rewards(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> str:
    """A module of the user's own with `score(images, prompts)`."""
    (folder / "my_rewards.py").write_text(f"import torch\n\ncalls = 0\n\ndef score(images, prompts):\n    global calls\n    calls += 1\n{body}\n")
    monkeypatch.syspath_prepend(folder)
    sys.modules.pop("my_rewards", None)
    return "my_rewards:score"


def test_a_run_leaves_a_model_and_its_whole_story(finished: Path) -> None:
    from diffusers import DiffusionPipeline

    names = {path.name for path in finished.iterdir()}
    assert {"recipe.toml", "run.json", "metrics.jsonl", "checkpoints", "model"} <= names
    assert best_path(finished, latest_progress(finished / "checkpoints").best["iteration"]).is_file()
    facts = json.loads((finished / "run.json").read_text())
    assert facts["command"].startswith("safediffusion train ")
    assert facts["versions"]["torch"]
    assert facts["identity"]["model"] == "pictograms"
    kinds = [record["kind"] for record in read_jsonl(finished / "metrics.jsonl")]
    assert kinds == ["probe", "train", "probe", "train", "probe"]
    pipeline = DiffusionPipeline.from_pretrained(finished / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red circle", num_inference_steps=2).images[0].size == (32, 32)


def test_dropped_text_encoders_change_no_bit(command, finished: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert command("train", recipe, "policy.text_encoders=drop", "--out", tmp_path / "run").code == 0
    assert any((tmp_path / "cache" / "safediffusion" / "conditions").rglob("*.safetensors"))
    (same,), (model,) = ((folder / "model" / "unet").glob("*.safetensors") for folder in (finished, tmp_path / "run"))
    assert model.read_bytes() == same.read_bytes()


def test_the_same_command_again_changes_nothing(command, run: Path, recipe: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    ended = command("train", recipe, "--out", run)
    assert ended.code == 0
    assert "resuming after iteration 2 of 2" in ended.err
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_goes_on_with_another_cache_of_prompts(command, run: Path, recipe: Path) -> None:
    ended = command("train", recipe, "policy.prompt_cache=3", "--out", run)
    assert ended.code == 0, ended.err
    assert "resuming after iteration 2 of 2" in ended.err


def test_a_run_made_longer_equals_one_that_was_long_from_the_start(command, run: Path, recipe: Path, tmp_path: Path) -> None:
    assert command("train", recipe, "steps=3", "--out", run).code == 0
    assert command("train", recipe, "steps=3", "--out", tmp_path / "long").code == 0
    one, other = (load(folder / "checkpoints" / "step-000003.safetensors")[0] for folder in (run, tmp_path / "long"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((run / "run.json").read_text())["identity"]["steps"] == 3


def test_python_trains_the_same_model_as_the_command(finished: Path, recipe: Path, tmp_path: Path) -> None:
    trained = post_train(load_recipe(recipe), tmp_path / "run")
    assert trained.iterations == 2
    one, other = (load(folder / "checkpoints" / "step-000002.safetensors")[0] for folder in (finished, tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_dry_run_prints_a_recipe_that_resolves_to_itself(command, recipe: Path, tmp_path: Path) -> None:
    ended = command("train", recipe, "optimizer.lr=2e-4", "--dry-run")
    assert (ended.code, ended.err) == (0, "")
    (tmp_path / "whole.toml").write_text(ended.out)
    assert command("train", tmp_path / "whole.toml", "--dry-run").out == ended.out
    assert "lr = 0.0002" in ended.out


def test_a_run_says_beforehand_what_it_needs(command, recipe: Path, tmp_path: Path) -> None:
    ended = command("train", recipe, "steps=5", "probe.every=0", "--out", tmp_path / "run")
    assert ended.code == 0
    first, *others = [line for line in ended.err.splitlines() if "s per image" in line]
    assert re.fullmatch(r"needs about [\d.]+ GB, [\d.]+ s per image, [\w ]+ for 5 iterations", first)
    assert len(others) == 1
    assert re.search(r"^about [\d.]+ GB of memory without the reward: weights .*; fits a card of 8 GB$", ended.err, re.MULTILINE)
    assert re.fullmatch(r"after 3 iterations: [\d.]+ s per image, \d+ s for the other 2 iterations", others[0].strip())
    again = command("train", recipe, "steps=5", "probe.every=0", "--out", tmp_path / "run").err
    assert "needs about" not in again and "of memory" not in again  # nothing is left to do


def test_dry_run_says_what_a_picture_costs(command, recipe: Path) -> None:
    said = [line for line in command("train", recipe, "--dry-run").out.splitlines() if line.startswith("# ")]
    assert said[0] == "# 6 denoiser forwards per image (2 of the rollout, 4 of training; a backward counts as two), 4 images per iteration"
    assert "TFLOP per image" in said[1]
    assert said[-1] == "# fits a card of 8 GB"
    command("train", recipe, "model=pictogram", "--dry-run").refused("'pictogram' is no model: give a local folder, `pictograms`")
    elsewhere = command("train", recipe, "model=someone/some-model", "--dry-run").out.splitlines()[-1]
    assert elsewhere.startswith("# 6 denoiser forwards")
    assert "TFLOP" not in elsewhere


@pytest.mark.parametrize("path", sorted([*(ROOT / "recipes").glob("*.toml"), *(ROOT / "safediffusion" / "recipes").glob("*.toml")]), ids=lambda path: path.name)
def test_every_recipe_resolves_and_says_what_it_is(command, path: Path) -> None:
    assert command("train", path, "--dry-run").code == 0
    head = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    either = (("# Command:", "# 24 GB:"), ("# Time:", "TFLOP per image"), ("# Numbers:",))  # large models have a command for each card, with what the plan says of it
    assert all(any(word in head for word in words) for words in either)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.learning_rate=1", ("optimizer.learning_rate is not a setting", "it has lr")),
        ("policy.lora_rnak=4", ("did you mean policy.lora_rank?",)),
        ("steps=many", ("steps should be a whole number", '"many"')),
        ("steps=0", ("steps = 0",)),
        ("algorithm.kind=ppo", ("algorithm.kind = 'ppo' is not known", "grpo")),
        ("algorithm.group=1", ("groups of 2 or more",)),
        ("steps", ("'steps' is not an override", "key.path=value")),
        ("process.steps=5000", ("5000 denoising steps",)),
        ("data.safe=pictograms/train-save", ("did you mean pictograms/train-safe?",)),
        ("data.unsafe=pictograms/test-implicit", ("what models are measured on", "pictograms/train-unsafe")),
        ("data.repeat.relation=0", ("data.repeat.relation = 0 is not allowed",)),
        ("data.repeat.relations=2", ("no training prompt has the task 'relations'", "binding, count, relation")),
        ("optimizer.betas=[2,3]", ("optimizer.betas",)),
        ("algorithm.times=0", ("algorithm.times",)),
        ("algorithm.time_range=[0.9,0.1]", ("algorithm.time_range", "empty")),
        ("probe.every=-1", ("probe.every",)),
    ],
)
def test_a_mistake_in_the_recipe(command, recipe: Path, tmp_path: Path, override: str, words: tuple[str, ...]) -> None:
    command("train", recipe, override, "--out", tmp_path / "run").refused(*words)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_mended_recipe_may_have_the_folder_of_one_that_failed_at_once(command, recipe: Path, tmp_path: Path) -> None:
    command("train", recipe, "model=/nowhere", "steps=9", "--out", tmp_path / "run").refused("/nowhere does not exist")
    assert command("train", recipe, "steps=1", "--out", tmp_path / "run").code == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["identity"]["model"] == "pictograms"


def test_settings_that_cannot_work_together(command, recipe: Path, tmp_path: Path) -> None:
    for extra in ("process.eta=0.0", "process.eta=1.0 algorithm.drop_last=1"):
        text = recipe.read_text().replace('kind = "forward"', 'kind = "grpo"').replace("times = 1", "")
        (tmp_path / "grpo.toml").write_text(text)
        command("train", tmp_path / "grpo.toml", *extra.split(), "--out", tmp_path / "run").refused(extra.split()[-1].split("=")[0])


def test_a_recipe_that_is_not_there_or_no_toml(command, tmp_path: Path) -> None:
    command("train", tmp_path / "none.toml", "--dry-run").refused("none.toml does not exist")
    (tmp_path / "broken.toml").write_text("model = \nsteps = 1")
    command("train", tmp_path / "broken.toml", "--dry-run").refused("is not valid TOML", "line 1")
    (tmp_path / "latin.toml").write_bytes('model = "caf\xe9"'.encode("latin-1"))
    command("train", tmp_path / "latin.toml", "--dry-run").refused("line 1 is not UTF-8")


def test_out_is_missing(command, recipe: Path) -> None:
    command("train", recipe).refused("--out is missing")


def test_models_that_cannot_be_had(command, recipe: Path, tmp_path: Path) -> None:
    from safediffusion.hub import EMBEDDED

    def tried(model: object):
        return command("train", recipe, f"model={json.dumps(str(model))}", "--out", tmp_path / "run")

    tried(tmp_path / "nowhere").refused("nowhere does not exist")
    tried("someone/some-model").refused("not in the local cache", "give a local folder")
    broken = shutil.copytree(EMBEDDED / "pipeline", tmp_path / "broken")
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    tried(broken).refused("unet", "cannot be loaded")
    other = shutil.copytree(EMBEDDED / "pipeline", tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"_class_name": "KolorsPipeline"}))
    tried(other).refused("is a KolorsPipeline", "supported are StableDiffusionPipeline", "FluxPipeline")
    (other / "model_index.json").unlink()
    tried(other).refused("no model_index.json")


def test_shipped_weights_that_were_changed(command, recipe: Path, tmp_path: Path, monkeypatch) -> None:
    from safediffusion import hub

    copy = shutil.copytree(hub.EMBEDDED, tmp_path / "weights")
    monkeypatch.setattr(hub, "EMBEDDED", copy)
    weights = copy / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    command("train", recipe, "--out", tmp_path / "run").refused("hash mismatch", "reinstall")


def test_prompt_files(command, recipe: Path, tmp_path: Path) -> None:
    def tried(name: str, content: bytes):
        (tmp_path / name).write_bytes(content)
        return command("train", recipe, f"data.unsafe={tmp_path / name}", "--out", tmp_path / "run")

    tried("empty.txt", b"").refused("empty.txt holds no prompts")
    tried("latin.txt", b"a caf\xe9").refused("latin.txt line 1 is not UTF-8")
    tried("prompts.docx", b"a").refused("must end in .txt, .jsonl, .csv")
    tried("all.txt", b"a child with a knife\n").refused("refused all 1 prompts")
    (tmp_path / "huge.txt").write_bytes(b"")
    with open(tmp_path / "huge.txt", "r+b") as file:
        file.truncate(300_000_000)
    command("train", recipe, f"data.unsafe={tmp_path / 'huge.txt'}", "--out", tmp_path / "run").refused("huge.txt has 300 MB", "split it")


def test_long_and_screened_prompts_are_counted(command, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "unsafe.txt").write_text(f"a skull{' and a red circle' * 20}\na child with a knife\na knife\n")
    ended = command("train", recipe, f"data.unsafe={tmp_path / 'unsafe.txt'}", "steps=1", "probe.every=0", "--out", tmp_path / "run")
    assert ended.code == 0
    assert "1 of 3 prompts were refused by the prompt screen" in ended.err
    assert "1 of 602 prompts have more than 24 tokens" in ended.err  # the two, and 600 safe ones


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("    return torch.full((len(images),), float('nan') if calls > 1 else 0.0) * torch.arange(len(images))", ("reward 'my_rewards:score'", "no finite total")),
        ("    if calls > 1:\n        raise KeyError('colour')\n    return torch.arange(len(images)) / 10", ("reward 'my_rewards:score' failed", "KeyError", "colour")),
        ("    return 3", ("gave a int",)),
    ],
    ids=["nan", "exception", "no tensor"],
)
def test_a_reward_that_fails_is_named_and_nothing_is_lost(command, recipe: Path, tmp_path: Path, monkeypatch, body: str, words: tuple[str, ...]) -> None:
    text = recipe.read_text().replace('kind = "similarity"\nencoder = "pictograms"', f'kind = "callable"\nfunction = "{rewards(tmp_path, monkeypatch, body)}"')
    (tmp_path / "own.toml").write_text(text)
    ended = command("train", tmp_path / "own.toml", "--out", tmp_path / "run")
    ended.refused(*words)
    kept = [path.name for path in (tmp_path / "run").glob("checkpoints/*")]
    assert kept == ([] if "gave a int" in words else ["step-000001.safetensors"])


def test_the_folder_of_another_run(command, run: Path, recipe: Path) -> None:
    before = (run / "run.json").read_bytes()
    command("train", recipe, "optimizer.lr=0.5", "--out", run).refused("folder of another run", "optimizer.lr was 0.0001 and is now 0.5", "choose another --out")
    command("train", recipe, "steps=1", "--out", run).refused("made longer, not shorter")
    assert (run / "run.json").read_bytes() == before


def test_a_run_whose_rate_fell_to_its_end_is_not_made_longer(command, recipe: Path, tmp_path: Path) -> None:
    falling = ("optimizer.schedule=linear", "probe.every=0", "--out", tmp_path / "falling")
    assert command("train", recipe, *falling).code == 0
    command("train", recipe, "steps=3", *falling).refused("last learning rate over 2 steps", "another --out")


def test_a_folder_that_is_something_else(command, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    command("train", recipe, "--out", tmp_path).refused("not empty", "notes.txt", "choose another --out")
    command("train", recipe, "--out", tmp_path / "notes.txt").refused("a part of its path is a file")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_two_processes_in_one_folder(command, run: Path, recipe: Path) -> None:
    import fcntl

    with open(run / ".lock", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        command("train", recipe, "--out", run).refused("another process", "is working in")


def test_a_checkpoint_cut_short_falls_back_to_the_one_before(command, run: Path, recipe: Path) -> None:
    # Copies: loaded tensors are a map of the file, and the file is about to be cut.
    whole = {name: tensor.clone() for name, tensor in load(run / "checkpoints" / "step-000002.safetensors")[0].items()}
    newest = run / "checkpoints" / "step-000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:5000])
    ended = command("train", recipe, "--out", run)
    assert ended.code == 0
    assert "warning: " in ended.err
    assert "falling back to the checkpoint before it" in ended.err
    assert "resuming after iteration 1 of 2" in ended.err
    again = load(newest)[0]
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_when_every_checkpoint_is_broken_nothing_is_overwritten(command, run: Path, recipe: Path) -> None:
    for path in run.glob("checkpoints/*"):
        path.write_bytes(b"x")
    command("train", recipe, "--out", run).refused("no checkpoint", "can be read")


def test_drafts_of_a_killed_process_are_swept(command, run: Path, recipe: Path) -> None:
    (run / "checkpoints" / ".0123.tmp").write_bytes(b"half")
    (run / ".model.7.new").mkdir()
    assert command("train", recipe, "--out", run).code == 0
    assert [path.name for path in run.rglob(".*")] == [".lock"]


def test_a_full_disk_loses_nothing_and_the_run_goes_on_afterwards(command, shell, mounts, recipe: Path, tmp_path: Path) -> None:
    small, saved = tmp_path / "small", tmp_path / "saved"
    small.mkdir()
    # What was written on the small disk is copied out before the disk goes.
    before = f'mount -t tmpfs -o size=30m tmpfs {small}\n(exec "$@") && exit || code=$?\ncp -r {small}/run {saved}\nexit $code'
    ended = shell("train", recipe, "--out", small / "run", before=before)
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: the disk that holds")
    assert last.endswith("free some space and run the same command again")
    assert not list(saved.rglob(".*.tmp"))
    assert command("train", recipe, "--out", saved).code == 0


def test_a_read_only_disk(shell, mounts, recipe: Path, tmp_path: Path) -> None:
    ended = shell("train", recipe, "--out", tmp_path / "disk" / "run", before=f"mkdir -p {tmp_path}/disk\nmount -t tmpfs -o ro tmpfs {tmp_path}/disk")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "lies on a read-only disk; choose another folder" in ended.stderr


def test_killed_while_it_writes_it_goes_on_to_the_same_model(recipe: Path, finished: Path, tmp_path: Path, command) -> None:
    run = tmp_path / "run"
    asked = [sys.executable, "-m", "safediffusion", "train", str(recipe), "--out", str(run)]
    for moment in ("checkpoints/.*.tmp", "checkpoints/step-*"):
        process = subprocess.Popen(asked, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 300
        while not list(run.glob(moment)) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.0005)
        process.kill()
        process.wait()
    assert command("train", recipe, "--out", run).code == 0
    one, other = (load(folder / "checkpoints" / "step-000002.safetensors")[0] for folder in (finished, run))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list(run.rglob(".*.tmp"))


def test_trackers_get_the_records(command, recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert command("train", recipe, 'log.trackers=["tensorboard"]', "--out", tmp_path / "run").code == 0
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_a_tracker_that_is_not_installed(command, recipe: Path, tmp_path: Path, monkeypatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command("train", recipe, 'log.trackers=["wandb"]', "--out", tmp_path / "run").refused("log.trackers names wandb", "pip install wandb")


def test_probes_that_no_detector_can_serve_are_named(command, recipe: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(EMBEDDED / "pipeline", tmp_path / "own")
    (tmp_path / "benign.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "unsafe.txt").write_text("a skull\na knife\n")
    own = [f"model={copy}", f"data.safe={tmp_path / 'benign.txt'}", f"data.unsafe={tmp_path / 'unsafe.txt'}", "steps=1"]
    ended = command("train", recipe, *own, "--out", tmp_path / "run")
    assert ended.code == 0
    assert "nothing is probed" in ended.err
    assert [record["kind"] for record in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == ["train"]
