from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from safediffusion.encoders.clip import ClipEncoder
from safediffusion.tiny import networks
from safediffusion.tiny.scenes import sample


@dataclass(frozen=True)
class FlatEncoder:
    """An encoder whose embeddings a test can write down: a picture is its own vector, a text has the one it is given."""

    texts: dict = field(default_factory=dict)

    def image(self, images):
        return F.normalize(images.flatten(1), dim=1)

    def text(self, texts):
        return F.normalize(torch.stack([self.texts[text] for text in texts]), dim=1)


@pytest.fixture
def flat_encoder():
    return FlatEncoder


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A real CLIP of the embedded world's shape, at random weights."""
    rng = np.random.default_rng(0)
    tokenizer = networks.build_tokenizer([sample(rng)[0] for _ in range(200)], tmp_path_factory.mktemp("tokenizer"))
    torch.manual_seed(0)
    return ClipEncoder(networks.clip(tokenizer, 64, 64, 2), tokenizer, "tiny", [])
