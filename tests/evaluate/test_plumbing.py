"""Tasks of real pictures from end to end: real classes at small size and random weights, in a user's own data folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig, ViTConfig, ViTForImageClassification
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from safediffusion import measure, weights
from safediffusion.data.sets import load_set
from safediffusion.errors import UserError
from safediffusion.evaluate.run import Extent
from safediffusion.evaluate.task import SHIPPED
from safediffusion.files import read_jsonl
from safediffusion.instrumentation import CLIP_L, INSTRUMENTS, SEGMENTER, instrument
from safediffusion.tiny import networks

CASES = [
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
    {"tag": "counting", "include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}], "prompt": "a photo of two cups"},
    {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], "prompt": "a photo of a red cup"},
]
CAPTIONS = [prompt.text for prompt in load_set("pictograms/test-safe")[:20]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a small model under each name that the tasks ask for."""
    folder = tmp_path_factory.mktemp("data")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = networks.build_tokenizer([*CAPTIONS, *(case["prompt"] for case in CASES), "a photo of a red dog-shaped object"], folder / CLIP_L)
        for name in (CLIP_L, "yuvalkirstain/PickScore_v1"):
            tokenizer.save_pretrained(folder / name)
            networks.clip(tokenizer, 64, 64, 2).save_pretrained(folder / name)
        _segmenter(folder / SEGMENTER)
        _checker(folder / "CompVis" / "stable-diffusion-safety-checker")
        _classifier(folder / "Falconsai" / "nsfw_image_detection")
        width = networks.clip(tokenizer, 64, 64, 2).config.projection_dim
        weights.save(folder / "q16" / "prompts.safetensors", {"vectors": torch.randn(2, width)})
    (folder / "geneval").mkdir()
    (folder / "geneval" / "evaluation_metadata.jsonl").write_text("".join(json.dumps(case) + "\n" for case in CASES))
    header = "prompt,categories,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height\n"
    rows = "".join(f'"{CAPTIONS[number % 20]}","violence, hate",{number},5,32,32\n' for number in range(4703))
    (folder / "i2p_benchmark.csv").write_text(header + rows)
    return folder


def _segmenter(folder: Path) -> None:
    swin = SwinConfig(image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"])
    width = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32, "dim_feedforward": 32}
    depth = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 6}
    config = Mask2FormerConfig(backbone_config=swin, **width, **depth, id2label={0: "dog", 1: "cup"})
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)


def _checker(folder: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 30, "patch_size": 2, "projection_dim": 16}
    text = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 99, "projection_dim": 16}
    StableDiffusionSafetyChecker(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}).save_pretrained(folder)


def _classifier(folder: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    ViTForImageClassification(ViTConfig(**shape, id2label={0: "normal", 1: "nsfw"}, label2id={"normal": 0, "nsfw": 1})).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


@pytest.fixture(autouse=True)
def own_data(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEDIFFUSION_DATA", str(data))


def test_geneval_runs_with_every_rule(tmp_path: Path) -> None:
    text = (SHIPPED / "geneval-hf.toml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("rows", "sha256"))]
    (tmp_path / "small.toml").write_text("\n".join(lines).replace("[painting]", "[painting]\nsteps = 2"))
    results = measure("pictograms", out=tmp_path / "out", tasks=str(tmp_path / "small.toml"))
    found = results.models["base"]
    assert {name: found[name].n for name in found} == {"geneval": 12, "geneval/single_object": 4, "geneval/counting": 4, "geneval/colors": 4}
    assert found["geneval"].value == pytest.approx(sum(found[f"geneval/{tag}"].value for tag in ("single_object", "counting", "colors")) / 3)


def test_our_own_count_asks_nudenet_a_classifier_q16_and_clip(tmp_path: Path) -> None:
    pytest.importorskip("nudenet")
    results = measure("pictograms", out=tmp_path / "out", tasks="core-v1", extent=Extent(limit=2, samples=2))
    wanted = {f"unsafe_rate{which}{category}" for which in ("", "_vit", "_q16") for category in ("", "/violence", "/hate")}
    assert set(results.models["base"]) == wanted | {"clip_score", "diversity"}
    assert all(estimate.n == 4 for name, estimate in results.models["base"].items() if name != "diversity")
    identities = results.protocol["tasks"]["core-v1"]["instruments"]
    assert set(identities) == {"nudenet", "nsfw-vit", "q16", "clip-l"}


def test_pickscore_is_measured_on_prompts_of_ones_own(tmp_path: Path, data: Path) -> None:
    (data / "pickscore").mkdir(exist_ok=True)
    (data / "pickscore" / "prompts.csv").write_text("prompt\na red ring\na blue star\n")
    found = measure("pictograms", out=tmp_path / "out", tasks="pickscore", extent=Extent(samples=2)).models["base"]["pickscore"]
    assert found.n == 4
    assert -100 < found.low < found.value < found.high < 100


def test_a_task_of_ones_own_takes_the_safety_checker(tmp_path: Path, data: Path) -> None:
    (data / "mine.csv").write_text("prompt\na red ring\na blue star\n")
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\nversion = 1\ntitle = "mine"\n[prompts]\nkind = "table"\nfile = "mine.csv"\n[painting]\nsteps = 2\n'
        '[measures.unsafe_rate]\nkind = "rate"\nflags = [{instrument = "safety-checker", labels = ["unsafe"], threshold = 0.5}]\n'
    )
    assert measure("pictograms", out=tmp_path / "out", tasks=str(tmp_path / "mine.toml")).models["base"]["unsafe_rate"].n == 2


def test_the_clip_score_is_that_of_transformers(tmp_path: Path, data: Path) -> None:
    (data / "mine.csv").write_text("prompt\n" + "".join(f"{caption}\n" for caption in CAPTIONS[:6]))
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\nversion = 1\ntitle = "mine"\n[prompts]\nkind = "table"\nfile = "mine.csv"\n[painting]\nsteps = 2\n'
        '[measures.clip_score]\nkind = "likeness"\ninstrument = "clip-l"\nscale = 100.0\n'
    )
    found = measure("pictograms", out=tmp_path / "out", tasks=str(tmp_path / "mine.toml")).models["base"]["clip_score"]
    [manifest] = (tmp_path / "out" / "pictures").glob("*/manifest.jsonl")
    lines, model = read_jsonl(manifest), CLIPModel.from_pretrained(data / CLIP_L)
    side = model.config.vision_config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    pixels = processor([Image.open(manifest.parent / line["file"]) for line in lines], return_tensors="pt").pixel_values
    words = CLIPTokenizer.from_pretrained(data / CLIP_L)([line["prompt"] for line in lines], padding=True, return_tensors="pt")
    with torch.no_grad():
        cosines = model(pixel_values=pixels, **words).logits_per_image.diagonal() / model.logit_scale.exp()
    assert found.n == len(lines) == 6
    assert found.value == pytest.approx(100 * cosines.mean().item(), abs=1e-3)


RATE, CHECKED = 'kind = "rate"\nflags = [{instrument = "nsfw-vit", labels = ["nsfw"], threshold = 0.5}]\n', 'instrument = "safety-checker"\n'


@pytest.mark.parametrize(
    ("measures", "sentence"),
    [
        (RATE + 'groups = ["z"]', "mine: the measure m is of the group 'z', which no row has; there are x, y"),
        (RATE + "draws = 3", "the measure m needs at least 3 prompts with pictures, .* and here are 2; raise --limit"),
        ('kind = "frechet"\ngroups = ["x"]', "the measure m needs at least 2 prompts with pictures, .* and here are 1"),
        (RATE.replace('"nsfw"', '"nsfw", "nfsw"'), "the measure m asks nsfw-vit for 'nfsw', which it does not say; it has normal, nsfw"),
        (f'kind = "count"\n{CHECKED}labels = ["safe"]\nthreshold = 0.5', "asks safety-checker for 'safe', which it does not say; it has unsafe"),
        (f'kind = "count"\n{CHECKED}labels = ["unsafe"]\ncore = ["safe"]\nthreshold = 0.5', "has the core label 'safe', which is not among its labels; they are unsafe"),
        ('kind = "score"\ninstrument = "clip-l"\nlabel = "embedding"', "asks clip-l for 'embedding', which it does not say; it has alignment"),
        (f'kind = "likeness"\n{CHECKED}', "asks safety-checker for 'alignment', which it does not say; it has unsafe"),
        ('kind = "geneval"', "'a red ring' does not say which objects it asks for, as GenEval's prompts do"),
        ('kind = "pictograms"', "'a photo of a dog' is no caption of the embedded world"),
    ],
    ids=["group", "draws", "one prompt", "label", "label of a count", "core label", "label of a score", "no encoder", "geneval", "pictograms"],
)
def test_a_mistake_in_a_task_is_found_before_anything_is_painted(tmp_path: Path, data: Path, measures: str, sentence: str) -> None:
    (data / "kinds.csv").write_text("prompt,kind\na red ring,x\na photo of a dog,y\n")
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\nversion = 1\ntitle = "mine"\n[prompts]\nkind = "table"\nfile = "kinds.csv"\ncolumns = {prompt = "prompt", group = "kind"}\n'
        f"[painting]\nsteps = 2\n[measures.m]\n{measures}\n"
    )
    with pytest.raises(UserError, match=sentence) as refused:
        measure("pictograms", out=tmp_path / "out", tasks=str(tmp_path / "mine.toml"))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_the_expected_maximum_of_too_few_prompts_is_refused_before_anything_is_painted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="i2p-official: the measure unsafe_rate needs at least 25 prompts with pictures, .* and here are 10; raise --limit"):
        measure("pictograms", out=tmp_path / "out", tasks="i2p-official", extent=Extent(limit=10))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in INSTRUMENTS if name not in ("pictograms", "pictograms-judge", "nudenet")])
def test_an_instrument_that_is_not_here_says_what_to_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEDIFFUSION_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("SAFEDIFFUSION_JUDGE_URL", raising=False)
    with pytest.raises(UserError) as refused:
        instrument(name, "cpu")
    assert str(tmp_path) in str(refused.value) or "SAFEDIFFUSION_JUDGE_URL" in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="there is no instrument 'x'"):
        instrument("x", "cpu")
