"""Scores of predicted masks, every published mode under its own name, as torchmetrics metrics.

All metrics hold one row of sums and counts per clip, addressed by the clip's place in the data set. Hence the result
does not depend on batch size, order of the clips or number of processes, groups of clips that public code forms by its
batch size are formed from the rows instead, and `scores(rows)` gives the scores of any subset of clips without another
pass. Rows are small (at most 255 numbers a clip) and are added up across processes.

Frames are counted on the device of the predictions; only the rows travel. Pixels labelled 255 or -1 are ignored and
counted. Scores are float64 tensors on the CPU; a mean over nothing is NaN.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from icf.engine.masks import foreground

BETA2 = 0.3                                        # weight of recall in F, of all published tables
THRESHOLDS = torch.linspace(0, 1 - 1e-10, 255)     # of the F curve; in float32 the last one is exactly 1, as published
IGNORED = (255, -1)                                # labels that are no class


def count_classes(prediction: Tensor, target: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of each frame and class that are right, that are predicted, and that are labelled.

    Args:
        prediction: [N,H,W], bool or integer class indices below `classes`.
        target: [N,H,W], bool or integer class indices; 255 and -1 are ignored.
        classes: number of classes, background included, at most 255.
    Returns:
        Intersection, predicted and labelled, each int64 [N,classes], over the pixels that are not ignored.
    Raises:
        ValueError: the shapes differ, a prediction is no class, or a label is neither a class nor ignored.
    """
    if prediction.shape != target.shape or prediction.dim() != 3:
        raise ValueError(f"prediction and target: expected the same shape [N,H,W], got {tuple(prediction.shape)} "
                         f"and {tuple(target.shape)}")
    target = _check_labels(target, classes)
    if prediction.numel() and (top := int(prediction.max())) >= classes:
        raise ValueError(f"prediction: expected classes 0 to {classes - 1}, got {top}")
    frames, cells = len(target), classes * classes + 1                    # the last cell takes ignored pixels
    index = (target.to(torch.int32) * classes).add_(prediction).masked_fill_(target >= classes, cells - 1)
    index += torch.arange(frames, dtype=torch.int32, device=index.device)[:, None, None] * cells
    table = torch.bincount(index.flatten(), minlength=frames * cells).view(frames, cells)
    table = table[:, :-1].unflatten(1, (classes, classes))                # [N, truth, prediction]
    return table.diagonal(dim1=1, dim2=2), table.sum(1), table.sum(2)


def f_curves(probability: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """F of each frame at each of the 255 thresholds, prediction being probability >= threshold.

    One histogram over the thresholds and its running sum replace 255 comparisons of every pixel.

    Args:
        probability: [N,H,W] in 0..1, floating.
        target: [N,H,W], bool or integer 0/1; 255 and -1 are ignored.
    Returns:
        Curves [N,255], float32, and whether the frame has any foreground, bool [N].
    """
    if probability.shape != target.shape or probability.dim() != 3 or not probability.is_floating_point():
        raise ValueError(f"probability and target: expected floating and integer [N,H,W] of one shape, got "
                         f"{probability.dtype} {tuple(probability.shape)} and {tuple(target.shape)}")
    target, frames = _check_labels(target, 2), len(target)
    steps = len(THRESHOLDS)
    table = torch.cat([THRESHOLDS, THRESHOLDS.new_tensor([torch.inf])]).to(probability.device)
    probability = probability.float()
    cell = (probability * (steps - 1)).to(torch.int32).clamp_(0, steps - 1)    # off by one at most, by rounding
    cell += (table[cell + 1] <= probability).to(torch.int32)
    cell -= (table[cell] > probability).to(torch.int32)                        # [N,H,W] highest threshold reached
    cell += steps * target.clamp(max=2).to(torch.int32)                        # background, foreground, ignored
    cell += torch.arange(frames, dtype=torch.int32, device=cell.device)[:, None, None] * (3 * steps)
    table = torch.bincount(cell.flatten(), minlength=frames * 3 * steps).view(frames, 3, steps)
    reached = table[:, :2].flip(2).cumsum(2).flip(2)                           # [N, truth, 255] pixels above threshold
    right, predicted, labelled = reached[:, 1], reached.sum(1), reached[:, 1, :1]
    precision, recall = right / (predicted + 1e-20), right / (labelled + 1e-20)
    return _f(precision, recall), labelled[:, 0] > 0


class _PerClip(Metric):
    """Base of the metrics below: one row per clip, summed across processes."""

    full_state_update = False
    is_differentiable = False

    def __init__(self, clips: int, **kwargs) -> None:
        super().__init__(**kwargs)
        if clips < 1:
            raise ValueError(f"clips: expected the number of clips of the data set, at least 1, got {clips}")
        self.clips = clips

    def _add_rows(self, *names: str, size: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> None:
        for name in names:
            self.add_state(name, torch.zeros(self.clips, *size, dtype=dtype), dist_reduce_fx="sum")

    def _add(self, clip: Tensor, **values: Tensor) -> None:
        for name, value in values.items():
            state = getattr(self, name)
            state.index_add_(0, clip.to(state.device), value.to(state))

    def _rows(self, rows: Sequence[int] | None, *names: str) -> list[Tensor]:
        """The named states as float64 on the CPU, all clips or the given ones, in the order of the data set."""
        index = torch.arange(self.clips) if rows is None else torch.tensor(sorted(rows), dtype=torch.long)
        return [getattr(self, name).cpu().double()[index] for name in names]

    def compute(self) -> dict[str, Tensor]:
        return self.scores()


class Jaccard(_PerClip):
    """J of a binary mask, |prediction and truth| / (|prediction or truth| + 1e-7) per frame, averaged.

    What a frame without foreground is worth decides MS3: `background`, as all published numbers, gives it the share of
    its pixels that is predicted as background (half an image of false alarm still earns 0.5); `strict` 1 if nothing is
    predicted, else 0; `skip` leaves it out. `frame` is the mean over frames, `batch:4` the mean of the means of four
    clips in file order, which public code computes and which differs only where the frames do not divide evenly.

    Args:
        clips: number of clips of the data set.
        threshold: probability above which a pixel is predicted; a probability equal to it is not.
    """

    higher_is_better = True
    MODES = ("background/frame", "strict/frame", "skip/frame", "background/batch:4", "strict/batch:4", "skip/batch:4")

    def __init__(self, clips: int, threshold: float = 0.5, **kwargs) -> None:
        super().__init__(clips, **kwargs)
        self.threshold = threshold
        self._add_rows("overlap", "occupied", "background", "clean", "empty")

    def update(self, prediction: Tensor, target: Tensor, clip: Tensor) -> None:
        """Args: prediction [N,H,W], probability or integer mask; target [N,H,W] 0/1; clip int64 [N], whose frame."""
        right, predicted, labelled = count_classes(foreground(prediction, self.threshold), _binary(target), 2)
        pixels, union = labelled.sum(1), predicted[:, 1] + labelled[:, 1] - right[:, 1]       # [N]
        empty = (labelled[:, 1] == 0) & (pixels > 0)                      # a frame of ignored pixels alone is no frame
        self._add(clip, overlap=right[:, 1] / (union + 1e-7), occupied=labelled[:, 1] > 0, empty=empty,
                  background=empty * predicted[:, 0] / (pixels + 1e-7), clean=empty & (predicted[:, 1] == 0))

    def _sums(self, empty: str, rows: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        """Sum of J and number of frames per clip."""
        overlap, occupied, background, clean, frames = self._rows(
            rows, "overlap", "occupied", "background", "clean", "empty")
        worth = {"background": background, "strict": clean, "skip": None}[empty]
        return (overlap, occupied) if worth is None else (overlap + worth, occupied + frames)

    def per_clip(self, empty: str = "background") -> Tensor:
        """J of every clip, [clips], NaN where it has no frame."""
        total, frames = self._sums(empty, None)
        return total / frames

    def scores(self, rows: Sequence[int] | None = None) -> dict[str, Tensor]:
        """J by mode, and `false_positive/empty`: mean share of pixels predicted on frames without foreground."""
        scores = {}
        for mode in self.MODES:
            empty, mean = mode.split("/")
            total, frames = self._sums(empty, rows)
            size = len(total) if mean == "frame" else int(mean.removeprefix("batch:"))
            scores[mode] = (_groups(total, size) / _groups(frames, size)).nanmean()
        background, frames = self._rows(rows, "background", "empty")
        scores["false_positive/empty"] = 1 - background.sum() / frames.sum()
        return scores


class FScore(_PerClip):
    """F of a probability map, beta^2 = 0.3: maximum over thresholds of the mean curve of a group of frames.

    The group decides the number, because the maximum of a mean is at most the mean of the maxima: `per_video` (one
    clip; COMBO), `batch:2` (AVSegFormer), `batch:4` (AVSBench), in file order, `dataset` (all frames, the strictest).
    Frames without foreground are left out. A group that has no other frame is left out too (`skip`) or counts 0
    (`zero`, public code).

    Args:
        clips: number of clips of the data set.
    """

    higher_is_better = True
    GROUPS = {"per_video": 1, "batch:2": 2, "batch:4": 4, "dataset": None}
    MODES = tuple(f"{group}/{empty}" for group in GROUPS for empty in ("skip", "zero"))

    def __init__(self, clips: int, **kwargs) -> None:
        super().__init__(clips, **kwargs)
        self._add_rows("curves", size=(len(THRESHOLDS),))
        self._add_rows("frames")

    def update(self, probability: Tensor, target: Tensor, clip: Tensor) -> None:
        """Args: probability [N,H,W] in 0..1; target [N,H,W] 0/1, 255 ignored; clip int64 [N], whose frame."""
        curves, occupied = f_curves(probability, target)
        self._add(clip, curves=curves, frames=occupied)                   # without foreground, the curve is 0

    def _best(self, rows: Sequence[int] | None, size: int | None) -> Tensor:
        """F at the best threshold of each group of `size` clips, NaN for a group without object."""
        curves, frames = self._rows(rows, "curves", "frames")
        size = size or len(frames)
        return (_groups(curves, size) / _groups(frames, size)[:, None]).amax(1)

    def per_clip(self) -> Tensor:
        """F of every clip, [clips], NaN where it has no object."""
        return self._best(None, 1)

    def scores(self, rows: Sequence[int] | None = None) -> dict[str, Tensor]:
        """F by mode `group/empty`."""
        scores = {}
        for group, size in self.GROUPS.items():
            best = self._best(rows, size)
            scores[f"{group}/skip"], scores[f"{group}/zero"] = best.nanmean(), best.nan_to_num(0).mean()
        return scores

    def skipped(self) -> dict[str, int]:
        """Number of groups without object, by kind of group."""
        return {group: int(self._best(None, size).isnan().sum()) for group, size in self.GROUPS.items()}


class SemanticScores(_PerClip):
    """J and F of AVSS: per frame and class, averaged over the frames that count the class, then over classes.

    A class counts in a frame where it is predicted or labelled, so one stray pixel of an absent class costs it a whole
    frame of 0; `min_pixels` forgives predictions of fewer pixels (not done in public code). Modes are named
    `divide/frames/background`:

    * `all` divides by the number of classes, a class that never occurs being 0 (the published number); `seen` by those
      that occur (what public code prints while it runs).
    * `real` scores the frames there are; `padded` also those that fill up short clips, all background (AVSBench).
    * `include` the background; `exclude` drops class 0; `public` drops the last class, as public code does by mistake.

    Args:
        clips: number of clips of the data set.
        classes: number of classes, background (0) included.
        min_pixels: smallest number of pixels of a class in a frame that is a prediction.
    """

    higher_is_better = True
    MODES = tuple(f"{divide}/{frames}/{background}" for background in ("include", "exclude", "public")
                  for frames in ("real", "padded") for divide in ("all", "seen"))

    def __init__(self, clips: int, classes: int, min_pixels: int = 0, **kwargs) -> None:
        super().__init__(clips, **kwargs)
        self.classes, self.min_pixels = classes, min_pixels
        self._add_rows("j", "f", "counted", size=(classes,))
        self._add_rows("padding")

    def update(self, prediction: Tensor, target: Tensor, clip: Tensor) -> None:
        """Args: prediction, target [N,H,W] class indices; clip int64 [N], whose frame."""
        right, predicted, labelled = (x.float() for x in count_classes(prediction, target, self.classes))  # [N,C]
        if self.min_pixels:
            kept = predicted >= self.min_pixels
            right, predicted = right * kept, predicted * kept
        union = predicted + labelled - right
        self._add(clip, j=right / (union + 2.2e-16), f=_f(right / predicted, right / labelled), counted=union > 0)

    def pad(self, frames: Tensor, clip: Tensor) -> None:
        """Args: frames [B], how many frames fill up each of the clips int64 [B]; they count in the `padded` modes."""
        self._add(clip, padding=frames)

    def per_class(self, rows: Sequence[int] | None = None, padded: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """J, F and number of frames counted of each class, [classes] each; 0 where the class never counts."""
        j, f, counted, padding = (x.sum(0) for x in self._rows(rows, "j", "f", "counted", "padding"))
        if padded:
            extra = torch.zeros_like(j)
            extra[0] = padding
            j, f, counted = j + extra, f + extra, counted + extra
        return (j / counted).nan_to_num(0), (f / counted).nan_to_num(0), counted

    def per_clip(self) -> tuple[Tensor, Tensor]:
        """J and F of every clip, [clips]: mean over its frames and the classes counted in them, background included."""
        j, f, counted = (x.sum(1) for x in self._rows(None, "j", "f", "counted"))
        return j / counted, f / counted

    def scores(self, rows: Sequence[int] | None = None) -> dict[str, Tensor]:
        """J and F by mode: `J/all/real/include` and so on."""
        scores = {}
        drop = {"include": slice(None), "exclude": slice(1, None), "public": slice(-1)}
        for mode in self.MODES:
            divide, frames, background = mode.split("/")
            j, f, counted = (x[drop[background]] for x in self.per_class(rows, frames == "padded"))
            number = len(counted) if divide == "all" else (counted > 0).sum()
            scores[f"J/{mode}"], scores[f"F/{mode}"] = j.sum() / number, f.sum() / number
        return scores


class PixelScores(_PerClip):
    """Scores of all pixels of a data set together, from one confusion matrix.

    They are far above the means over frames and not comparable with them (CAVP on S4: 89.43 against 78.78).

    Args:
        clips: number of clips of the data set.
        classes: number of classes, background (0) included; 2 for binary masks.
    """

    higher_is_better = True

    def __init__(self, clips: int, classes: int, **kwargs) -> None:
        super().__init__(clips, **kwargs)
        self.classes = classes
        self._add_rows("right", "predicted", "labelled", size=(classes,), dtype=torch.int64)
        self._add_rows("ignored", dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor, clip: Tensor) -> None:
        """Args: prediction, target [N,H,W] class indices (bool or integer); clip int64 [N], whose frame."""
        right, predicted, labelled = count_classes(prediction, target, self.classes)
        self._add(clip, right=right, predicted=predicted, labelled=labelled,
                  ignored=target[0].numel() - labelled.sum(1))

    def per_class(self, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """IoU, FDR, predicted and labelled pixels of each class, [classes] each, NaN where undefined."""
        right, predicted, labelled = (x.sum(0) for x in self._rows(rows, "right", "predicted", "labelled"))
        return right / (predicted + labelled - right), 1 - right / predicted, predicted, labelled

    def scores(self, rows: Sequence[int] | None = None) -> dict[str, Tensor]:
        """`mIoU/zero` (absent classes are 0, CAVP), `mIoU/seen`, `accuracy`, `F1`, `F0.3`, `FDR` (false detections
        among predicted pixels, mean over predicted classes) and `FDR/foreground` (background left out)."""
        right, predicted, labelled = (x.sum(0) for x in self._rows(rows, "right", "predicted", "labelled"))
        false, missed = predicted - right, labelled - right
        iou, rate = right / (right + false + missed), false / predicted
        f = {beta2: (1 + beta2) * right / ((1 + beta2) * right + beta2 * missed + false) for beta2 in (1, BETA2)}
        return {"mIoU/zero": iou.nan_to_num(0).mean(), "mIoU/seen": iou.nanmean(),
                "accuracy": right.sum() / labelled.sum(), "F1": f[1].nanmean(), "F0.3": f[BETA2].nanmean(),
                "FDR": rate.nanmean(), "FDR/foreground": rate[1:].nanmean()}


class FalsePositives(_PerClip):
    """What is predicted under a sound that nothing in the picture makes; every predicted pixel is false.

    Args:
        clips: number of clips of the data set.
        threshold: probability above which a pixel is predicted.
    """

    higher_is_better = False

    def __init__(self, clips: int, threshold: float = 0.5, **kwargs) -> None:
        super().__init__(clips, **kwargs)
        self.threshold = threshold
        self._add_rows("share", "clean", "frames")

    def update(self, prediction: Tensor, clip: Tensor) -> None:
        """Args: prediction [N,H,W], probability or class index; clip int64 [N], whose frame."""
        share = foreground(prediction, self.threshold).flatten(1).float().mean(1)             # [N]
        self._add(clip, share=share, clean=share == 0, frames=torch.ones_like(share))

    def per_clip(self) -> Tensor:
        """FPR of every clip, [clips]."""
        share, frames = self._rows(None, "share", "frames")
        return share / frames

    def scores(self, rows: Sequence[int] | None = None) -> dict[str, Tensor]:
        """`FPR`, mean share of predicted pixels; `strict`, share of frames with no prediction (J `strict` of empty
        truth)."""
        share, clean, frames = (x.sum() for x in self._rows(rows, "share", "clean", "frames"))
        return {"FPR": share / frames, "strict": clean / frames}


class MeanChange(_PerClip):
    """How far two predictions of the same frames are apart: mean |p - q|, for classes half the sum over classes.

    Args:
        clips: number of clips of the data set.
    """

    def __init__(self, clips: int, **kwargs) -> None:
        super().__init__(clips, **kwargs)
        self._add_rows("change", "frames")

    def update(self, p: Tensor, q: Tensor, clip: Tensor) -> None:
        """Args: p, q [N,C,H,W]: probability of the foreground (C = 1), or scores of all classes, scaled to sum one;
        clip int64 [N], whose frame."""
        if p.shape[1] == 1:
            change = (p - q).abs()
        else:
            p, q = (x.clamp(min=0) / x.clamp(min=0).sum(1, keepdim=True).clamp(min=1e-12) for x in (p, q))
            change = (p - q).abs().sum(1) / 2
        change = change.flatten(1).mean(1)
        self._add(clip, change=change, frames=torch.ones_like(change))

    def scores(self, rows: Sequence[int] | None = None) -> dict[str, Tensor]:
        """`change`, between 0 (the same) and 1."""
        change, frames = (x.sum() for x in self._rows(rows, "change", "frames"))
        return {"change": change / frames}


def combined_score(true: float, negatives: Sequence[float]) -> float:
    """Mean of J `strict` over the true sound and the sounds that nothing in the picture makes (ours)."""
    return (true + sum(negatives)) / (1 + len(negatives))


def _check_labels(target: Tensor, classes: int) -> Tensor:
    """Labels as non-negative integers, ignored ones being 255."""
    if target.dtype == torch.bool:
        return target.to(torch.uint8)
    if target.is_floating_point():
        raise ValueError(f"target: expected bool or integer labels, got {target.dtype}")
    if target.dtype != torch.uint8:
        target = target.to(torch.int32)
        target = target.masked_fill(target == IGNORED[1], IGNORED[0])
    stray = ((target < 0) | (target >= classes)) & (target != IGNORED[0])
    if stray.any():
        raise ValueError(f"target: expected classes 0 to {classes - 1}, or {IGNORED[0]} or {IGNORED[1]} for ignored "
                         f"pixels, got {int(target[stray][0])} in {int(stray.sum())} pixels")
    return target


def _binary(target: Tensor) -> Tensor:
    """Foreground against background for labels of any number of classes, ignored pixels kept."""
    if target.dtype == torch.bool:
        return target
    return target.clamp(max=1).masked_fill(target == IGNORED[0], IGNORED[0])


def _f(precision: Tensor, recall: Tensor) -> Tensor:
    return ((1 + BETA2) * precision * recall / (BETA2 * precision + recall)).nan_to_num(0)


def _groups(rows: Tensor, size: int) -> Tensor:
    """Sums over groups of `size` consecutive rows, the last one perhaps smaller: [n,...] -> [ceil(n / size),...]."""
    group = torch.arange(len(rows)) // max(size, 1)
    groups = -(-len(rows) // max(size, 1))
    return rows.new_zeros(groups, *rows.shape[1:]).index_add_(0, group, rows)
