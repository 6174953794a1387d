"""One measurement from models to `results.json`, for the command and for Python alike."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safediffusion.config import read_toml
from safediffusion.errors import UserError
from safediffusion.files import check_writable, read_jsonl, read_text, write_json, write_text
from safediffusion.provenance import Seconds, commit, versions
from safediffusion.report.comparison import deciding
from safediffusion.report.results import Results, parse_results, read_results
from safediffusion.subjects import Names, Subjects, subjects
from safediffusion.train import run_folder

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from safediffusion.evaluate.pictures import Stored
    from safediffusion.evaluate.run import Advance, Extent, Findings, Plan
    from safediffusion.evaluate.scoring import Instrument
    from safediffusion.guided import GuideSettings

PICTURES, SCORES = "pictures", "scores"  # folders of an evaluation


def measure(
    model: Names = (),
    against: Path | str | None = None,
    *,
    out: Path | str,
    tasks: str = "pictograms",
    images: Sequence[Path | str] = (),
    extent: Extent | None = None,
    guide: GuideSettings | None = None,
    device: str | None = None,
    command: Sequence[str] = (),
    console: Console | None = None,
    spent: Seconds | None = None,
) -> Results:
    """Measure one model or several, and the change from `against` on the same prompts and seeds; writes and returns results.json.

    `images` are folders of pictures that somebody else has made; each is measured as if it were a model.
    Under `guide` the models paint, and `against` never does: what changes is then the guide's doing too.
    Pictures and scores are kept in `out`: what is there is not made again. The same measurement is not repeated: where `out`
    holds its results, they are read. `spent` is what the training of the model took; for a run folder it is read from its
    log. Several processes share the work; each gets the results.
    """
    from safediffusion import build, ranks
    from safediffusion.evaluate import run
    from safediffusion.evaluate.beforehand import check_columns
    from safediffusion.evaluate.task import choose
    from safediffusion.instrumentation import instrument

    began, out, extent, at = Seconds.now(), Path(out), extent or run.Extent(), build.device(device)
    measured = subjects(model, against, images, run.plans(choose(tasks), extent), guide, at, extent)
    histories = measured.histories
    history, recipes = histories.get("trained"), {name: read_toml(folder / run_folder.RECIPE) for name, folder in histories.items()}
    ranks.from_main(lambda: _check_folder(out, history))
    instruments = {name: instrument(name, at) for plan in measured.planned for name in plan.task.instruments}
    for plan in measured.planned:
        check_columns(plan.task, {name: instruments[name].columns for name in plan.task.instruments}, {"base"} < set(measured.names))
        for name, groups in plan.task.instruments.items():
            instruments[name].check([row for row in plan.rows.kept if not groups or row.group in groups])
    protocol = run.protocol(measured.planned, instruments, extent)
    found = ranks.from_main(lambda: _already(out, protocol, measured.described))
    if found is not None:
        return found
    ranks.from_main(lambda: check_writable(out))
    findings = _find(measured, instruments, out, at, extent.batch, console if ranks.is_main() else None)
    others = sum(span.cpu for span in ranks.gathered(Seconds.now() - began)[1:])

    def written() -> Results:
        took = Seconds.now() - began + Seconds(0.0, others)
        models = {name: {"name": str(measured.names[name]), **described} for name, described in measured.described.items()}
        facts = {"command": shlex.join(command), "models": models, "recipe": recipes.get("trained", {}), "device": str(at)}
        facts |= _cost(took, spent or _training_time(history)) | {"git": commit(), "versions": versions()}
        concerns = _concerns(recipes, measured, instruments)
        return _write(out, measured.planned, findings, {"schema": run.SCHEMA, "protocol": protocol, "warnings": concerns, "run": facts})

    return ranks.from_main(written)


def _find(measured: Subjects, instruments: Mapping[str, Instrument], out: Path, at: torch.device, batch: int, console: Console | None) -> dict[str, Findings]:
    """Paint with each model in turn and look at what it painted, `base` first: the drift of the others is measured from it."""
    from safediffusion.evaluate import run

    findings: dict[str, Findings] = {}
    with _bar(console, measured.planned, list(measured.names)) as advance:
        for name in measured.names:
            stored: Mapping[str, Sequence[Stored | None]]
            if name in measured.painters:
                stored = run.painted(measured.painters[name], measured.planned, out / PICTURES, at, batch, partial(advance, f"painting with {name}"))
            else:
                stored = measured.given[name]
            seen = run.see(measured.planned, stored, instruments, out / SCORES, batch, partial(advance, f"looking at {name}"))
            findings[name] = run.found(measured.planned, stored, seen, findings.get("base") if name != "base" else None)
    return findings


def _concerns(recipes: Mapping[str, Mapping[str, Any]], measured: Subjects, instruments: Mapping[str, Instrument]) -> list[str]:
    """What a reviewer would object to, knowing how each model was trained and what guided it; of several models, each objection says whose it is."""
    from safediffusion import build

    found: dict[str, list[str]] = {}
    identity = cache(build.encoder_identity)  # it reads the weights, and many models may have followed the same encoder
    for name in measured.names:
        recipe, painter = recipes.get(name, {}), measured.painters.get(name)
        followed = {"reward or a constraint of training": recipe.get("reward", {}), "reward of the guide": painter.guide.get("reward", {}) if painter else {}}
        for concern in dict.fromkeys([*_shared_prompts(recipe, measured.planned), *_shared_graders(followed, instruments, identity)]):
            found.setdefault(concern, []).append(name)
    return [f"{', '.join(names)}: {concern}" if len(measured.names) > 1 else concern for concern, names in found.items()]


def _shared_prompts(recipe: Mapping[str, Any], planned: Sequence[Plan]) -> Iterator[str]:
    """The prompts that a model was trained on and is tested by."""
    from safediffusion.data.sets import load_set

    sources = [source for kind in ("safe", "unsafe") if (source := recipe.get("data", {}).get(kind))]
    try:
        trained_on = {prompt.text for source in sources for prompt in load_set(source)}
    except UserError:  # the files of a run made elsewhere are not here
        yield f"the training prompts ({', '.join(map(str, sources))}) cannot be read, so whether they hold test prompts is not known"
        return
    for plan in planned:
        if shared := sum(row.prompt.text in trained_on for row in plan.rows.kept):
            yield f"{shared} of the {len(plan.rows.kept)} prompts of {plan.task.name} were trained on"


def _shared_graders(followed: Mapping[str, Mapping[str, Any]], instruments: Mapping[str, Instrument], identity: Callable[[str], str]) -> Iterator[str]:
    """The encoders and detectors of the rewards that a model followed, by their role, that grade it too; `identity` is of an encoder by its name."""
    from safediffusion.build import PICTOGRAMS

    grading = {each.identity["encoder"] for each in instruments.values() if "encoder" in each.identity}
    for role, reward in followed.items():
        for each in [part["reward"] for part in reward["parts"]] if "parts" in reward else [reward]:
            encoder, detector = each.get("encoder"), each.get("detector")
            if encoder and grading and identity(encoder) in grading:
                yield f"the encoder {encoder} had a part in the {role} and grades here as well"
            if detector in instruments and detector != PICTOGRAMS:  # in a reward that name is the guard's, which grades nothing
                yield f"the detector {detector} had a part in the {role} and grades here as well"


def _write(out: Path, planned: Sequence[Plan], findings: Mapping[str, Findings], document: dict[str, Any]) -> Results:
    """results.json, and beside it a line for each picture and those that the report shows."""
    from safediffusion.evaluate import run
    from safediffusion.evaluate.gallery import write_gallery

    write_gallery(planned, findings, out / "gallery")
    write_text(out / "scores.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in run.records(planned, findings)))
    document["models"] = {name: each.numbers() for name, each in findings.items()}
    document["changes"] = findings["trained"].changes(findings["base"]) if {"base", "trained"} <= set(findings) else {}
    write_json(out / run_folder.RESULTS, document)
    return read_results(out)


def results_of(run: Path, exported: Path | None) -> Results | None:
    """The results in a run folder, when they are of the model exported to that folder (None: of whatever was measured)."""
    from safediffusion.hub import describe_model

    path = run / run_folder.RESULTS
    if not path.is_file():
        return None
    document = json.loads(read_text(path))
    if exported is not None:
        if not (exported / "model_index.json").is_file():
            return None
        measured = document.get("run", {}).get("models", {}).get("trained", {})
        if "guide" in measured or measured.get("sha256") != describe_model(exported)["sha256"]:
            return None
    return parse_results(document, str(path))


def _training_time(history: Path | None) -> Seconds:
    records = read_jsonl(history / "metrics.jsonl") if history and (history / "metrics.jsonl").is_file() else []
    return Seconds(records[-1]["seconds"], records[-1]["cpu_seconds"]) if records else Seconds()


def _cost(measuring: Seconds, training: Seconds) -> dict[str, Any]:
    whole = measuring + training
    parts = {"training": round(training.wall, 1), "measuring": round(measuring.wall, 1)}
    return {"wall_seconds": round(whole.wall, 1), "cpu_seconds": round(whole.cpu, 1), "seconds": parts}


def _check_folder(out: Path, history: Path | None) -> None:
    if run_folder.is_run(out) and (history is None or history.resolve() != out.resolve()):
        raise UserError(f"{out} is the folder of another run; choose another --out")


def _already(out: Path, protocol: dict[str, Any], described: dict[str, Any]) -> Results | None:
    """The results that `out` holds, when they are of these models by this protocol; UserError when they are of others."""
    path = out / run_folder.RESULTS
    if not path.is_file():
        return None
    try:
        document = json.loads(read_text(path))
        models = {name: {key: value for key, value in each.items() if key != "name"} for name, each in document["run"]["models"].items()}
        was = {"protocol": deciding(document["protocol"]), "models": models}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a measurement of this version; choose another --out, or remove the file") from None
    if found := run_folder.difference(was, json.loads(json.dumps({"protocol": deciding(protocol), "models": described}))):
        raise UserError(f"{out} holds another measurement: {found}; choose another --out, or remove {path}")
    return read_results(out)


@contextmanager
def _bar(console: Console | None, planned: Sequence[Plan], names: Sequence[str]) -> Iterator[Advance]:
    from safediffusion.progress import bars

    totals = {"painting with": sum(plan.count for plan in planned), "looking at": sum(plan.looks for plan in planned)}
    with bars(console) as progress:
        tasks = {f"{work} {name}": progress.add_task(f"{work} {name}", total=total, start=False) for name in names for work, total in totals.items()}

        def advance(name: str, count: int) -> None:
            progress.start_task(tasks[name])
            progress.advance(tasks[name], count)

        yield advance
