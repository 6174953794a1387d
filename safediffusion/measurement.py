"""One measurement from models to `results.json`, for the command and for Python alike."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safediffusion.errors import UserError
from safediffusion.files import check_writable, read_jsonl, read_text, write_json, write_text
from safediffusion.provenance import Seconds, commit, versions
from safediffusion.report.results import Results, parse_results
from safediffusion.train import run_folder

if TYPE_CHECKING:
    from rich.console import Console

    from safediffusion.evaluate.run import Advance, Extent, Sets


def locate(name: str, revision: str | None = None) -> Path:
    """The diffusers folder of a model: a folder, a run folder (its model), a hub id, or `pictograms`."""
    from safediffusion.hub import resolve_model

    folder = Path(name).expanduser()
    if name != "pictograms" and run_folder.is_run(folder):
        if not (folder / run_folder.MODEL / "model_index.json").is_file():
            raise UserError(f"{name} is a run that has no model yet; finish it by running its command again, or write one with `safediffusion export`")
        return folder / run_folder.MODEL
    return resolve_model(name, revision)


def measure(
    model: Path | str,
    against: Path | str | None = None,
    *,
    out: Path | str,
    extent: Extent | None = None,
    device: str | None = None,
    command: Sequence[str] = (),
    console: Console | None = None,
    spent: Seconds | None = None,
) -> Results:
    """Measure `model`, and the change from `against` on the same prompts and seeds; writes and returns results.json.

    The same measurement is not repeated: where `out` holds its results, they are read. `spent` is what the training of
    the model took; for a run folder it is read from its log. Several processes share the painting; each gets the results.
    """
    from safediffusion import build, ranks
    from safediffusion.evaluate import gallery, run
    from safediffusion.hub import describe_model

    began, out, extent = Seconds.now(), Path(out), extent or run.Extent()
    folders = {} if against is None else {"base": locate(str(against))}
    folders["trained" if folders or str(model) != build.PICTOGRAMS else "base"] = locate(str(model))
    described = {name: describe_model(folder) for name, folder in folders.items()}
    history = _history(folders.get("trained"))
    at = build.device(device)
    ranks.from_main(lambda: _check_folder(out, history))
    judges, sets = build.judges(at), run.load_sets(extent)
    protocol = run.protocol(sets, judges, extent)
    found = ranks.from_main(lambda: _already(out, protocol, described))
    if found is not None:
        return found
    ranks.from_main(lambda: check_writable(out))
    with _bar(console if ranks.is_main() else None, sets, extent, list(folders)) as advance:
        findings = run.find(folders, sets, judges, extent, at, advance)
    others = sum(span.cpu for span in ranks.gathered(Seconds.now() - began)[1:])

    def written() -> Results:
        gallery.write_gallery(findings.pictures, judges, extent.seed, out / "gallery")
        write_text(out / "scores.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in run.scores(findings, judges, extent)))
        names = {"base": against if against is not None else model, "trained": model}
        models = {name: {"name": str(names[name]), **described[name]} for name in folders}
        facts = {"command": shlex.join(command), "models": models, "recipe": _recipe(history), "device": str(at)}
        facts |= _cost(Seconds.now() - began + Seconds(0.0, others), spent or _training_time(history)) | {"git": commit(), "versions": versions()}
        document = {"schema": run.SCHEMA, "protocol": protocol, "models": findings.models, "changes": findings.changes, "run": facts}
        write_json(out / run_folder.RESULTS, document)
        return parse_results(json.loads(read_text(out / run_folder.RESULTS)))

    return ranks.from_main(written)


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
        measured = document.get("run", {}).get("models", {}).get("trained", {}).get("sha256")
        if measured != describe_model(exported)["sha256"]:
            return None
    return parse_results(document, str(path))


def _history(model: Path | None) -> Path | None:
    """The run folder that a model comes from."""
    return model.parent if model is not None and model.name == run_folder.MODEL and run_folder.is_run(model.parent) else None


def _recipe(history: Path | None) -> dict[str, Any]:
    from safediffusion.config import read_toml

    return read_toml(history / run_folder.RECIPE) if history else {}


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
        models = {name: {key: each[key] for key in described.get(name, {})} for name, each in document["run"]["models"].items()}
        was = {"protocol": document["protocol"], "models": models}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a measurement of this version; choose another --out, or remove the file") from None
    if found := run_folder.difference(was, json.loads(json.dumps({"protocol": protocol, "models": described}))):
        raise UserError(f"{out} holds another measurement: {found}; choose another --out, or remove {path}")
    return parse_results(document)


@contextmanager
def _bar(console: Console | None, sets: Sets, extent: Extent, names: Sequence[str]) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    total = extent.samples * sum(len(prompts) for prompts in sets.prompts.values())
    with Progress(*columns, console=console or Console(quiet=True)) as progress:
        tasks = {name: progress.add_task(f"painting with {name}", total=total, start=False) for name in names}

        def advance(name: str, count: int) -> None:
            progress.start_task(tasks[name])
            progress.advance(tasks[name], count)

        yield advance
