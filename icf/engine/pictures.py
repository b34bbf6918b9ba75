"""Pictures of clips: masks laid over frames, sounds, and all seconds of a clip with its truth and its prediction.

matplotlib is imported where it draws.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import Dataset

from icf.data import Clip, collate
from icf.data.audio import RATE
from icf.data.avsbench import class_palette
from icf.engine.masks import foreground
from icf.engine.predictors import Predictor
from icf.engine.score_tables import format_value

TRUTH = (38, 166, 154)                                                   # RGB of a binary truth
RIGHT, FALSE, MISSED = (38, 166, 154), (239, 83, 80), (92, 145, 255)     # RGB of a binary prediction's pixels
THUMB = 160                                                              # side of a frame in the pictures, pixels
DIM = 0.5                                                                # of a picture outside its mask
SILENCE, LOUD = -4.605, 4.0                                              # range of the log-mel picture
PICTURED = (8, 4)                               # clips of the report: worst, best


@dataclass
class Sample:
    """A clip with what was predicted for it; only its real frames.

    Args:
        frames: [T,3,H,W] uint8.
        log_mel: [T,1,96,64].
        truth: [T,H,W] uint8, 0/1 or class index, 255 ignored; meaningful where `labelled` [T].
        prediction: [T,H,W] uint8, 0/1 or class index.
        rank: `worst` or `best`.
        sound: [n] at 16 kHz, what was heard, as far as the clip goes; None where the data has log-mels alone.
    """

    name: str
    frames: Tensor
    log_mel: Tensor
    truth: Tensor
    labelled: Tensor
    prediction: Tensor
    j: float
    f: float | None
    rank: str
    groups: Sequence[str] = ()
    sound: Tensor | None = None

    @property
    def caption(self) -> str:
        return f"J {format_value(self.j)}  F {format_value(self.f)}"


def samples(predict: Predictor, dataset: Dataset, results: dict, threshold: float) -> list[Sample]:
    """The worst clips of the data set, then the best ones, each with its prediction."""
    rows = results["clips"]
    order = sorted((i for i, row in enumerate(rows) if row["J"] is not None), key=lambda i: (rows[i]["J"], i))
    worst, best = order[:PICTURED[0]], order[PICTURED[0]:][-PICTURED[1]:][::-1]
    audible = getattr(getattr(dataset, "data", None), "audio_source", "wav") == "wav"
    return [sample(predict, dataset[i], rows[i], rank, bool(dataset.classes), threshold,
                   dataset.waveform(i)[0] if audible else None)
            for rank, places in (("worst", worst), ("best", best)) for i in places]


def sample(predict: Predictor, clip: Clip, row: dict, rank: str, semantic: bool, threshold: float,
           sound: Tensor | None = None) -> Sample:
    """A clip's real frames, its prediction and its scores."""
    masks = predict(collate([clip])).masks[0].cpu()                                           # [T,H,W]
    masks = masks if semantic else foreground(masks, threshold)
    real = clip.frame_mask
    return Sample(clip.name, clip.frames[real], clip.log_mel[real], clip.masks[real], clip.label_mask[real],
                  masks[real].to(torch.uint8), row["J"], row["F"], rank, row["groups"],
                  None if sound is None else sound[:RATE * int(real.sum())])


def overlay(frame: Tensor | np.ndarray, mask: Tensor | np.ndarray, color: Sequence, alpha: float = 0.5,
            dim: float = 0.0) -> Image.Image:
    """A frame with a mask laid over it, its outline solid.

    Args:
        frame: [3,H,W] or [H,W,3], uint8 RGB.
        mask: [H,W], bool or 0/1 for one colour, or indices into `color`; 0 is left clear, and so is 255.
        color: RGB of the mask, or [C,3] one per index (that of 0 is not used).
        alpha: opacity inside the outline.
        dim: how much the picture is darkened where the mask is clear, 0 to 1.
    """
    picture, mask = np.asarray(frame, dtype=np.float32), np.asarray(mask, dtype=np.int64)
    if picture.shape[0] == 3 and picture.shape[-1] != 3:
        picture = picture.transpose(1, 2, 0)
    if picture.shape != (*mask.shape, 3):
        raise ValueError(f"overlay: expected frame [3,H,W] or [H,W,3] and mask [H,W] of one size, got "
                         f"{np.shape(frame)} and {mask.shape}")
    colors = np.asarray(color, dtype=np.float32)
    colors = np.stack([colors, colors]) if colors.ndim == 1 else colors
    mask = np.where(mask == 255, 0, mask)
    inside = mask > 0
    edge = np.pad(mask, 1, mode="edge")
    outline = inside & ((edge[:-2, 1:-1] != mask) | (edge[2:, 1:-1] != mask)
                        | (edge[1:-1, :-2] != mask) | (edge[1:-1, 2:] != mask))
    weight = np.where(outline, 1.0, np.where(inside, alpha, 0.0))[..., None]
    picture = picture * np.where(inside, 1.0, 1.0 - dim)[..., None]
    return Image.fromarray((picture * (1 - weight) + colors[mask] * weight).round().astype(np.uint8))


def class_colors(classes: int) -> np.ndarray:
    """Colours [classes,3] uint8 of AVSBench, lightened for pictures."""
    return (64 + 0.75 * class_palette(classes)).astype(np.uint8)


def mel_picture(log_mel: Tensor) -> Image.Image:
    """The log-mel examples [T,1,96,64] of a clip in a row, low frequencies at the bottom, a line at every second."""
    from matplotlib import colormaps

    bands = np.asarray(log_mel, dtype=np.float32).reshape(-1, log_mel.shape[-1]).T[::-1]      # [64, 96 T]
    level = np.clip((bands - SILENCE) / (LOUD - SILENCE), 0, 1)
    picture = (colormaps["magma"](level)[..., :3] * 255).astype(np.uint8)
    picture[:, log_mel.shape[2]::log_mel.shape[2]] = 120
    return Image.fromarray(picture)


def strips(sample: Sample, classes: Sequence[str]) -> dict[str, Image.Image]:
    """Pictures of all seconds side by side: `frames`, `truth`, `prediction`, and `sound` of the same width.

    A binary prediction is coloured by what is right, false and missed.
    """
    truth, known = sample.truth.numpy(), sample.labelled.numpy()[:, None, None]
    prediction, shown_colors = sample.prediction.numpy(), class_colors(len(classes))
    truth_colors = shown_colors
    if not classes:
        truth_colors, shown_colors = TRUTH, ((0, 0, 0), RIGHT, FALSE, MISSED)
        prediction = np.select([(prediction == 1) & ((truth == 1) | ~known), (prediction == 1) & (truth == 0),
                                (prediction == 0) & (truth == 1) & known], [1, 2, 3], 0)
    rows = {"frames": (truth * 0, TRUTH, 0.0), "truth": (truth * known, truth_colors, DIM),
            "prediction": (prediction, shown_colors, DIM)}
    pictures = {name: _side_by_side([overlay(frame, mask, colors, dim=dim) for frame, mask in
                                     zip(sample.frames, masks, strict=True)])
                for name, (masks, colors, dim) in rows.items()}
    sound = mel_picture(sample.log_mel).resize((pictures["frames"].width, 72), Image.Resampling.BILINEAR)
    return {**pictures, "sound": sound}


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (len(images) * (THUMB + 4) - 4, THUMB), (128, 128, 128))
    for place, image in enumerate(images):
        sheet.paste(image.resize((THUMB, THUMB), Image.Resampling.LANCZOS), (place * (THUMB + 4), 0))
    return sheet


def contact_sheet(samples: Sequence[Sample], classes: Sequence[str] = ()) -> Image.Image:
    """One picture of several clips: name and scores, then frames, truth, prediction and sound."""
    margin, font = 12, ImageFont.load_default(14)
    blocks = [(sample, list(strips(sample, classes).values())) for sample in samples]
    heights = [24 + sum(image.height + 4 for image in images) + margin for _, images in blocks]
    width = max((image.width for _, images in blocks for image in images), default=THUMB) + 2 * margin
    sheet = Image.new("RGB", (width, sum(heights) + margin), (255, 255, 255))
    draw, top = ImageDraw.Draw(sheet), margin
    for (sample, images), height in zip(blocks, heights, strict=True):
        draw.text((margin, top), f"{sample.name}   {sample.caption}", fill=(40, 44, 52), font=font)
        below = top + 24
        for image in images:
            sheet.paste(image, (margin, below))
            below += image.height + 4
        top += height
    return sheet


def legend(samples: Sequence[Sample], classes: Sequence[str]) -> list[tuple[str, tuple[int, int, int]]]:
    """What the colours of the strips mean, of classes those that occur: (name, RGB)."""
    if not classes:
        return [("truth, or right", RIGHT), ("false", FALSE), ("missed", MISSED)]
    palette = class_colors(len(classes)).tolist()
    shown = sorted({int(c) for sample in samples for mask in (sample.truth, sample.prediction)
                    for c in mask.unique() if 0 < c < len(classes)})
    return [(classes[c], tuple(palette[c])) for c in shown]
