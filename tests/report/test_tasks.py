"""Several tasks and several models in one results.json: names, tables, verdicts, pairs, planes and exports."""

import io
import json
import math
import time

import numpy as np
import pytest

from safediffusion.evaluate.paired import holm, paired_change, paired_p_value
from safediffusion.evaluate.statistics import Estimate
from safediffusion.report.bars import part_bars
from safediffusion.report.card import model_card
from safediffusion.report.exports import latex, long_csv, markdown
from safediffusion.report.metric import as_value, in_order, metric
from safediffusion.report.page import write_report
from safediffusion.report.plane import Plane, PlanePoint, models_plane
from safediffusion.report.results import parse_results, read_results
from safediffusion.report.run import read_runs
from safediffusion.report.tables import by_task, markdown_table, metric_rows, terminal_table
from safediffusion.report.verdict import doubts, verdict

CATEGORIES = ("harassment", "illegal activity", "self-harm", "shocking", "violence")
TASKS = {
    "core-v1": {
        "id": "core-v1@1",
        "title": "our own count",
        "licence": "MIT",
        "citation": "somebody, 2023",
        "known": {"SD1.4": "37.75 %"},
        "prompts": {"": 400},
        "painting/samples": 2,
        "measures": {"unsafe_rate": {"kind": "rate"}, "nudity": {"kind": "rate"}, "clip_score": {"kind": "likeness"}},
    },
    "i2p-nudenet-rece": {"id": "i2p-nudenet-rece@1", "measures": {"detections": {"kind": "count"}}},
    "geneval-hf": {"id": "geneval-hf@1", "measures": {"geneval": {"kind": "geneval"}}},
    "coco": {"id": "coco@1", "measures": {"fid": {"kind": "frechet"}, "clip_score": {"kind": "likeness"}}},
}


def estimate(value, half=0.03, n=800):
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def numbers(unsafe=0.4, geneval=0.43, fid=18.0, clip=31.2):
    found = {f"core-v1:unsafe_rate/{category}": estimate(unsafe * (0.6 + 0.2 * place), n=160) for place, category in enumerate(CATEGORIES)}
    found |= {"core-v1:unsafe_rate": estimate(unsafe), "core-v1:nudity": estimate(unsafe / 2), "core-v1:clip_score": estimate(30.0, 0.2)}
    found |= {"i2p-nudenet-rece:detections": estimate(646.0, 30.0), "i2p-nudenet-rece:detections/core": estimate(304.0, 20.0), "core-v1:expected_maximum": estimate(0.9)}
    found |= {
        "geneval-hf:geneval": estimate(geneval),
        "geneval-hf:geneval/counting": estimate(0.35),
        "coco:fid": estimate(fid, 0.5),
        "coco:clip_score": estimate(clip, 0.2),
    }
    return found


def several(**models):
    document = {"schema": 1, "protocol": {"id": ", ".join(each["id"] for each in TASKS.values()), "tasks": TASKS}, "changes": {}, "run": {}}
    return document | {"models": {"base": numbers(), **models}}


def paired(**changes):
    """Base and trained, with recorded changes of what is named and of the rest none."""
    document = several(trained=numbers(unsafe=0.1))
    named = {"unsafe": ("core-v1:unsafe_rate", 0.03), "geneval": ("geneval-hf:geneval", 0.03), "clip": ("coco:clip_score", 0.1), "own": ("core-v1:clip_score", 0.1)}
    document["changes"] = {named[key][0]: estimate(value, named[key][1]) for key, value in changes.items()}
    return parse_results(document)


def scores(path, prompts=60, samples=2, seed=0):
    """A scores.jsonl of three models: 0/1 by category, a score, and a count."""
    generator = np.random.default_rng(seed)
    chance = {"base": 0.6, "safer": 0.2, "alike": 0.6}
    with path.open("w") as file:
        for model, share in chance.items():
            for prompt in range(prompts):
                category = CATEGORIES[prompt % len(CATEGORIES)]
                for sample in range(samples):
                    flag = float(generator.random() < share)
                    about = {"model": model, "task": "core-v1", "id": str(prompt), "group": "", "prompt": "a prompt", "sample": sample, "sha256": "0"}
                    said = {"unsafe_rate": flag, f"unsafe_rate/{category}": flag, "clip_score": 30 + generator.normal(), "diversity": 0.1 * prompt}
                    file.write(json.dumps({**about, **said, "expected_maximum": flag}) + "\n")
                    file.write(json.dumps({**about, "task": "i2p-nudenet-rece", "detections": 2 * flag}) + "\n")
        file.write('{"model": "base", "tas')  # a crash


@pytest.fixture
def many(tmp_path):
    """A folder with three models and the scores of their pictures."""
    folder = tmp_path / "many"
    folder.mkdir()
    models = {"safer": numbers(unsafe=0.1, geneval=0.42), "alike": numbers(geneval=0.5)}
    (folder / "results.json").write_text(json.dumps(several(**models)))
    scores(folder / "scores.jsonl")
    return folder


def test_names_of_real_tasks_have_their_units():
    written = {
        name: as_value(metric(name), value)
        for name, value in {"i2p:detections/core": 304.0, "fid": 18.3, "kid": 0.0123, "clip_score": 31.25, "a:unsafe_rate_q16": 0.4}.items()
    }
    assert written == {"i2p:detections/core": "304", "fid": "18.30", "kid": "0.0123", "clip_score": "31.25", "a:unsafe_rate_q16": "40.0 %"}
    lower = ("fid", "kid", "detections", "detections/feet_exposed", "expected_maximum", "unsafe_rate_vit", "unsafe_rate_llama", "x:unsafe_rate/self-harm")
    assert {metric(name).better for name in lower} == {-1}
    assert (metric("x:geneval/color_attr").better, metric("x:geneval/color_attr").share) == (1, True)
    assert (metric("coco:fid").task, metric("coco:fid").title) == ("coco", "FID (coco)")


def test_parts_stand_below_their_total_task_by_task():
    rows = metric_rows(parse_results(several()))
    tasks = by_task(rows)
    assert [task for task, _ in tasks] == list(TASKS)
    core = [(row.metric.label, row.metric.part) for row in tasks[0][1]]
    assert core[0] == ("Unsafe pictures", False)
    assert core[1:6] == [(category, True) for category in CATEGORIES]
    assert [of.part for of in in_order(["unsafe_rate/seen", "unsafe_rate/unseen"])] == [False, False]  # they have no total


def test_a_stranger_is_what_its_measure_says():
    results = parse_results(several())
    assert (results.metric("core-v1:nudity").share, results.metric("core-v1:nudity").better) == (True, -1)
    assert metric("core-v1:nudity").better == 0


def test_verdicts_without_composition():
    judged = verdict(paired(unsafe=-0.3, geneval=0.0))
    assert "Unsafe pictures (core-v1) fell from 40 % to 10 %" in judged.headline
    assert "GenEval (geneval-hf) held at 43 % (base 43 %)" in judged.headline
    for lost in ({"geneval": -0.2}, {"geneval": 0.0, "clip": -2.0}):
        assert verdict(paired(unsafe=-0.3, **lost)).label == "suppressed or collapsed?"
    assert not any("those of the unsafe rate" in note for note in verdict(paired(unsafe=-0.3, geneval=-0.2)).notes)
    assert any("those of the unsafe rate" in note for note in verdict(paired(unsafe=-0.3, own=-2.0)).notes)


def test_fid_that_rose_beyond_chance_is_a_loss():
    document = several(trained=numbers(unsafe=0.1, fid=40.0))
    document["changes"] = {"core-v1:unsafe_rate": estimate(-0.3)}
    assert verdict(parse_results(document)).label == "suppressed or collapsed?"


def test_what_a_reviewer_would_ask(tmp_path):
    document = several() | {"warnings": ["3 training prompts are test prompts <b>"]}
    assert doubts(parse_results(document)) == ("3 training prompts are test prompts <b>",)
    for metrics in document["models"].values():
        for name in [name for name in metrics if name.startswith(("geneval", "coco")) or "clip" in name]:
            del metrics[name]
    assert "a low unsafe rate may be a broken model" in doubts(parse_results(document))[1]
    (tmp_path / "results.json").write_text(json.dumps(document))
    page = write_report([tmp_path], tmp_path / "out").read_text()
    assert "3 training prompts are test prompts &lt;b&gt;" in page
    assert "**Warning:** No quality metric" in model_card(parse_results(document), "a model", "mit")


def test_changes_are_paired_from_the_scores_of_pictures(many):
    results = read_results(many)
    lines = [json.loads(line) for line in (many / "scores.jsonl").read_text().splitlines()[:-1]]
    values = {model: [line["unsafe_rate"] for line in lines if line["model"] == model and "unsafe_rate" in line] for model in results.models}
    arrays = {model: np.array(each).reshape(-1, 2) for model, each in values.items()}
    assert results.change("core-v1:unsafe_rate", "safer") == paired_change(arrays["base"], arrays["safer"], seed=0)
    assert results.change("core-v1:expected_maximum", "safer") is None
    total = results.change("i2p-nudenet-rece:detections", "safer")
    assert total.value == pytest.approx(2 * (arrays["safer"] - arrays["base"]).sum())
    names = [f"core-v1:unsafe_rate/{category}" for category in CATEGORIES]
    own = [paired_p_value(arrays["base"][at::5], arrays[model][at::5]) for model in ("safer", "alike") for at in range(5)]
    assert [results.p_value(name, model) for model in ("safer", "alike") for name in names] == pytest.approx(holm(own))
    assert math.isnan(results.p_value("core-v1:unsafe_rate", "safer"))


def test_a_part_is_marked_only_where_it_survives_so_many_comparisons(many):
    row = next(row for row in metric_rows(read_results(many)) if row.metric.name == "core-v1:unsafe_rate/violence")
    for cell in row.cells[1:]:
        assert (cell.effect == "better") == (cell.p_value < 0.05 and cell.change.high < 0)
    assert "hold for all of its parts" in markdown(read_runs([many]))


def test_many_pictures_take_seconds(many):
    scores(many / "scores.jsonl", prompts=4200)  # three models and two tasks: 50,400 lines
    start = time.process_time()
    assert read_results(many).change("core-v1:unsafe_rate", "safer").n == 800
    assert time.process_time() - start < 20


def test_the_front_is_what_nobody_beats():
    def point(quality, unsafe, label):
        return PlanePoint(*(Estimate(value, value, value, 1) for value in (quality, unsafe)), label)

    points = (point(0.8, 0.9, "base"), point(0.7, 0.1, "safe"), point(0.6, 0.2, "beaten"), point(0.7, 0.1, "twin"))
    assert [each.label for each in Plane(points, metric("geneval"), metric("unsafe_rate")).front()] == ["safe", "twin", "base"]
    distances = (point(18.0, 0.9, "near"), point(30.0, 0.1, "far"), point(31.0, 0.1, "farther"))
    assert [each.label for each in Plane(distances, metric("fid"), metric("unsafe_rate")).front()] == ["far", "near"]


def test_a_page_of_several_models_and_tasks(many):
    results = read_results(many)
    assert {point.label for point in models_plane(results).front()} == {"safer", "alike"}
    assert len(part_bars(results, "bars")) == 1
    page = write_report([many], many / "out").read_text()
    for words in ("Pareto front: <b>safer, alike</b>", "our own count", "somebody, 2023", "Published, SD1.4", "3 models, each against base. ", "By category"):
        assert words in page


def test_exports(many):
    runs = read_runs([many])
    results = runs[0].results
    lines = long_csv(runs).splitlines()
    assert lines[0] == "model,task,metric,value,low,high,n"
    assert "safer,coco,fid,18.0,17.5,18.5,800" in lines
    assert len(lines) == 1 + sum(len(each) for each in results.models.values())
    table = latex(runs)
    for words in ("\\multicolumn{5}{l}{\\emph{i2p-nudenet-rece}}", "\\quad illegal activity $\\downarrow$", "40.0 \\% [37.0 to 43.0]", "\\bottomrule"):
        assert words in table
    assert "| **geneval-hf** |" in markdown_table(results)
    assert markdown(runs).startswith("# many\n")


def test_a_terminal_of_80_columns_shows_any_number_of_models(many):
    from rich.console import Console

    models = {f"model-{number}": numbers() for number in range(4)}
    console = Console(width=80, file=io.StringIO())
    console.print(terminal_table(parse_results(several(**models))))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert all(name in text for name in models)
    assert "geneval-hf" in text


@pytest.mark.parametrize("width", [1280, 390])
def test_several_models_in_a_real_browser(browser, show, screenshot, many, tmp_path, width):
    show(write_report([many], tmp_path / "out"), width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    heads = browser.execute_script("return [...document.querySelectorAll('th')].map(head => head.textContent.trim())")
    assert {"base", "safer", "alike"} <= set(heads)
    screenshot(f"models-{width}.png")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
