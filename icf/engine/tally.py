"""The metrics of one condition together: under the true sound, and under a sound put in its place."""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from icf.config import Config
from icf.data import Batch
from icf.engine.masks import foreground
from icf.engine.metrics import FalsePositives, FScore, Jaccard, MeanChange, PixelScores, SemanticScores
from icf.engine.predictors import Prediction

MIN_PIXELS = 16                                 # of the forgiving variant of the AVSS scores
BINARY_DEFAULT = {"J": "background/frame", "F": "per_video/zero"}
SEMANTIC_DEFAULT = {"J": "J/all/real/include", "F": "F/all/real/include"}


class Tally:
    """All scores of one condition.

    Args:
        clips: number of clips of the data set.
        classes: their names with background, or none for binary masks.
    """

    def __init__(self, clips: int, classes: Sequence[str], cfg: Config, device: torch.device | str) -> None:
        self.semantic = bool(classes)
        threshold = cfg.eval.threshold
        self.threshold = threshold
        self.jaccard = Jaccard(clips, threshold)           # of the foreground as a whole, for classes too
        self.pixels = PixelScores(clips, max(len(classes), 2))
        if self.semantic:
            self.classes = SemanticScores(clips, len(classes))
            self.forgiving = SemanticScores(clips, len(classes), MIN_PIXELS)
        else:
            self.f = FScore(clips)
        self.metrics = [metric.to(device) for metric in vars(self).values() if isinstance(metric, nn.Module)]

    def add(self, masks: Tensor, batch: Batch, index: Tensor) -> None:
        """Args: masks [B,T,H,W] as in `Prediction`; batch on the CPU; index int64 [B], places in the data set."""
        places = (batch.frame_mask & batch.label_mask).flatten().nonzero().flatten()          # [N] scored frames
        clip = index.repeat_interleave(batch.frame_mask.shape[1])[places]
        prediction = masks.flatten(0, 1)[places.to(masks.device)]                             # [N,H,W]
        target, clip = (x.to(masks.device) for x in (batch.masks.flatten(0, 1)[places], clip))
        self.jaccard.update(prediction, target, clip)
        if self.semantic:
            self.classes.update(prediction, target, clip)
            self.forgiving.update(prediction, target, clip)
            self.classes.pad((~batch.frame_mask).sum(1), index.to(masks.device))
            self.pixels.update(prediction, target, clip)
        else:
            self.f.update(prediction, target, clip)
            self.pixels.update(foreground(prediction, self.threshold), target, clip)

    def synchronised(self) -> ExitStack:
        """Within it, the metrics hold the rows of all processes."""
        stack = ExitStack()
        for metric in self.metrics:
            stack.enter_context(metric.sync_context())
        return stack

    def scores(self, rows: Sequence[int] | None = None) -> dict[str, dict[str, float]]:
        """Every mode, by family of scores."""
        families = {"AVSS": self.classes, f"AVSS, at least {MIN_PIXELS} pixels": self.forgiving,
                    "J of the foreground": self.jaccard} if self.semantic else {"J": self.jaccard, "F": self.f}
        return {name: _floats(metric.scores(rows)) for name, metric in {**families, "pixels": self.pixels}.items()}

    def summary(self, rows: Sequence[int] | None = None) -> dict[str, float]:
        """J, F and their mean in the default modes."""
        if self.semantic:
            scores = self.classes.scores(rows)
            j, f = (float(scores[SEMANTIC_DEFAULT[key]]) for key in "JF")
        else:
            j = float(self.jaccard.scores(rows)[BINARY_DEFAULT["J"]])
            f = float(self.f.scores(rows)[BINARY_DEFAULT["F"]])
        return {"J": j, "F": f, "J&F": (j + f) / 2}

    def per_clip(self) -> tuple[list[float], list[float]]:
        j, f = self.classes.per_clip() if self.semantic else (self.jaccard.per_clip(), self.f.per_clip())
        return j.tolist(), f.tolist()


class Negative:
    """Scores under a sound that was put in place of the true one, on the original labels and on empty ones."""

    def __init__(self, clips: int, classes: Sequence[str], cfg: Config, device: torch.device | str) -> None:
        self.tally = Tally(clips, classes, cfg, device)
        self.false, self.change = FalsePositives(clips, cfg.eval.threshold).to(device), MeanChange(clips).to(device)

    def add(self, prediction: Prediction, true: Prediction, batch: Batch, index: Tensor) -> None:
        self.tally.add(prediction.masks, batch, index)
        clip = index.repeat_interleave(batch.frame_mask.shape[1])[batch.real].to(prediction.masks.device)
        real = batch.real.to(prediction.masks.device)
        self.false.update(prediction.masks.flatten(0, 1)[real], clip)
        self.change.update(prediction.scores.flatten(0, 1)[real], true.scores.flatten(0, 1)[real], clip)

    def synchronised(self) -> ExitStack:
        stack = self.tally.synchronised()
        stack.enter_context(self.false.sync_context())
        stack.enter_context(self.change.sync_context())
        return stack

    def scores(self, true: dict[str, float], rows: Sequence[int] | None = None) -> dict[str, float]:
        """FPR, share of frames without prediction, J and F on the original labels, what they lose, change of p."""
        summary = self.tally.summary(rows)
        return {**_floats(self.false.scores(rows)), **{key: summary[key] for key in "JF"},
                "sensitivity": true["J"] - summary["J"], **_floats(self.change.scores(rows))}


def _floats(scores: dict[str, Tensor]) -> dict[str, float]:
    return {key: float(value) for key, value in scores.items()}
