"""`safediffusion study` and `safediffusion pareto`: real runs, killed and gone on with, one of them failing."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from safediffusion.cli.app import main
from safediffusion.hub import EMBEDDED
from safediffusion.weights import sha256

STUDY = """
title = "Two rates [/bold]"
budget = {forwards = 48}
seeds = [0, 1]
probes = 1
[base]
model = "pictograms"
policy = {train = "full"}
process = {steps = 2}
reward = {kind = "similarity", encoder = "pictograms"}
algorithm = {kind = "forward", prompts = 2, group = 2, times = 1, least_spread = 0.0}
probe = {prompts = 2, samples = 2, patience = 0}
[evaluate]
limit = 2
samples = 2
[[sweep]]
name = "rate"
key = "optimizer.lr"
values = [1e-3]
"""
GUIDED = """
[[entrants]]
name = "sld"
guide = {kind = "sld", level = "max", concept = "a dangerous picture"}
"""
BROKEN = """
[[entrants]]
name = "broken"
recipe = {reward = {kind = "callable", function = "nowhere:nothing"}}
"""
PATIENCE = 300  # seconds; a loaded machine is slow


def killed(words: list[str], run: Path) -> None:
    """The study, and nothing but the study, is killed by force as soon as a run has begun; the run ends by itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "safediffusion", *words], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while not (run / "run.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with open(run / ".lock") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
    log = run.with_name(f"{run.name}.log")
    while "interrupted; the same command again goes on" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """The file, the folder and the exit code of a study that was killed in its first training and gone on with."""
    place = tmp_path_factory.mktemp("study")
    file, out = place / "study.toml", place / "out"
    file.write_text(STUDY + GUIDED + BROKEN)
    words = ["study", str(file), "--out", str(out), "--jobs", "1"]
    killed(words, out / "rate-0.001-0")
    return file, out, main(words)


def test_a_study_goes_on_after_a_kill_and_a_run_that_fails_does_not_stop_the_others(studied: tuple[Path, Path, int]) -> None:
    _, out, code = studied
    assert code == 2
    document = json.loads((out / "study.json").read_text())
    assert set(document["failures"]) == {"broken-0", "broken-1"}
    assert all("nowhere" in sentence for sentence in document["failures"].values())
    base, _, rate = document["rows"]
    assert (base["name"], rate["name"], rate["value"]) == ("base", "rate-0.001", 0.001)
    assert [run["seed"] for run in rate["runs"]] == [0, 1]
    for run in rate["runs"]:
        assert run["forwards"] == 48
        assert run["cpu_seconds"] > 0
        assert set(run["values"]) >= set(rate["values"])
    for name in ("unsafe_rate/seen", "unsafe_rate/unseen", "unsafe_rate/implicit", "composition", "alignment", "diversity", "drift", "kept"):
        value = rate["values"][name]
        seeds = [run["values"][name] for run in rate["runs"]]
        assert value["value"] == pytest.approx(sum(each["value"] for each in seeds) / 2)
        assert value["low"] <= value["value"] <= value["high"]
        assert value["n"] == sum(each["n"] for each in seeds)
    assert rate["values"]["drift"]["value"] > 0


def test_a_guided_row_is_measured_once_and_has_spent_nothing(studied: tuple[Path, Path, int]) -> None:
    _, out, _ = studied
    (row,) = [each for each in json.loads((out / "study.json").read_text())["rows"] if each["name"] == "sld"]
    assert (row["algorithm"], row["guide"]["level"], row["forwards"], row["cpu_seconds"]) == (None, "max", 0, 0)
    assert [run["seed"] for run in row["runs"]] == [0] and not (out / "sld-1").exists()
    assert row["values"]["drift"]["value"] > 0
    assert "| 1 | 0 | 0 | – |\n" in (out / "study.md").read_text()


def test_what_is_written_for_people(studied: tuple[Path, Path, int]) -> None:
    _, out, _ = studied
    text = (out / "study.md").read_text()
    assert text.startswith("# Two rates [/bold]\n")
    assert "| base |" in text and "| rate, 0.001 |" in text and "- broken-0: train failed:" in text
    assert (out / "study.png").read_bytes().startswith(b"\x89PNG")


def test_the_base_is_painted_once(studied: tuple[Path, Path, int]) -> None:
    _, out, _ = studied
    (album,) = (out / "base" / "pictures").iterdir()
    for seed in (0, 1):
        pictures = out / f"rate-0.001-{seed}" / "pictures"
        assert (pictures / album.name).is_symlink()
        assert (pictures / album.name).resolve() == album.resolve()
        weights = (out / f"rate-0.001-{seed}" / "model", EMBEDDED / "pipeline")
        kept, base = (sha256(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in weights)
        assert len(list(pictures.iterdir())) == (1 if kept == base else 2)  # a run whose best weights are the base's has nothing else to paint


def test_a_finished_study_repeats_nothing_and_pareto_reads_the_same_runs(studied: tuple[Path, Path, int], command) -> None:
    file, out, _ = studied
    file.write_text(STUDY + GUIDED)  # without the run that fails
    logs = {path: path.stat().st_mtime_ns for path in out.glob("*.log")}
    ended = command("pareto", file, "--out", out)
    assert ended.code == 0, ended.err
    assert "hypervolume" in ended.out and "pareto.md" in ended.out
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.log")} == logs
    assert "Two rates [/bold]" in ended.out
    document = json.loads((out / "pareto.json").read_text())
    (series,) = document["series"]
    assert (series["name"], series["front"], series["hypervolume"]["n"]) == ("rate", ["rate-0.001"], 1)
    assert series["hypervolume"]["low"] <= series["hypervolume"]["value"] <= series["hypervolume"]["high"]
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_an_axis_that_nothing_measures_is_refused_when_the_base_is_measured(studied: tuple[Path, Path, int], command, tmp_path: Path) -> None:
    _, out, _ = studied
    file = tmp_path / "study.toml"
    file.write_text(STUDY.replace("1e-3", "0.5") + '[pareto]\nquality = "compositon"\n')
    command("pareto", file, "--out", out).refused("[pareto] draws 'compositon', which evaluate.tasks = 'pictograms' does not measure; it has", "composition")
    assert not (out / "rate-0.5-1").exists()


def test_what_is_no_study_and_no_sweep(command, tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(STUDY.split("[[sweep]]")[0] + '[[entrants]]\nname = "alone"\n')
    command("pareto", file, "--out", tmp_path / "out").refused("has no [[sweep]]")
    command("study", tmp_path / "nowhere.toml", "--out", tmp_path / "out").refused("does not exist")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (STUDY.replace("times = 1", "times = 2").replace("forwards = 48", "forwards = 96"), "rate-0.001-0 was trained by another recipe: algorithm.times was 1"),
        (STUDY.replace("forwards = 48", "forwards = 96"), "rate-0.001-0 was trained by another recipe: steps was 2 and is now 4"),
        (STUDY.replace("forwards = 48", "forwards = 16"), "rate-0.001-0 was trained by another recipe: steps was 2 and is now 1"),
        (STUDY + GUIDED.replace("max", "weak"), "sld-0 was measured under another guide: guide.level was"),
    ],
    ids=["recipe", "longer", "shorter", "guide"],
)
def test_another_study_is_refused_the_folder_before_anything_is_touched(studied: tuple[Path, Path, int], command, tmp_path: Path, text: str, words: str) -> None:
    _, out, _ = studied
    file = tmp_path / "study.toml"
    file.write_text(text)
    there = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    command("study", file, "--out", out, "--jobs", "1").refused(words, "choose another --out, or give the row another name")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == there


def test_two_processes_do_not_work_in_one_study(studied: tuple[Path, Path, int], command, tmp_path: Path) -> None:
    _, out, _ = studied
    file = tmp_path / "study.toml"
    file.write_text(STUDY)
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("pid 1")
        lock.flush()
        ended = command("study", file, "--out", out)
    ended.refused(f"another process (pid 1) is working in {out}; wait for it, or choose another --out")
    assert ended.err.count("\n") == 1  # no bar


@pytest.mark.parametrize("kind", ["trained", "guided"])
def test_a_row_that_was_only_guided_is_no_training_and_the_other_way_round(studied: tuple[Path, Path, int], command, tmp_path: Path, kind: str) -> None:
    _, out, _ = studied
    now = {
        "trained": (GUIDED + "recipe = {algorithm = {group = 4}}\n", "sld-0 was measured without a training, and the row has one now"),
        "guided": (GUIDED.replace('"sld"', '"rate-0.001"', 1), "rate-0.001-0 is a run that was trained, and the row only guides now"),
    }
    text, words = now[kind]
    file = tmp_path / "study.toml"
    file.write_text(STUDY.split("[[sweep]]")[0] + text)
    command("study", file, "--out", out).refused(words)
    assert (out / "sld-0" / "results.json").exists() and (out / "rate-0.001-0" / "results.json").exists()


def test_what_changes_no_result_repeats_nothing(studied: tuple[Path, Path, int], command, tmp_path: Path) -> None:
    """Memory, as the sentence asks for that ends a run without any left, and what is kept."""
    _, out, _ = studied
    file = tmp_path / "study.toml"
    file.write_text(STUDY.replace('"full"', '"full", gradient_checkpointing = true').replace("[base]", "[base]\noptimizer = {batch = 2}\nlog = {keep_last = 3}"))
    logs = {path: path.stat().st_mtime_ns for path in out.glob("rate*.log")}
    ended = command("study", file, "--out", out)
    assert ended.code == 0, ended.err
    assert logs and {path: path.stat().st_mtime_ns for path in out.glob("rate*.log")} == logs


def test_prompts_that_were_edited_make_another_run_and_a_finished_study_needs_no_model(command, tmp_path: Path) -> None:
    """A user's own model and prompts: a finished study writes its tables without them."""
    shutil.copytree(EMBEDDED / "pipeline", tmp_path / "model")
    prompts, file, out = tmp_path / "mine.txt", tmp_path / "study.toml", tmp_path / "out"
    prompts.write_text("a knife\n")
    text = STUDY.replace('"pictograms"\npolicy', f'"{tmp_path / "model"}"\ndata = {{unsafe = "{prompts}"}}\npolicy').replace("[0, 1]", "[0]")
    file.write_text(text)
    assert command("study", file, "--out", out).code == 0
    shutil.move(tmp_path / "model", tmp_path / "elsewhere")
    (out / "study.md").unlink()
    again = command("study", file, "--out", out)
    assert again.code == 0 and (out / "study.md").exists(), again.err
    file.write_text(text.replace("seeds = [0]", "seeds = [0, 1]"))
    command("study", file, "--out", out).refused("model does not exist")
    shutil.move(tmp_path / "elsewhere", tmp_path / "model")
    prompts.write_text("a bomb\n")
    command("study", file, "--out", out).refused("rate-0.001-0 was trained by another recipe: prompts.", "was ", "and is now")
    assert (out / "rate-0.001-0" / "results.json").exists() and not (out / "rate-0.001-1").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("limit = 2", 'tasks = "pictogram"', "[evaluate]: there is no task 'pictogram'; did you mean pictograms?"),
        ('model = "pictograms"', 'model = "pictogram"', "'pictogram' is no model"),
    ],
    ids=["task", "model"],
)
def test_what_no_run_could_begin_with_is_refused_before_any(command, tmp_path: Path, old: str, new: str, words: str) -> None:
    file, out = tmp_path / "study.toml", tmp_path / "out"
    file.write_text(STUDY.replace(old, new))
    command("study", file, "--out", out).refused(words)
    assert not out.exists()


def test_another_extent_of_the_measurement_is_said_and_nothing_is_trained_again(studied: tuple[Path, Path, int], command, tmp_path: Path) -> None:
    _, out, _ = studied
    file = tmp_path / "study.toml"
    file.write_text(STUDY.replace("samples = 2\n[[sweep]]", "samples = 3\n[[sweep]]"))
    models = {seed: (out / f"rate-0.001-{seed}" / "metrics.jsonl").read_bytes() for seed in (0, 1)}
    ended = command("study", file, "--out", out, "--jobs", "1")
    assert ended.code == 0, ended.err
    assert 'was measured otherwise: --samples was "2" and is now "3". Every run is measured again, and none is trained again' in " ".join(ended.err.split())
    assert {seed: (out / f"rate-0.001-{seed}" / "metrics.jsonl").read_bytes() for seed in (0, 1)} == models
    again = command("study", file, "--out", f"{out}/../{out.name}", "--jobs", "1")  # however the folder is spelled
    assert again.code == 0 and "measured otherwise" not in again.err
