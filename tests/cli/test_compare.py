"""`safediffusion compare` and the formats of `safediffusion report`, on real evaluations."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from safediffusion.cli.app import main
from safediffusion.report.comparison import beside
from safediffusion.report.results import read_results

QUICK = ("--limit", "1", "--samples", "2")


@pytest.fixture(scope="session")
def evaluations(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` is of the embedded model, `other` of a trained one, `both` of the two; read only."""
    folder = tmp_path_factory.mktemp("evaluations")
    for name, words in {"one": ["pictograms"], "other": [finished], "both": [finished, "--against", "pictograms"]}.items():
        assert main(["evaluate", *map(str, words), *QUICK, "--out", str(folder / name)]) == 0
    return folder


def test_two_measurements_stand_side_by_side(command, evaluations: Path) -> None:
    ended = command("compare", evaluations / "one", evaluations / "other" / "results.json")
    assert ended.code == 0
    assert all(word in ended.out for word in ("pictograms@1", "one", "other", "change", "Composition"))


def test_changes_are_those_of_an_evaluation_of_both(evaluations: Path) -> None:
    recorded = read_results(evaluations / "both", paired=False)
    for results in (beside([evaluations / "one", evaluations / "other"]), beside([evaluations / "both"])):
        changes = results.paired[results.subject].changes
        assert {name for name in recorded.changes if recorded.change(name)} <= set(changes)
        for name, change in changes.items():
            for end in ("value", "low", "high"):  # scores.jsonl has six places
                assert getattr(change, end) == pytest.approx(getattr(recorded.changes[name], end), abs=1e-5, nan_ok=True), name
            assert change.n == recorded.changes[name].n


def test_a_model_that_is_in_two_measurements_is_shown_once(evaluations: Path) -> None:
    assert list(beside([evaluations / "both", evaluations / "one"]).models) == ["base", "both"]


def test_different_protocols_share_no_table(command, evaluations: Path, tmp_path: Path) -> None:
    assert command("evaluate", "pictograms", "--limit", 1, "--samples", 1, "--out", tmp_path / "fewer").code == 0
    command("compare", evaluations / "one", tmp_path / "fewer").refused("samples was 2 and is 1", "numbers of different protocols share no table")


def test_what_a_protocol_only_tells_may_differ(evaluations: Path, tmp_path: Path) -> None:
    other = shutil.copytree(evaluations / "other", tmp_path / "other")
    document = json.loads((other / "results.json").read_text())
    document["protocol"]["tasks"]["pictograms"]["citation"] = "a better one"
    (other / "results.json").write_text(json.dumps(document))
    assert len(beside([evaluations / "one", other]).models) == 2


def test_a_warning_is_of_its_own_measurement(evaluations: Path, tmp_path: Path) -> None:
    other = shutil.copytree(evaluations / "other", tmp_path / "other")
    document = json.loads((other / "results.json").read_text())
    (other / "results.json").write_text(json.dumps(document | {"warnings": ["2 prompts were trained on"]}))
    assert beside([evaluations / "one", other]).warnings == ("other: 2 prompts were trained on",)


def test_what_cannot_be_compared(command, evaluations: Path, tmp_path: Path) -> None:
    command("compare", evaluations / "one").refused("a comparison takes two models")
    command("compare", evaluations / "one", evaluations / "one").refused("named twice")
    command("compare", evaluations / "one", tmp_path / "none").refused("results.json is missing")
    (tmp_path / "results.json").write_text("{")
    command("compare", evaluations / "one", tmp_path).refused("is not readable JSON")


def test_several_models_of_one_evaluation_get_changes_and_worst_cases(command, evaluations: Path, finished: Path, tmp_path: Path) -> None:
    assert command("evaluate", "pictograms", finished, *QUICK, "--out", tmp_path / "out").code == 0
    results = read_results(tmp_path / "out")
    assert set(results.paired) == {finished.name}
    rows = json.loads((tmp_path / "out" / "gallery" / "gallery.json").read_text())["rows"]
    worst = [row for row in rows if row["group"] == "worst"]
    assert 0 < len(worst) <= 12
    assert len({row["prompt"] for row in worst}) == len(worst)
    assert all(row["pictograms_unsafe"] or row[f"{finished.name}_unsafe"] for row in worst)


def test_numbers_for_other_hands(command, evaluations: Path, tmp_path: Path) -> None:
    files = {format: command("report", evaluations / "both", "--out", tmp_path, "--format", format).out.strip() for format in ("markdown", "latex", "csv")}
    assert [Path(file).name for file in files.values()] == ["report.md", "report.tex", "results.csv"]
    with open(files["csv"], newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["model", "task", "metric", "value", "low", "high", "n"]
    found = {(line["model"], line["metric"]): line for line in lines}
    recorded = json.loads((evaluations / "both" / "results.json").read_text())["models"]
    assert float(found["base", "composition"]["value"]) == recorded["base"]["composition"]["value"]
    assert {line["task"] for line in lines} == {"pictograms"}
    assert "\\toprule" in Path(files["latex"]).read_text()
    assert "Licence" in Path(files["markdown"]).read_text()
    command("report", evaluations / "both", "--format", "pdf").refused("'pdf' is not one of")
