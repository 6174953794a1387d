"""Options that commands which paint have in common, with their words in `--help`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

BatchSize = Annotated[str, typer.Option(help="Pictures at once, a number or auto; memory, not results.")]
Dtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Arithmetic of the denoiser: bfloat16 halves it, not the text encoders; faster on a GPU.")]
Quantise = Annotated[Literal["none", "int8", "nf4"], typer.Option(help="Keep the denoiser's linear layers in 8 bits (torchao) or 4 (bitsandbytes).")]
TextEncoders = Annotated[Literal["keep", "drop"], typer.Option(help="drop: encode the prompts first, then free the encoders; the same pictures in less memory.")]
GuideSet = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Change a setting of the guide, such as level=strong.", show_default=False)]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:1.", show_default="the best there is")]
