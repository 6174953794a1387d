"""The command as a whole: help, versions, errors, interrupts."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from safediffusion.cli import app
from safediffusion.cli.app import main

COMMANDS = [["demo"], ["train"], ["generate"], ["evaluate"], ["report"], ["export"], ["direction"], ["bench"], ["methods"], ["study"], ["pareto"], ["tiny", "build"]]


def test_help_keeps_what_stands_in_brackets(command, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "a TOML file with [guide]" in command("generate", "--help").out
    assert "with [[sweep]] tables" in command("pareto", "--help").out


@pytest.mark.parametrize("name", COMMANDS, ids=" ".join)
def test_help_shows_examples_that_can_be_run(command, name) -> None:
    ended = command(*name, "--help")
    assert ended.code == 0
    assert f"safediffusion {' '.join(name)} " in ended.out.split("Examples")[1]


def test_no_arguments_and_an_unknown_command(command) -> None:
    assert "Commands" in command().out
    command("trian").refused("no such command 'trian'", "'train'", "see safediffusion --help")


def test_version(command) -> None:
    assert re.fullmatch(r"safediffusion \d+\.\d+\.\d+\n", command("--version").out)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("demo",), "missing option '--out'; see safediffusion demo --help"),
        (("generate",), "missing argument 'MODEL'; see safediffusion generate --help"),
        (("generate", "pictograms", "--sampels", 2), "no such option: --sampels (Possible options: --samples, --steps); see safediffusion generate --help"),
        (
            ("generate", "pictograms", "--samples", 0, "--out", "there"),
            "invalid value for '--samples': Input should be greater than or equal to 1; see safediffusion generate --help",
        ),
        (("methods", "--format", "jsn"), "invalid value for '--format': 'jsn' is not one of 'table', 'markdown', 'json'; see safediffusion methods --help"),
        (("evaluate", "pictograms"), "--out is missing: name a folder for the results"),
    ],
)
def test_a_usage_error_is_one_sentence(command, arguments, sentence) -> None:
    ended = command(*arguments)
    assert (ended.code, ended.err) == (2, f"error: {sentence}\n")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PermissionError(13, "Permission denied", "there"), "no permission to use there"),
        (OSError(28, "No space left on device", "there"), "the disk that holds there is full"),
        (MemoryError(), "memory ran out; paint fewer pictures at once"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "memory ran out"),
    ],
)
def test_what_the_machine_refuses_is_said_in_one_sentence(command, monkeypatch, error, sentence) -> None:
    def refuse(arguments):
        raise error

    monkeypatch.setattr(app, "_run", refuse)
    ended = command("demo")
    assert ended.code == 2
    assert ended.err.startswith(f"error: {sentence}")
    assert ended.err.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch) -> None:
    def stumble(arguments):
        raise RuntimeError("index out of range")

    monkeypatch.setattr(app, "_run", stumble)
    with pytest.raises(RuntimeError, match="index out of range"):
        main(["demo"])


def test_our_warnings_are_one_line_and_those_of_libraries_none(command, monkeypatch) -> None:
    def warn(arguments):
        warnings.warn_explicit("two prompts are cut", UserWarning, "a.py", 1, module="safediffusion.policies.conditioner")
        warnings.warn_explicit("old call", FutureWarning, "b.py", 1, module="transformers.models")
        return 0

    monkeypatch.setattr(app, "_run", warn)
    ended = command("train")
    assert (ended.code, ended.err) == (0, "warning: two prompts are cut\n")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "a scheduler"])
def test_an_interrupt_says_how_to_go_on_and_the_same_command_does(sent: signal.Signals, recipe: Path, tmp_path: Path, shell) -> None:
    asked = [sys.executable, "-m", "safediffusion", "train", str(recipe), "steps=15", "probe.every=0", "--out", str(tmp_path / "run")]
    # A shell that runs tests in the background has its children ignore the signal.
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(asked, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, preexec_fn=listen)
    checkpoints = tmp_path / "run" / "checkpoints"
    until = time.monotonic() + 300
    while not list(checkpoints.glob("step-*")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(sent)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert said.endswith("interrupted; the same command again goes on where it stopped\n")
    assert "Traceback" not in said
    again = shell(*asked[3:])
    assert again.returncode == 0
    assert re.search(r"resuming after iteration \d+ of 15", again.stderr)
