import numpy as np
import pytest
import torch

from safediffusion.tiny import networks
from safediffusion.tiny.scenes import sample


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A saved CLIPModel of the embedded world's shape, at random weights, with its tokenizer."""
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    rng = np.random.default_rng(0)
    tokenizer = networks.build_tokenizer([sample(rng)[0] for _ in range(200)], folder)
    torch.manual_seed(0)
    networks.clip(tokenizer, 64, 64, 2).save_pretrained(folder)
    return folder
