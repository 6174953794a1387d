"""The prompts of a task: read, chosen, refused with their row number, or asked for in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from safediffusion.errors import UserError
from safediffusion.evaluate.rows import data_folder, load_rows
from safediffusion.evaluate.task import Task, choose, load_task, shipped
from safediffusion.instrumentation import INSTRUMENTS

I2P = "prompt,categories,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height,hard\n"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAFEDIFFUSION_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def task(tmp_path: Path):
    """A task over a table of the test's own."""

    def made(source: str, painting: str = "") -> Task:
        file = tmp_path / "mine.toml"
        file.write_text(
            f'name = "mine"\nversion = 2\ntitle = "a table"\n[prompts]\nkind = "table"\nfile = "mine.csv"\n{source}\n[painting]\n{painting}\n'
            '[measures.composition]\nkind = "score"\ninstrument = "nudenet"\nlabel = "x"\n'
        )
        return load_task(file)

    return made


def test_every_shipped_task_says_what_it_is() -> None:
    tasks = shipped()
    wanted = {"i2p-official", "i2p-receler", "i2p-q16ft", "i2p-nudenet-rece", "i2p-ip-safetydpo", "uda-142", "core-v1", "coprov2", "mma-diffusion"}
    wanted |= {"ring-a-bell", "sneakyprompt", "p4d", "geneval-hf", "coco", "pickscore", "over-refusal", "pictograms"}
    assert set(tasks) == wanted
    assert all(task.title and task.licence and task.groups for task in tasks.values())


def test_tasks_are_chosen_by_name_group_and_file(task) -> None:
    assert [each.name for each in choose("pictograms, pictograms")] == ["pictograms"]
    assert {"i2p-official", "core-v1"} <= {each.name for each in choose("safety")}
    task("")
    with pytest.raises(UserError, match="did you mean geneval-hf"):
        choose("geneval_hf")
    with pytest.raises(UserError, match="names no task"):
        choose(" , ")


def test_a_row_gives_its_own_seed_guidance_and_size(data: Path, task) -> None:
    (data / "mine.csv").write_text(I2P + '"a, ""quoted"" star\non two lines",shocking ,9223372036854775807,7.5,512,768,1\na \U0001f600 ring,"hate, violence",2,9,8,8,0\n')
    columns = 'columns = {prompt="prompt", categories="categories", seed="sd_seed", guidance="sd_guidance_scale", width="sd_image_width", height="sd_image_height"}'
    rows = load_rows(task(columns)).kept
    assert rows[0].prompt.text == 'a, "quoted" star\non two lines'
    assert (rows[0].seed, rows[0].guidance, rows[0].width, rows[0].height) == (2**63 - 1, 7.5, 512, 768)
    assert (rows[1].categories, rows[1].id) == (("hate", "violence"), "1")


@pytest.mark.parametrize("condition, kept", [('"> 0"', ["a"]), ('"<= 0"', ["b"]), ('"1"', ["a"])])
def test_where_keeps_some_rows(data: Path, task, condition: str, kept: list[str]) -> None:
    (data / "mine.csv").write_text("prompt,hard\na,1\nb,0\n")
    assert [row.prompt.text for row in load_rows(task(f"where = {{hard = {condition}}}")).kept] == kept


@pytest.mark.parametrize(
    "table, source, sentence",
    [
        ("text\nx\n", "", "has no column 'prompt'; it has text"),
        ("prompt,id\nx,1\ny,1\n", 'columns = {prompt="prompt", id="id"}', "line 3: the id '1' is that of line 2 too"),
        ("prompt,s\nx,1.5\n", 'columns = {prompt="prompt", seed="s"}', "line 2: s should be a whole number"),
        ("prompt,s\nx,-1\n", 'columns = {prompt="prompt", seed="s"}', "line 2: s should be a whole number"),
        ("prompt,g\nx,nan\n", 'columns = {prompt="prompt", guidance="g"}', "line 2: g should be a number"),
        ("prompt\nx\n \n", "", "line 3: it has no prompt"),
        ("prompt\n" + "x" * 10_001 + "\n", "", "line 2: its prompt has 10,001 characters"),
        ("prompt\nx\n", "rows = 2", "has 1 rows, but this protocol is defined on 2"),
        ("prompt\nx\n", 'sha256 = "00"', "hash mismatch"),
        ("prompt,hard\nx,0\n", 'where = {hard = "1"}', "holds no prompts where"),
        ("prompt\na child with a gun\n", "", "refused all 1 prompts"),
    ],
)
def test_a_table_that_is_not_as_it_should_be_is_refused_with_its_line(data: Path, task, table: str, source: str, sentence: str) -> None:
    (data / "mine.csv").write_text(table)
    with pytest.raises(UserError, match=sentence):
        load_rows(task(source))


def test_ten_thousand_characters_are_read(data: Path, task) -> None:
    (data / "mine.csv").write_text("prompt\n" + "x" * 10_000 + "\n")
    assert len(load_rows(task("")).kept[0].prompt.text) == 10_000


def test_parquet_and_jsonl_say_the_same(data: Path, task) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"prompt": ["a star", "a ring"], "seed": [3, 4]}), data / "mine.parquet")
    (data / "mine.jsonl").write_text("".join(json.dumps({"prompt": text, "seed": seed}) + "\n" for text, seed in (("a star", 3), ("a ring", 4))))
    found = []
    for suffix in ("parquet", "jsonl"):
        made = task('columns = {prompt="prompt", seed="seed"}')
        text = (data / "mine.toml").read_text().replace("mine.csv", f"mine.{suffix}")
        (data / "mine.toml").write_text(text)
        found.append(load_rows(load_task(data / "mine.toml")))
        assert made.id == "mine@2"
    assert found[0] == found[1]


@pytest.mark.parametrize("name", [name for name, each in shipped().items() if each.prompts.kind != "sets"])
def test_without_network_a_task_says_which_file_to_put_where(data: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as refused:
        load_rows(shipped()[name])
    assert str(data_folder() / shipped()[name].prompts.file) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_task_in_the_documentation_is_one(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "evaluate.md"
    (tmp_path / "mine.toml").write_text(page.read_text(encoding="utf-8").split("```toml\n")[1].split("```")[0])
    task = load_task(tmp_path / "mine.toml")
    assert set(task.instruments) == {"nudenet", "q16", "clip-l"} <= set(INSTRUMENTS)


def test_every_instrument_of_a_shipped_task_is_known() -> None:
    assert {name for task in shipped().values() for name in task.instruments} <= set(INSTRUMENTS)


def test_the_digest_knows_the_rows_own_pictures_and_cases(tmp_path: Path) -> None:
    from safediffusion.evaluate.geneval import Asked, Case
    from safediffusion.evaluate.rows import Row, digest
    from safediffusion.types import Prompt

    picture = tmp_path / "a.png"
    picture.write_bytes(b"one")
    row = Row("a", Prompt("a red cup"), image=picture)
    before = digest([row])
    assert digest([row]) == before != digest([Row("a", Prompt("a red cup"))])
    picture.write_bytes(b"two")
    assert digest([row]) != before
    first, second = (Row("a", Prompt("a red cup"), case=Case("single", "a red cup", (Asked("cup", count),))) for count in (1, 2))
    assert digest([first]) != digest([second])
