"""The runs of a study: real `safediffusion train` and `safediffusion evaluate` processes, some at once, each resumable."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import torch

from safediffusion.config import dump
from safediffusion.errors import UserError
from safediffusion.files import check_writable, explained, read_jsonl, write_text
from safediffusion.guided import GuideFile
from safediffusion.measurement import PICTURES, SCORES
from safediffusion.report.metric import AGAINST_BASE, metric
from safediffusion.report.results import read_results
from safediffusion.study.beforehand import base_is_there, is_there
from safediffusion.study.outcome import is_mean
from safediffusion.study.plan import BASE, Job, Study
from safediffusion.train.log import NAME as METRICS
from safediffusion.train.run_folder import RESULTS

_POLL = 2.0  # seconds between two looks at how far the runs are
_TRAINING = 0.9  # of a run's way; the rest is its measurement
_CALL = (sys.executable, "-m", "safediffusion.study.child")


@dataclass(frozen=True, eq=False)
class Workshop:
    """Where a study's runs are made, the processes at work, and what each of those that may start sees of the machine."""

    study: Study
    folder: Path
    places: SimpleQueue[dict[str, str]]
    running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    ended: threading.Event = field(default_factory=threading.Event)  # nothing begins any more

    def path(self, job: Job) -> Path:
        return self.folder / job.name

    def evaluation(self, subject: str, out: Path, against: bool, guide: Path | None = None) -> list[str]:
        """The words of the command that measures a model into `out`, under the guide of a file."""
        asked = self.study.settings.evaluate
        given = {"against": self.study.model if against else None, "tasks": asked.tasks, "out": out, "limit": asked.limit, "samples": asked.samples, "guide": guide}
        return ["evaluate", subject, *(word for name, value in given.items() if value is not None for word in (f"--{name}", str(value)))]


def carry_out(study: Study, folder: Path, workers: int, moved: Callable[[float, str], None] = lambda done, note: None, drawn: Sequence[str] = ()) -> dict[str, str]:
    """Train and measure what is not there yet, `workers` runs at once; what failed, by the run's name, and why in a sentence.

    `moved` hears now and then how many runs are done, parts of them included. UserError, as soon as the base is measured, where nothing measures one of
    the metrics that are to be `drawn`.
    """
    shop = Workshop(study, folder, SimpleQueue())
    for place in places(workers):
        shop.places.put(place)
    failures: dict[str, str] = {}
    with ThreadPoolExecutor(workers) as pool:
        base = pool.submit(_measure_base, shop)  # first, and quick: what other runs wait for is never behind them
        futures = {pool.submit(_finish, shop, job, base): job for job in study.jobs}
        try:
            left: set[Future[None]] = {base, *futures}
            while left:
                done, left = wait(left, _POLL)
                if base in done:
                    base.result()  # without it there is nothing to compare with
                    if drawn:
                        _check_drawn(study, folder, drawn)
                for future in done & set(futures):
                    if error := future.exception():
                        failures[futures[future].name] = _told(error)
                moved(sum(1.0 if future.done() else _share(shop, job) for future, job in futures.items()), _note(futures, failures))
        except BaseException:  # an interrupt: the runs end with their last checkpoint
            shop.ended.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in tuple(shop.running):
                process.send_signal(signal.SIGINT)
            raise
    return failures


def cards() -> list[str]:
    """The CUDA devices that this process sees, as CUDA_VISIBLE_DEVICES names them; empty on a machine without."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def places(workers: int) -> list[dict[str, str]]:
    """The environment of each of so many runs at once: one thread, and one of the cards, in turn."""
    thread, there = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, cards()
    return [thread | ({"CUDA_VISIBLE_DEVICES": there[number % len(there)]} if there else {}) for number in range(workers)]


def _measure_base(shop: Workshop) -> None:
    out = shop.folder / BASE
    if not base_is_there(shop.study, shop.folder):
        (out / RESULTS).unlink(missing_ok=True)
        (shop.folder / f"{BASE}.log").unlink(missing_ok=True)
        _call(shop, shop.evaluation(shop.study.model, out, against=False), shop.folder / f"{BASE}.log")


def _check_drawn(study: Study, folder: Path, drawn: Sequence[str]) -> None:
    base = read_results(folder / BASE)
    there = [of.name for of in base.metrics() if base.estimate(base.reference, of.name)]
    if missing := next((name for name in drawn if name not in there and metric(name).family not in AGAINST_BASE), None):
        raise UserError(f"[pareto] draws {missing!r}, which evaluate.tasks = {study.settings.evaluate.tasks!r} does not measure; it has {', '.join(there)}")
    if whole := next((name for name in drawn if name in there and not is_mean(base, base.metric(name))), None):
        means = ", ".join(name for name in there if is_mean(base, base.metric(name)))
        raise UserError(f"[pareto] draws {whole!r}, a number of all pictures together, and its intervals resample single ones; draw one of {means}")


def _finish(shop: Workshop, job: Job, base: Future[None]) -> None:
    """One run to its end; what is there already is not made again."""
    if is_there(shop.study, shop.folder, job):
        return
    out, log, recipe, guide = shop.path(job), shop.folder / f"{job.name}.log", job.recipe, job.entrant.guide
    steered = out / "guide.toml" if guide else None
    log.unlink(missing_ok=True)
    (out / RESULTS).unlink(missing_ok=True)  # of another recipe, extent or guide: if this run fails, they are not taken for its own
    if recipe is not None:
        file = shop.folder / f"{job.name}.toml"
        write_text(file, dump(recipe))
        _call(shop, ["train", str(file), "--out", str(out)], log)
    if steered is not None:
        check_writable(out)
        write_text(steered, dump(GuideFile(guide=guide)))
    base.result()
    _share_base(shop.folder / BASE, out)
    _call(shop, shop.evaluation(shop.study.model if recipe is None else str(out), out, against=True, guide=steered), log)


def _share_base(base: Path, out: Path) -> None:
    """The base's pictures by a link and its scores as a copy: it is painted and looked at once for all."""
    with explained(out):
        (out / PICTURES).mkdir(parents=True, exist_ok=True)
        for album in (base / PICTURES).iterdir():
            link = out / PICTURES / album.name
            if not link.exists():
                link.symlink_to(os.path.relpath(album, link.parent), target_is_directory=True)
        shutil.copytree(base / SCORES, out / SCORES, dirs_exist_ok=True)


def _call(shop: Workshop, words: Sequence[str], log: Path) -> None:
    """One command at a free place, its words in `log`. UserError with what it said last when it fails."""
    place = shop.places.get()  # there are as many as workers
    try:
        if shop.ended.is_set():
            raise UserError(f"{words[0]} was not begun: the study was interrupted")
        with open(log, "ab") as file:
            process = subprocess.Popen([*_CALL, *words], stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.PIPE, env={**os.environ, **place})
            with process:  # its standard input is held open as long as this process lives
                shop.running.add(process)
                if shop.ended.is_set():  # since then: whoever set it may have looked at `running` before
                    process.send_signal(signal.SIGINT)
                code = process.wait()
        shop.running.discard(process)
    finally:
        shop.places.put(place)
    if code < 0:
        raise UserError(f"{words[0]} was killed by signal {-code}{', as by a machine whose memory ran out' if code == -signal.SIGKILL else ''} (all of it in {log})")
    if code:
        raise UserError(f"{words[0]} {_last_words(log) or f'ended with code {code}'} (all of it in {log})")


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    last = (errors or lines)[-1:]
    return f"failed: {last[0]}" if last else ""


def _told(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    raise error


def _share(shop: Workshop, job: Job) -> float:
    """How far a run is."""
    log = shop.path(job) / METRICS
    lines = [line for line in read_jsonl(log) if line["kind"] == "train"] if log.is_file() else []
    recipe = job.recipe
    if recipe is None or not lines:
        return 0.0
    last = lines[-1]
    return _TRAINING * min(1.0, max(last["iteration"] / recipe.steps, recipe.limit.share(last["forwards"], last["cpu_seconds"], last["seconds"])))


def _note(futures: dict[Future[None], Job], failures: dict[str, str]) -> str:
    at_work = [job.name for future, job in futures.items() if future.running()]
    return ", ".join(at_work) + (f"; {len(failures)} failed" if failures else "")
