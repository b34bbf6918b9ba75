"""What scores masks need of a method, whether a model or a folder of saved masks: its prediction for a batch."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from icf.data import Batch
from icf.data.folder import list_files
from icf.engine.masks import class_map, read_mask


@dataclass
class Prediction:
    """What a method says of a batch.

    Args:
        masks: [B,T,H,W], probability of the foreground, or class index.
        scores: [B,T,C,H,W], the probabilities (C = 1) or class scores behind it; None where only masks are known.
    """

    masks: Tensor
    scores: Tensor | None = None


Predictor = Callable[[Batch], Prediction]


def model_predictor(model: nn.Module, classes: int, device: torch.device | str) -> Predictor:
    """Predictions of a model, without gradient; `classes` is 0 for binary masks. The model is in eval mode during each
    call only."""
    model = model.to(device)

    @torch.no_grad()
    def predict(batch: Batch) -> Prediction:
        training = model.training
        scores = model.eval()(batch.to(device, non_blocking=True)).float()                   # [B,T,C,H,W]
        model.train(training)
        if scores.dim() != 5 or scores.shape[2] != max(classes, 1):
            raise ValueError(f"model: expected scores [B,T,{max(classes, 1)},H,W], got {tuple(scores.shape)}")
        if not scores.sum().isfinite():
            raise FloatingPointError(f"the model gave values that are not finite for one of {', '.join(batch.names)}")
        if not classes:
            scores = scores.sigmoid()
            return Prediction(scores[:, :, 0], scores)
        return Prediction(class_map(scores.flatten(0, 1)).unflatten(0, scores.shape[:2]), scores)

    return predict


def saved_predictor(folder: Path, classes: int, size: int) -> Predictor:
    """Predictions read from `folder/<clip>/*.png`; `classes` is 0 for binary masks."""
    if not folder.is_dir():
        raise FileNotFoundError(f"masks: no folder {folder}")

    def predict(batch: Batch) -> Prediction:
        masks = torch.zeros(batch.masks.shape, dtype=torch.uint8)
        for clip, name in enumerate(batch.names):
            files = list_files(folder / name, (".png",))
            frames = int(batch.frame_mask[clip].sum())
            if len(files) != frames:
                raise FileNotFoundError(f"masks: expected {frames} numbered .png files in {folder / name}, "
                                        f"found {len(files)}")
            for frame, path in enumerate(files):
                masks[clip, frame] = read_mask(path, classes, size)
        return Prediction(masks if classes else masks.float())

    return predict
