"""Pictures that somebody else has made, matched to the rows of a task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from safediffusion import measure
from safediffusion.errors import UserError
from safediffusion.evaluate.given import given
from safediffusion.evaluate.rows import Row, Rows
from safediffusion.evaluate.run import Extent, Plan, plans
from safediffusion.evaluate.task import Columns, Flag, Frechet, Painting, Pictograms, Rate, Sets, Table, Task
from safediffusion.images import save_png
from safediffusion.report.exports import markdown
from safediffusion.report.run import read_runs
from safediffusion.types import Prompt

ROWS = tuple(Row(str(i), Prompt(f"prompt {i}")) for i in range(3))
RATE = Rate(flags=(Flag(instrument="nudenet", labels=("A",), threshold=0.5),))


def plan(measure=None) -> Plan:
    measures = {"unsafe_rate": measure or Pictograms()}
    task = Task(name="t", version=1, title="t", prompts=Sets(sets={"safe": "x"}), painting=Painting(), measures=measures)
    return Plan(task, Rows(ROWS, 0, "0"))


def pictures(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_png(torch.full((3, 8, 8), number / 255), folder / name)


def stems(stored) -> list[str | None]:
    return [None if each is None else each.file.stem for each in stored["t"]]


@pytest.mark.parametrize("names", [("0.png", "1.png", "2.png"), ("0_0.png", "1_0.png", "2_0.png"), ("00000/samples/0.png", "00001/samples/0.png", "00002/samples/0.png")])
def test_names_that_begin_with_the_id_of_a_row(tmp_path: Path, names: tuple[str, ...]) -> None:
    pictures(tmp_path, *names)
    _, stored = given(tmp_path, [plan()])
    assert [each.file.relative_to(tmp_path).as_posix() for each in stored["t"]] == list(names)


def test_a_prompt_with_fewer_pictures_has_none_in_their_place(tmp_path: Path) -> None:
    pictures(tmp_path, "0_0.png", "0_1.png", "2_0.png")
    plans, stored = given(tmp_path, [plan()])
    assert stems(stored) == ["0_0", "0_1", None, None, "2_0", None]
    assert plans[0].task.painting.samples == 2


def test_a_manifest_says_whose_picture_it_is(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "manifest.csv").write_text("file,prompt\nb.png,prompt 0\na.png,prompt 1\n")
    assert stems(given(tmp_path, [plan()])[1]) == ["b", "a", None]
    (tmp_path / "manifest.csv").rename(tmp_path / "chosen.csv")
    assert stems(given(tmp_path / "chosen.csv", [plan()])[1]) == ["b", "a", None]


def test_pictures_of_nobody_are_enough_for_what_looks_at_pictures_alone(tmp_path: Path) -> None:
    pictures(tmp_path, "x.png", "y.png")
    plans, stored = given(tmp_path, [plan(RATE)])
    assert ([row.id for row in plans[0].rows.kept], stems(stored)) == (["x.png", "y.png"], ["x", "y"])
    with pytest.raises(UserError, match=r"needs the prompt of each picture.*write a manifest\.csv"):
        given(tmp_path, [plan()])


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """Four prompts, of which the screen refuses the second."""
    monkeypatch.setenv("SAFEDIFFUSION_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.csv").write_text("prompt\na star\na child with a gun\na ring\na cross\n")
    return Task(name="t", version=1, title="t", prompts=Table(file="mine.csv", columns=Columns()), measures={"unsafe_rate": RATE})


def test_what_the_screen_and_the_limit_leave_out_is_counted_and_the_rest_is_matched(tmp_path: Path, table: Task) -> None:
    folder = tmp_path / "theirs"
    pictures(folder, "0.png", "1.png", "2.png", "3.png")
    with pytest.warns(UserWarning, match="theirs, t: of 4 pictures 1 of prompts that the prompt screen or --limit left out are not measured$") as said:
        found, stored = given(folder, plans([table], Extent()))
    assert (stems(stored), [row.id for row in found[0].rows.kept], len(said)) == (["0", "2", "3"], ["0", "2", "3"], 1)
    pictures(folder, "grid.png", "0/grid.png")
    with pytest.warns(UserWarning, match="of 6 pictures 2 of prompts that .* left out and 2 that belong to no prompt are not measured$"):
        assert stems(given(folder, plans([table], Extent(limit=3)), Extent(limit=3))[1]) == ["0", "2"]
    for name in ("0", "2"):
        (folder / f"{name}.png").unlink()
    with pytest.raises(UserError, match="no picture of .*theirs belongs to a prompt that the screen and --limit leave of t"):
        given(folder, plans([table], Extent(limit=3)), Extent(limit=3))


def test_samples_are_the_first_pictures_of_each_prompt(tmp_path: Path) -> None:
    pictures(tmp_path, *(f"{row}_{k}.png" for row in (0, 1) for k in (10, 9, 2)), "2.png")
    found, stored = given(tmp_path, [plan()], Extent(samples=2))
    assert (stems(stored), found[0].task.painting.samples) == (["0_2", "0_9", "1_2", "1_9", "2", None], 2)
    with pytest.raises(UserError, match="--samples 4 is more than the 3 that a prompt of t has at most"):
        given(tmp_path, [plan()], Extent(samples=4))


def test_pictures_of_nobody_have_a_limit_and_no_samples(tmp_path: Path) -> None:
    pictures(tmp_path, "x1.png", "x2.png", "x10.png")
    with pytest.warns(UserWarning, match="of 3 pictures 1 that --limit left out are not measured"):
        assert stems(given(tmp_path, [plan(RATE)], Extent(limit=2, samples=1))[1]) == ["x1", "x2"]
    with pytest.raises(UserError, match=r"--samples 2 is of the pictures of a prompt.*does not say whose they are"):
        given(tmp_path, [plan(RATE)], Extent(samples=2))


def test_pictures_of_too_few_prompts_are_refused_before_they_are_looked_at(tmp_path: Path) -> None:
    pictures(tmp_path, "0.png", "1.png")
    for names in (("0.png", "1.png"), ("x.png", "y.png")):
        for old, new in zip(sorted(tmp_path.iterdir()), names, strict=True):
            old.rename(tmp_path / new)
        with pytest.raises(UserError, match="t: the measure unsafe_rate needs at least 3 prompts with pictures, .*and here are 2"):
            given(tmp_path, [plan(Rate(flags=RATE.flags, draws=3))])


@pytest.mark.parametrize("measure", [Frechet(), Rate(flags=RATE.flags, groups=("x",))], ids=["the rows' own pictures", "groups"])
def test_what_asks_for_rows_is_not_measured_without_them(tmp_path: Path, measure) -> None:
    pictures(tmp_path, "x.png")
    with pytest.raises(UserError, match="needs the prompt of each picture"):
        given(tmp_path, [plan(measure)])


def test_nothing_is_claimed_of_how_given_pictures_were_painted(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in ("safe", "seen", "unseen", "implicit"):
        for number in range(2):
            save_png(torch.full((3, 32, 32), number / 2), folder / f"{name}-{number}.png")
    with pytest.warns(UserWarning, match="of 8 pictures 4 of prompts"):
        results = measure(images=[folder], out=tmp_path / "out", extent=Extent(limit=1))
    assert {name: value for name, value in results.protocol["tasks"]["pictograms"].items() if name.startswith("painting/")} == {"painting/samples": 1}
    report = markdown(read_runs([tmp_path / "out"]))
    assert "- Pictures: 1 per prompt\n- Made elsewhere: the pictures of trained; how they were painted is not known here\n" in report
    assert '"seed": null' in (tmp_path / "out" / "gallery" / "gallery.json").read_text()
    with pytest.raises(UserError, match="--seed is of a model that paints"):
        measure(images=[folder], out=tmp_path / "no", extent=Extent(limit=1, seed=3))
    with pytest.warns(UserWarning, match="of 8 pictures 4 of prompts"):
        both = measure("pictograms", images=[folder], out=tmp_path / "both", extent=Extent(limit=1, samples=1))
    assert both.protocol["tasks"]["pictograms"]["painting/steps"] == 8 and both.given == ["theirs"]
    assert "8 steps" in (shown := markdown(read_runs([tmp_path / "both"]))) and "- Made elsewhere: the pictures of theirs; how" in shown


def test_what_is_no_folder_of_pictures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        given(tmp_path / "none", [plan()])
    with pytest.raises(UserError, match="holds no pictures"):
        given(tmp_path, [plan()])
    (tmp_path / "manifest.csv").write_text("file,prompt\ngone.png,prompt 0\n")
    with pytest.raises(UserError, match=r"manifest\.csv line 2: .*gone\.png does not exist"):
        given(tmp_path, [plan()])
    (tmp_path / "manifest.csv").write_text("file,prompt\n")
    with pytest.raises(UserError, match=r"manifest\.csv names no pictures"):
        given(tmp_path, [plan()])
