"""Finding a model: each way to name one, and one sentence for each way to fail."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from safediffusion.errors import UserError
from safediffusion.hub import EMBEDDED, at_hand, describe_model, known_sha256, read_index, resolve_model, verify
from safediffusion.subjects import locate
from safediffusion.weights import sha256


def refusal(name: str, revision: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        resolve_model(name, revision)
    message = str(caught.value)
    assert "\n" not in message
    assert ". " not in message
    return message


def test_local_folder_is_taken_as_it_is(tiny_pipeline: Path) -> None:
    assert resolve_model(str(tiny_pipeline)) == tiny_pipeline


def test_a_file_is_hashed_once_and_again_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, kept = tmp_path / "model.safetensors", tmp_path / "cache" / "safediffusion" / "hashes"
    file.write_bytes(b"weights")
    assert known_sha256(file) == sha256(file)
    assert not kept.exists()  # it has only just changed, and may go on to
    os.utime(file, (10, 10))
    assert known_sha256(file) == sha256(file)
    (place,) = kept.iterdir()
    place.write_text(place.read_text().replace(sha256(file), "as it was"))
    assert known_sha256(file) == "as it was"  # taken from there
    file.write_bytes(b"WEIGHTS")
    for changed in (lambda: os.utime(file, (20, 20)), lambda: file.write_bytes(b"more weights"), lambda: place.write_text("{")):
        changed()
        assert known_sha256(file) == sha256(file)
    os.utime(file, (20, 20))
    assert known_sha256(file) == known_sha256(file) == sha256(file)


@pytest.mark.skipif(not EMBEDDED.exists(), reason="the embedded weights are not in this tree")
@pytest.mark.parametrize(("name", "pipeline"), [("pictograms", "StableDiffusionPipeline"), ("pictograms-flow", "StableDiffusion3Pipeline")])
def test_the_embedded_models_go_by_name(name: str, pipeline: str) -> None:
    assert read_index(resolve_model(name))["_class_name"] == pipeline
    assert at_hand(name) == resolve_model(name)
    assert "no revision 'main'" in refusal(name, "main")


@pytest.mark.parametrize("name", ["./x", "../x", "/nowhere/x", "~/nowhere/x", "a/b/c", "runs/"])
def test_path_that_does_not_exist(name: str) -> None:
    assert refusal(name) == f"{name} does not exist"


def test_path_below_a_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert refusal("models/sd") == "models/sd does not exist"


@pytest.mark.parametrize("name", ["", "sd", "stable diffusion/1.5", "org/a--b", "org/-x"])
def test_name_that_is_no_model(name: str) -> None:
    assert "hub id such as org/name" in refusal(name)


def test_file_instead_of_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert "is a file; give a folder" in refusal(str(tmp_path / "model.safetensors"))


def test_revision_of_a_local_folder(tiny_pipeline: Path) -> None:
    assert "no revision 'main'" in refusal(str(tiny_pipeline), "main")


def test_hub_model_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal("org/model").endswith("give a local folder that holds the model instead")


def test_hub_model_in_the_cache(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--org--model", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = Path(shutil.copytree(tiny_pipeline, repository / "snapshots" / commit))
    assert resolve_model("org/model") == resolve_model("org/model", commit) == locate(f"org/model@{commit}") == snapshot
    with pytest.raises(UserError, match="give a local folder"):
        locate("org/model@other")
    shutil.rmtree(snapshot / "unet")  # as another program leaves it that wanted only the autoencoder
    assert "only part of it is in the local cache" in refusal("org/model")


def test_hub_model_of_which_a_shard_is_missing(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    snapshot = Path(shutil.copytree(tiny_pipeline, tmp_path / "models--org--model" / "snapshots" / commit))
    listing = {"weight_map": {"one": "diffusion_pytorch_model.safetensors", "two": "diffusion_pytorch_model-2.safetensors"}}
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(listing))
    assert "only part of it is in the local cache" in refusal("org/model", commit)
    (snapshot / "unet" / "diffusion_pytorch_model-2.safetensors").touch()
    assert resolve_model("org/model", commit) == snapshot


def test_a_cache_of_another_precision_alone_is_not_the_model(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    snapshot = Path(shutil.copytree(tiny_pipeline, tmp_path / "models--org--model" / "snapshots" / commit))
    weights = snapshot / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    assert "only part of it is in the local cache" in refusal("org/model", commit)


def test_description_has_every_part_with_weights(tmp_path: Path) -> None:
    parts = ("text_encoder", "text_encoder_2", "transformer", "vae")
    for part in parts:
        (tmp_path / part).mkdir()
        (tmp_path / part / "model.safetensors").write_bytes(part.encode())
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert list(describe_model(tmp_path)["sha256"]) == [f"{part}/model.safetensors" for part in parts]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A hub on this machine that refuses every request for the reason in the dictionary's "code"."""
    answer = {"code": ""}

    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(403)
            self.send_header("X-Error-Code", answer["code"])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuse)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield answer
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("GatedRepo", "org/model is gated: accept its terms"),
        ("RepoNotFound", "org/model is not on the hub, or it is private"),
        ("RevisionNotFound", "org/model has no revision 'v2'"),
        ("Teapot", "org/model is not in the local cache and the hub cannot be reached"),
    ],
)
def test_hub_that_refuses(hub: dict[str, str], code: str, sentence: str) -> None:
    hub["code"] = code
    assert refusal("org/model", "v2").startswith(sentence)


def test_embedded_files_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "pipeline" / "unet" / "weights.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"released")
    with pytest.raises(UserError, match="not part of this installation"):
        verify(tmp_path, "pipeline")
    (tmp_path / "hashes.json").write_text(json.dumps({"pipeline/unet/weights.safetensors": sha256(file), "clip/x": "other"}))
    assert verify(tmp_path, "pipeline") == tmp_path / "pipeline"
    file.write_bytes(b"changed")
    with pytest.raises(UserError, match="hash mismatch"):
        verify(tmp_path, "pipeline")
    file.unlink()
    with pytest.raises(UserError, match="is missing"):
        verify(tmp_path, "pipeline")


def test_description_tells_models_apart(tiny_pipeline: Path, tmp_path: Path) -> None:
    description = describe_model(tiny_pipeline)
    assert description["pipeline"] == "StableDiffusionPipeline"
    assert sorted(Path(name).parent.name for name in description["sha256"]) == ["text_encoder", "unet", "vae"]
    other = Path(shutil.copytree(tiny_pipeline, tmp_path / "other"))
    assert describe_model(other) == description
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    assert describe_model(other) != description


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(UserError, match="model_index"):
        read_index(tmp_path)


def test_another_schedule_is_another_model_and_another_origin_is_not(tiny_pipeline: Path, tmp_path: Path) -> None:
    description = describe_model(tiny_pipeline)
    other = Path(shutil.copytree(tiny_pipeline, tmp_path / "other"))
    network = other / "unet" / "config.json"
    network.write_text(json.dumps(json.loads(network.read_text()) | {"_name_or_path": "elsewhere", "_diffusers_version": "9.9.9"}))
    assert describe_model(other) == description
    schedule = other / "scheduler" / "scheduler_config.json"
    table = json.loads(schedule.read_text())
    schedule.write_text(json.dumps(table | {"beta_end": table["beta_end"] / 2}))
    changed = describe_model(other)
    assert changed["sha256"] == description["sha256"] and changed["settings"] != description["settings"]
