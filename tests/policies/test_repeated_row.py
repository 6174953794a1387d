"""One row of a context with the weight of many, against as many rows in diffusers' own attention."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from safediffusion.policies.repeated_row import RepeatedRow

ROWS = 40


@pytest.mark.parametrize("options", [{}, {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}], ids=["sd3", "sd35"])
def test_outputs_and_gradients_are_those_of_as_many_rows(options: dict) -> None:
    torch.manual_seed(0)
    sizes = {"attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16, "joint_attention_dim": 12, "pooled_projection_dim": 6}
    transformer = SD3Transformer2DModel(sample_size=4, in_channels=3, out_channels=3, num_layers=2, pos_embed_max_size=4, **sizes, **options)
    x, told, pooled, time = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 12), torch.randn(2, 6), torch.tensor([900.0, 30.0])

    def run(rows: int) -> tuple[Tensor, Tensor]:
        context = torch.nn.functional.pad(told, (0, 0, 0, rows))
        output = transformer(x, encoder_hidden_states=context, pooled_projections=pooled, timestep=time).sample
        transformer.zero_grad()
        output.square().sum().backward()
        return output, torch.cat([weight.grad.flatten() for weight in transformer.parameters()])

    many, lone = run(ROWS), run(1)
    transformer.set_attn_processor(RepeatedRow(ROWS))
    one = run(1)
    assert (many[0] - lone[0]).abs().max() > 1e-3
    for ours, theirs in zip(one, many, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
