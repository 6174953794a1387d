"""Less of what a detector finds: safety by a detector's word. What grades the model must then be another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from safediffusion.config import settings
from safediffusion.errors import UserError
from safediffusion.rewards.scores import Measures, checked
from safediffusion.types import Detector, Prompt, Scores

Form = Literal["probability", "log"]
Finder = Literal["pictograms", "nudenet", "q16", "q16-finetuned", "safety-checker", "nsfw-vit", "judge"]


@settings
class DetectionSettings:
    """A `[reward]` table of kind "detection"."""

    kind: Literal["detection"] = "detection"
    # "pictograms" is the guard of the embedded world, not the detector that grades it; the others are the instruments of
    # that name (docs/evaluate.md), which then should not grade.
    detector: Finder = "pictograms"
    # Labels of the detector that count as unsafe, by the highest of them; () is all, for a detector that looks for nothing else.
    labels: tuple[str, ...] = ()
    # From which probability on a picture counts in "unsafe_rate". NudeNet is read at .45 to .6, the others at .5.
    threshold: float = Field(default=0.5, gt=0, lt=1)
    # -P(unsafe), or log(1 - P): the log-probability of a safe picture, whose gradient stays where the detector is sure. For draft, refl and guidance.
    score: Form = "probability"

    @property
    def differentiable(self) -> bool:
        return self.detector == "pictograms"

    @property
    def measures(self) -> Measures:
        return {"unsafe": self.differentiable, "unsafe_rate": False}


@dataclass(frozen=True, eq=False)
class DetectionReward:
    """r(x) = -P(unsafe) or log(1 - P), with parts "unsafe" = P and "unsafe_rate" = 1 where P is at least the threshold, else 0.

    logits: of the detector's labels, `(B, 3, H, W)` to `(B, L)`, where it tells them: log(1 - P) has a gradient then even where P is rounded to 1. Without
        them it is at least log(1e-6).
    """

    detector: Detector
    labels: tuple[str, ...]
    threshold: float = 0.5
    score: Form = "probability"
    differentiable: bool = False
    logits: Callable[[Tensor], Tensor] | None = None

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        chosen = [self.detector.labels.index(label) for label in self.labels]
        if self.logits is None:
            unsafe = self.detector(images)[:, chosen].amax(1).to(images.device)
            safe = (1 - unsafe).clamp(min=1e-6).log()
        else:
            highest = self.logits(images)[:, chosen].amax(1).to(images.device)
            unsafe, safe = highest.sigmoid(), logsigmoid(-highest)
        total = -unsafe if self.score == "probability" else safe
        return checked(Scores(total, {"unsafe": unsafe, "unsafe_rate": (unsafe >= self.threshold).to(unsafe)}), len(images), "detection")


def harmful(detector: Detector, options: DetectionSettings) -> tuple[str, ...]:
    """The labels that count; UserError for one that the detector does not have, and where harmless ones would count."""
    if strange := [label for label in options.labels if label not in detector.labels]:
        raise UserError(f"reward.labels: {options.detector} has no label {strange[0]!r}; its labels are {', '.join(detector.labels)}")
    if not options.labels and options.detector in ("nudenet", "nsfw-vit"):
        raise UserError(f"{options.detector} finds harmless things as well; set reward.labels to those of {', '.join(detector.labels)} that count as unsafe")
    return options.labels or detector.labels
