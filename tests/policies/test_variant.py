"""A model and what is put onto it: adapters, a UNet, a checkpoint of one file; against diffusers and our own export."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor

from safediffusion.errors import UserError
from safediffusion.evaluate.painter import Painter
from safediffusion.hub import EMBEDDED, resolve_model
from safediffusion.policies.latent import LatentPolicy, PolicySettings, load_policy
from safediffusion.policies.variant import AS_IT_IS, Variant, variant

BASE = EMBEDDED / "pipeline"
UNET = BASE / "unet" / "diffusion_pytorch_model.safetensors"
LORA = PolicySettings(lora_rank=4, lora_alpha=6.0)
TEXTS = ["a red circle", "two blue rings"]

Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, where converted checkpoints lie, and the hub's, which is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache" / "safediffusion" / "checkpoints"


@cache
def base() -> LatentPolicy:
    return load_policy(BASE, AS_IT_IS)


def named(name: str) -> Variant:
    return variant(name, resolve_model)


def refusal(name: str) -> str:
    with pytest.raises(UserError) as caught:
        named(name).load()
    message = str(caught.value)
    assert "\n" not in message
    assert ". " not in message
    return message


@torch.no_grad()
def output(policy: LatentPolicy) -> Tensor:
    latents = torch.randn(2, *policy.sample_shape, generator=torch.Generator().manual_seed(1))
    return policy.predict(latents, torch.tensor([981, 20]), policy.encode(TEXTS), 3.0)


def adapted(seed: int = 0, settings: PolicySettings = LORA) -> LatentPolicy:
    """A policy whose adapters are not zero."""
    policy, generator = load_policy(BASE, settings), torch.Generator().manual_seed(seed)
    policy.load_state({name: torch.randn(weight.shape, generator=generator) * 0.1 for name, weight in policy.state().items()})
    return policy


def kohya(model: torch.nn.Module, prefix: str, ends: tuple[str, ...], alpha: Callable[[str], float]) -> tuple[Tensors, Tensors]:
    """Adapters as kohya's scripts write them, by the names of their file, and what each adds to its layer."""
    tensors, added, generator = {}, {}, torch.Generator().manual_seed(2)
    for name, layer in model.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and name.endswith(ends):
            width, kernel = layer.weight.shape[1], layer.weight.shape[2:]
            down, up = (torch.randn(shape, generator=generator) * 0.1 for shape in ((2, width, *kernel), (len(layer.weight), 2, *(1 for _ in kernel))))
            key = f"{prefix}_{name.replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha(name))}
            added[name] = alpha(name) / 2 * torch.einsum("or,ri...->oi...", up.flatten(1), down)
    return tensors, added


# Adapters


def test_our_adapters_give_what_the_exported_pipeline_gives(tmp_path: Path) -> None:
    policy = adapted()
    policy.save_lora(tmp_path / "lora")
    policy.save_pipeline(tmp_path / "merged", dtype="float32")  # left out it would be that of the base in its folder
    loaded = named(f"pictograms+{tmp_path / 'lora'}").load()
    torch.testing.assert_close(output(loaded), output(policy))
    torch.testing.assert_close(output(loaded), output(load_policy(tmp_path / "merged", AS_IT_IS)))
    assert (output(loaded) - output(base())).abs().max() > 0.01
    assert loaded.denoiser.state_dict().keys() == base().denoiser.state_dict().keys()  # merged: nothing is left beside the weights
    assert loaded.decode(torch.zeros(1, *loaded.sample_shape)).shape == (1, 3, 32, 32)
    again = named(f"pictograms+{tmp_path / 'lora' / 'pytorch_lora_weights.safetensors'}").load()
    assert torch.equal(output(again), output(loaded))


def test_adapters_of_unet_and_text_encoder_give_what_diffusers_gives(tmp_path: Path) -> None:
    text, (unet_part, _) = base().encode.text.encoders["text_encoder"], kohya(base().denoiser, "lora_unet", ("to_q", "to_k", "to_v", "to_out.0"), lambda _: 1.0)
    text_part, _ = kohya(text, "lora_te_text_model", ("fc1",), lambda _: 4.0)  # diffusers 0.42 misses the attention layers
    save_file(unet_part | text_part, tmp_path / "style.safetensors")
    loaded = named(f"pictograms+{tmp_path / 'style.safetensors'}").load()
    theirs = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    theirs.load_lora_weights(tmp_path, weight_name="style.safetensors")
    with torch.no_grad():
        condition = theirs.encode_prompt(TEXTS, "cpu", 1, False)[0]
    assert (condition - base().encode(TEXTS)).abs().max() > 0.01
    torch.testing.assert_close(loaded.encode(TEXTS), condition)
    latents, time = torch.randn(2, 4, 8, 8), torch.tensor([500, 20])
    with torch.no_grad():
        torch.testing.assert_close(loaded.predict(latents, time, condition), theirs.unet(latents, time, encoder_hidden_states=condition).sample)


def test_every_layer_has_an_alpha_of_its_own(tmp_path: Path) -> None:
    tensors, added = kohya(base().denoiser, "lora_unet", ("to_q", "to_v", "conv1", "proj_in", "ff.net.2"), lambda name: 0.5 if name.endswith("to_q") else 3.0)
    text = base().encode.text.encoders["text_encoder"]
    text_tensors, text_added = kohya(text, "lora_te_text_model", ("q_proj", "out_proj"), lambda name: 1.0 if name.endswith("q_proj") else 2.0)
    save_file(tensors | text_tensors, tmp_path / "style.safetensors")
    loaded = named(f"pictograms+{tmp_path / 'style.safetensors'}").load()
    assert (len(added) > 20, len(text_added)) == (True, 4)
    for before, after, change in ((base().denoiser, loaded.denoiser, added), (text, loaded.encode.text.encoders["text_encoder"], text_added)):
        for name, weight in before.state_dict().items():
            layer, _, kind = name.rpartition(".")
            torch.testing.assert_close(after.state_dict()[name], weight + change.get(layer, 0.0) if kind == "weight" else weight)


def test_adapters_without_an_alpha_are_added_as_they_are(tmp_path: Path) -> None:
    """By the names of diffusers, which has renamed the layers of the text encoder."""
    down, up = torch.randn(2, 96).half(), torch.randn(96, 2).half()
    for prefix in ("text_encoder", "text_encoder.text_model"):
        layer = "encoder.layers.0.self_attn.q_proj"
        save_file({f"{prefix}.{layer}.lora_A.weight": down, f"{prefix}.{layer}.lora_B.weight": up}, tmp_path / "one.safetensors")
        policy = named(f"pictograms+{tmp_path / 'one.safetensors'}").load()
        before, after = (each.encode.text.encoders["text_encoder"].get_submodule(layer).weight.detach() for each in (base(), policy))
        torch.testing.assert_close(after, before + up.float() @ down.float())
        assert torch.equal(policy.denoiser.conv_in.weight, base().denoiser.conv_in.weight)


def test_adapters_of_another_model(tiny_pipeline: Path, tmp_path: Path) -> None:
    load_policy(tiny_pipeline, LORA).save_lora(tmp_path / "other")
    assert "attentions_0_transformer_blocks_0_attn1_to_k has weights (104, 104), its adapter (64, 4) and (4, 64)" in refusal(f"pictograms+{tmp_path / 'other'}")
    save_file({"unet.down_blocks.7.to_q.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "larger.safetensors")
    assert "no layer of its denoiser or text encoders takes unet.down_blocks.7.to_q.lora_A.weight" in refusal(f"pictograms+{tmp_path / 'larger.safetensors'}")


KEY = "lora_unet_mid_block_attentions_0_proj_in"
HALVES = {f"{KEY}.lora_down.weight": (2, 104, 1, 1), f"{KEY}.lora_up.weight": (104, 2, 1, 1)}


@pytest.mark.parametrize(
    ("shapes", "metadata", "sentence"),
    [
        (HALVES | {f"{KEY}.dora_scale": (1, 104, 1, 1)}, {}, f"takes {KEY}.dora_scale"),
        ({f"{KEY}.hada_w1_a": (104, 2)}, {}, f"takes {KEY}.hada_w1_a"),
        ({f"{KEY}.lora_down.weight": (2, 104, 1, 1)}, {}, "only a part of the adapter of unet_mid_block"),
        (HALVES | {f"{KEY}.lora_up.weight": (104, 3, 1, 1)}, {}, "its adapter (104, 3, 1, 1) and (2, 104, 1, 1)"),
        (HALVES | {f"{KEY}.lora_up.weight": (208,)}, {}, "its adapter (208,)"),
        (HALVES, {"unet.use_rslora": True}, "holds adapters with use_rslora"),
        (HALVES, {"unet.alpha_pattern": {"proj_in": 4}}, "holds adapters with alpha_pattern"),
        (HALVES, [1], "what is no JSON"),
    ],
)
def test_adapters_that_are_not_whole_or_not_plain(tmp_path: Path, shapes: dict[str, tuple[int, ...]], metadata: object, sentence: str) -> None:
    said = {"lora_adapter_metadata": json.dumps(metadata)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "style.safetensors", metadata=said)
    assert sentence in refusal(f"pictograms+{tmp_path / 'style.safetensors'}")


# A whole UNet


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_another_unet_on_the_base(tmp_path: Path, prefix: str) -> None:
    adapted().save_pipeline(tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "unet" / UNET.name)
    save_file({prefix + name: value for name, value in tensors.items()}, tmp_path / "unet.safetensors")
    loaded = named(f"pictograms+{tmp_path / 'unet.safetensors'}").load()
    assert torch.equal(output(loaded), output(load_policy(tmp_path / "merged", AS_IT_IS)))


def test_unet_that_does_not_fit(tmp_path: Path) -> None:
    file, tensors = tmp_path / "unet.safetensors", load_file(UNET)
    for changed, sentence in (
        ({name: value for name, value in tensors.items() if name != "conv_in.bias"}, "it lacks conv_in.bias"),
        (tensors | {"conv_between.bias": torch.zeros(1)}, "which has no conv_between.bias"),
        (tensors | {"conv_in.bias": torch.zeros(3)}, "conv_in.bias has the shape (3,) instead of (64,)"),
    ):
        save_file(changed, file)
        assert sentence in refusal(f"pictograms+{file}")


# A checkpoint of one file


def original(folder: Path) -> Tensors:
    """The weights of a folder by their names in the original layout, which diffusers' conversion inverts.

    As scripts/convert_diffusers_to_original_stable_diffusion.py of diffusers, for any number of blocks.
    """
    (unet_file,), (vae_file,), (text_file,) = ((folder / part).glob("*.safetensors") for part in ("unet", "vae", "text_encoder"))
    unet, vae, text = load_file(unet_file), load_file(vae_file), load_file(text_file)
    each = json.loads((folder / "unet" / "config.json").read_text())["layers_per_block"] + 1
    last = len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"]) - 1
    inner = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    ends = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }

    def of_unet(name: str) -> str:
        if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name):
            way, block, kind, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
            place = 1 + block * each + index if way == "down" else block * each + index
            if kind == "downsamplers":
                return f"input_blocks.{place + each - 1}.0.op.{rest.removeprefix('conv.')}"
            if kind == "upsamplers":
                behind = 2 if any(key.startswith(f"up_blocks.{block}.attentions") for key in unet) else 1
                return f"output_blocks.{place + each - 1}.{behind}.{rest}"
            head, dot, tail = rest.partition(".")
            rest = rest if kind == "attentions" else inner[head] + dot + tail
            return f"{'input' if way == 'down' else 'output'}_blocks.{place}.{int(kind == 'attentions')}.{rest}"
        if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.([^.]+)(.+)", name):
            place = 1 if found[1] == "attentions" else 2 * int(found[2])
            return f"middle_block.{place}.{found[3] if place == 1 else inner[found[3]]}{found[4]}"
        head, dot, tail = name.rpartition(".")
        return ends[head] + dot + tail

    def of_vae(name: str) -> str:
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{last - int(found[1])}", name).replace(".resnets.", ".block.") if "up_blocks" in name else name
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name).replace("upsamplers.0", "upsample")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")

    found = {f"model.diffusion_model.{of_unet(name)}": value for name, value in unet.items()}
    found |= {f"first_stage_model.{of_vae(name)}": value for name, value in vae.items()}
    xl = (folder / "text_encoder_2").is_dir()
    first = "conditioner.embedders.0" if xl else "cond_stage_model"
    found |= {f"{first}.transformer.text_model.{name.removeprefix('text_model.')}": value for name, value in text.items()}
    return found | ({f"conditioner.embedders.1.model.{name}": value for name, value in open_clip(folder).items()} if xl else {})


def open_clip(folder: Path) -> Tensors:
    """The second text encoder of a folder by the names of OpenCLIP."""
    tensors = load_file(folder / "text_encoder_2" / "model.safetensors")
    tensors = {name.removeprefix("text_model."): value for name, value in tensors.items()}
    words = {
        "encoder.layers": "transformer.resblocks",
        "layer_norm": "ln_",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn": "attn",
        "final_ln_": "ln_final",
        "embeddings.token": "token",
        "embeddings.position_embedding.weight": "positional_embedding",
    }
    found: Tensors = {"text_projection": tensors.pop("text_projection.weight").T.contiguous()}
    for name in list(tensors):
        if ".q_proj." in name:
            joined = torch.cat([tensors.pop(name.replace(".q_proj.", f".{letter}_proj.")) for letter in "qkv"])
            tensors[name.replace(".q_proj.", ".in_proj_")] = joined
    for name, value in tensors.items():
        for new, old in words.items():
            name = name.replace(new, old)
        found[name] = value
    return found


def test_checkpoint_of_one_file_gives_the_pictures_of_its_folder(tmp_path: Path) -> None:
    """The base gives the shape; the weights are all those of the file."""
    adapted().save_pipeline(tmp_path / "other")
    save_file(original(tmp_path / "other"), tmp_path / "other.safetensors")
    found = named(f"pictograms+{tmp_path / 'other.safetensors'}")
    loaded, latents = found.load(), torch.randn(1, 4, 8, 8)
    assert torch.equal(output(loaded), output(load_policy(tmp_path / "other", AS_IT_IS)))
    assert torch.equal(loaded.encode(TEXTS), base().encode(TEXTS))
    with torch.no_grad():
        assert torch.equal(loaded.decode(latents), base().decode(latents))
    assert loaded.scheduler_config["beta_end"] == base().scheduler_config["beta_end"]
    before = (found.folder / "model_index.json").stat().st_mtime_ns
    again = named(f"pictograms+{tmp_path / 'other.safetensors'}")
    assert (again.description, (again.folder / "model_index.json").stat().st_mtime_ns) == (found.description, before)  # it is converted once


def test_another_base_gives_another_schedule(tmp_path: Path) -> None:
    save_file(original(BASE), tmp_path / "model.safetensors")
    other = Path(shutil.copytree(BASE, tmp_path / "v"))
    config = json.loads((other / "scheduler" / "scheduler_config.json").read_text())
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"prediction_type": "v_prediction"}))
    folders = [named(f"{each}+{tmp_path / 'model.safetensors'}").load() for each in ("pictograms", other)]
    assert [each.scheduler_config["prediction_type"] for each in folders] == ["epsilon", "v_prediction"]


def test_checkpoint_that_does_not_fit_its_base(tiny_pipeline: Path, tmp_path: Path, cached: Path) -> None:
    file, tensors = tmp_path / "model.safetensors", original(BASE)
    lost, text = "model.diffusion_model.out.2.bias", "cond_stage_model."
    for changed, words in (
        ({name: value for name, value in tensors.items() if name != lost}, ("weights are missing",)),
        ({name: value for name, value in tensors.items() if not name.endswith("final_layer_norm.bias")}, ("1 weights of the text_encoder", "final_layer_norm.bias")),
        (tensors | {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(1)}, ("weights of a UNet",)),
        (tensors | {lost: torch.zeros(9)}, ("conv_out.bias", "is it of the shape of")),
        ({name: value for name, value in tensors.items() if not name.startswith(text)}, ("it has no text encoder",)),
        ({name: value for name, value in tensors.items() if not name.startswith("first_stage")}, ("it has no autoencoder",)),
    ):
        save_file(changed, file)
        message = refusal(f"pictograms+{file}")
        assert all(word in message for word in words), message
    save_file(tensors, file)
    assert "is it of the shape of" in refusal(f"{tiny_pipeline}+{file}")
    assert not cached.exists() or not list(cached.iterdir())


def test_checkpoint_alone_takes_its_shape_from_the_hub(tmp_path: Path) -> None:
    """From the hub's cache: the folder of SD1.5, here with the shape of the embedded model and no weights."""
    save_file(original(BASE), tmp_path / "model.safetensors")
    assert "name a folder of the same shape before it: BASE+model.safetensors" in refusal(str(tmp_path / "model.safetensors"))
    repository, commit = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(BASE, repository / "snapshots" / commit, ignore=shutil.ignore_patterns("*.safetensors"))
    assert torch.equal(output(named(str(tmp_path / "model.safetensors")).load()), output(base()))


# Names


def test_names_of_folders(tiny_pipeline: Path, tmp_path: Path) -> None:
    assert named("pictograms") == Variant(BASE)
    plus = Path(shutil.copytree(tiny_pipeline, tmp_path / "sd+inpainting"))
    assert named(str(plus)) == Variant(plus)


def test_digest_is_of_the_weights_and_not_of_names(tmp_path: Path) -> None:
    for seed in (1, 2):
        adapted(seed).save_lora(tmp_path / str(seed))
    shutil.copytree(tmp_path / "1", tmp_path / "copy")
    same = Path(shutil.copy(tmp_path / "1" / "pytorch_lora_weights.safetensors", tmp_path / "same.safetensors"))
    digests = [Painter(named(name)).digest for name in ("pictograms", *(f"pictograms+{tmp_path / each}" for each in ("1", "2", "copy")), f"pictograms+{same}")]
    assert len(set(digests[:3])) == 3
    assert digests[1] == digests[3] == digests[4]
    assert named("pictograms").description.keys() == named(f"pictograms+{same}").description.keys()


@pytest.mark.parametrize("on", ["", "pictograms+"])
def test_files_that_are_not_read(tmp_path: Path, on: str) -> None:
    pickled, cut, text = tmp_path / "model.ckpt", tmp_path / "cut.safetensors", tmp_path / "text.safetensors"
    pickled.write_bytes(pickle.dumps({"state_dict": {}}))
    cut.write_bytes(UNET.read_bytes()[:100_000])
    text.write_text("not found")
    assert "can run code when they are opened" in refusal(f"{on}{pickled}")
    assert "is not a readable safetensors file" in refusal(f"{on}{cut}")
    assert "is not a readable safetensors file" in refusal(f"{on}{text}")


def test_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for addition in ("", tmp_path / "nothing.safetensors", tmp_path / "empty"):
        assert "write BASE+FILE" in refusal(f"pictograms+{addition}")
    assert refusal(str(tmp_path / "nothing.safetensors")).endswith("does not exist")
    assert f"name that before it: BASE+{UNET.name}" in refusal(str(UNET))
    assert "nowhere does not exist" in refusal(f"./nowhere+{UNET}")


# Stable Diffusion XL


@torch.no_grad()
def changed(folder: Path, settings: PolicySettings) -> LatentPolicy:
    """A policy of the folder whose trained weights are others."""
    policy, generator = load_policy(folder, settings), torch.Generator().manual_seed(3)
    policy.load_state({name: weight + 0.05 * torch.randn(weight.shape, generator=generator) for name, weight in policy.state().items()})
    return policy


def test_adapters_and_denoisers_of_stable_diffusion_xl(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    base, policy = folder_of("sdxl"), changed(folder_of("sdxl"), LORA)
    policy.save_lora(tmp_path / "lora")
    policy.save_pipeline(tmp_path / "merged")
    shutil.copy(tmp_path / "merged" / "unet" / UNET.name, tmp_path / "unet.safetensors")
    for addition in ("lora", "unet.safetensors"):
        loaded = named(f"{base}+{tmp_path / addition}").load()
        torch.testing.assert_close(output(loaded), output(policy))
        assert (output(loaded) - output(load_policy(base, AS_IT_IS))).abs().max() > 0.01


@pytest.mark.parametrize("addition", ["lora", "merged/unet/diffusion_pytorch_model.safetensors"])
def test_what_is_put_on_is_rounded_once_it_is_on(tmp_path: Path, addition: str) -> None:
    policy = adapted()
    policy.save_lora(tmp_path / "lora")
    policy.save_pipeline(tmp_path / "merged")
    found = named(f"pictograms+{tmp_path / addition}")
    exact, half = found.load(), found.load(settings=replace(AS_IT_IS, dtype="bfloat16"))
    weights = half.denoiser.state_dict()
    assert weights["conv_in.weight"].dtype == torch.bfloat16
    assert all(torch.equal(weights[name], weight.to(weights[name].dtype)) for name, weight in exact.denoiser.state_dict().items())


def test_adapters_of_a_text_encoder_that_is_dropped(tmp_path: Path) -> None:
    tensors, _ = kohya(base().encode.text.encoders["text_encoder"], "lora_te_text_model", ("q_proj",), lambda _: 1.0)
    save_file({key.replace("text_model_text_model", "text_model"): value for key, value in tensors.items()}, tmp_path / "style.safetensors")
    with pytest.raises(UserError, match='changes the text_encoder, and policy.text_encoders = "drop" reads conditions'):
        named(f"pictograms+{tmp_path / 'style.safetensors'}").load(settings=replace(AS_IT_IS, text_encoders="drop"))


def test_kohyas_adapters_of_stable_diffusion_xl(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Which call the layers of the UNet as the original code does, and number the text encoders."""
    folder = folder_of("sdxl")
    before = load_policy(folder, AS_IT_IS)
    layers, added = ("attn1.to_q", "attn2.to_k", "proj_in", "ff.net.2"), {}
    tensors, added["unet"] = kohya(before.denoiser, "lora_unet", layers, lambda _: 1.0)
    for number, part in ((1, "text_encoder"), (2, "text_encoder_2")):
        more, added[part] = kohya(before.encode.text.encoders[part], f"lora_te{number}_text_model", ("q_proj", "fc1"), lambda _: 3.0)
        tensors |= {key.replace("text_model_text_model", "text_model"): value for key, value in more.items()}
    places = {"down_blocks_1_attentions_0": "input_blocks_3_1", "up_blocks_0_attentions_0": "output_blocks_0_1", "up_blocks_0_attentions_1": "output_blocks_1_1"}
    places["mid_block_attentions_0"] = "middle_block_1"
    for ours, theirs in places.items():
        tensors = {key.replace(ours, theirs): value for key, value in tensors.items()}
    assert sum("_blocks_" in key and "attentions" in key for key in tensors) == 0
    save_file(tensors, tmp_path / "style.safetensors")
    after = named(f"{folder}+{tmp_path / 'style.safetensors'}").load()
    for part, one, other in (
        ("unet", before.denoiser, after.denoiser),
        *((part, before.encode.text.encoders[part], after.encode.text.encoders[part]) for part in ("text_encoder", "text_encoder_2")),
    ):
        assert len(added[part]) >= 4
        for name, weight in one.state_dict().items():
            layer, _, kind = name.rpartition(".")
            torch.testing.assert_close(other.state_dict()[name], weight + added[part].get(layer, 0.0) if kind == "weight" else weight)


def test_checkpoint_of_one_file_of_stable_diffusion_xl(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    base, file = folder_of("sdxl-square"), tmp_path / "model.safetensors"
    changed(base, PolicySettings(train="full")).save_pipeline(tmp_path / "other")
    tensors = original(tmp_path / "other")
    save_file(tensors, file)
    loaded, wanted = named(f"{base}+{file}").load(), load_policy(tmp_path / "other", AS_IT_IS)
    assert torch.equal(loaded.encode(TEXTS), wanted.encode(TEXTS))
    assert torch.equal(output(loaded), output(wanted))
    assert "name a folder of the same shape before it: BASE+model.safetensors" in refusal(str(file))
    assert "it has no text encoder" in refusal(f"pictograms+{file}")
    save_file({name: value for name, value in tensors.items() if not name.startswith("conditioner.embedders.1")}, file)
    assert "it has no second text encoder" in refusal(f"{base}+{file}")


def test_checkpoint_of_one_file_of_a_family_that_is_only_read_from_folders(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    save_file({"model.diffusion_model.x_embedder.proj.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    message = refusal(f"{folder_of('sd3-no-t5')}+{tmp_path / 'model.safetensors'}")
    assert "checkpoints of one file are read of StableDiffusionPipeline, StableDiffusionXLPipeline" in message
