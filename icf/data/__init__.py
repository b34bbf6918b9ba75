"""Clips as the model sees them, and the data sets that yield them."""
from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from icf.config import DataConfig

IGNORE = 255
"""Value of a mask's pixel that enters neither loss nor score."""


@dataclass
class Clip:
    """One clip of T frames, one per second; all tensors on the CPU.

    Args:
        frames: [T,3,H,W] uint8, RGB; padded frames are zero.
        log_mel: [T,1,96,64] float32, one VGGish example per frame.
        masks: [T,H,W] uint8: 0/1, or the class index; `IGNORE` = 255; zero where there is no label.
        frame_mask: [T] bool, frames that exist; the rest is padding.
        label_mask: [T] bool, frames with a label.
        name: unique within the split.
        categories: classes that are known to sound somewhere in the clip; empty where the set does not tell.
        replaced_log_mel: as `log_mel`, what could sound instead, and `captions` of the clip with other objects; for the
            ablations of counterfactuals, None otherwise.
        negative: whether `log_mel` is a sound that belongs to nothing in the clip, whose own is then `own_log_mel`;
            None where there are no such clips (`data.negatives`).
    """

    frames: Tensor
    log_mel: Tensor
    masks: Tensor
    frame_mask: Tensor
    label_mask: Tensor
    name: str
    categories: tuple[str, ...] = ()
    replaced_log_mel: Tensor | None = None
    captions: tuple[str, ...] | None = None
    negative: bool | None = None
    own_log_mel: Tensor | None = None


@dataclass
class Batch:
    """Clips of equal T, H and W, stacked: every tensor of `Clip` with a leading B.

    `real` [N] and `labelled` [M] are the places of the frames that exist, and that have a label, among the B*T frames;
    found while the masks are on the CPU, they tell a model the sizes N and M without waiting for a GPU. `own_log_mel`
    holds the `log_mel` of clips that are not negative, and is None where no clip is.
    """

    frames: Tensor
    log_mel: Tensor
    masks: Tensor
    frame_mask: Tensor
    label_mask: Tensor
    names: list[str]
    categories: list[tuple[str, ...]]
    real: Tensor | None = None
    labelled: Tensor | None = None
    replaced_log_mel: Tensor | None = None
    captions: list[tuple[str, ...]] | None = None
    negative: Tensor | None = None
    own_log_mel: Tensor | None = None

    def __post_init__(self):
        if self.real is None:
            self.real = self.frame_mask.flatten().nonzero()[:, 0]
        if self.labelled is None:
            self.labelled = self.label_mask.flatten().nonzero()[:, 0]

    def _map(self, function) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(x) for name, x in values.items() if isinstance(x, Tensor)})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._map(Tensor.pin_memory)

    def __len__(self) -> int:
        return len(self.names)


def collate(clips: list[Clip]) -> Batch:
    """Stack clips into a batch. Raises ValueError where their shapes differ."""
    shapes = {tuple(clip.frames.shape) for clip in clips}
    if len(shapes) != 1:
        raise ValueError(f"collate: clips must share one shape of frames, got {sorted(shapes)}")
    stack = {name: torch.stack([getattr(clip, name) for clip in clips])
             for name in ("frames", "log_mel", "masks", "frame_mask", "label_mask")}
    replaced, captions = [clip.replaced_log_mel for clip in clips], [clip.captions for clip in clips]
    negative = [clip.negative for clip in clips]
    own = [clip.log_mel if clip.own_log_mel is None else clip.own_log_mel for clip in clips]
    return Batch(**stack, names=[clip.name for clip in clips], categories=[clip.categories for clip in clips],
                 replaced_log_mel=None if any(x is None for x in replaced) else torch.stack(replaced),
                 captions=None if None in captions else captions,
                 negative=None if None in negative else torch.tensor(negative),
                 own_log_mel=torch.stack(own) if any(negative) else None)


def build_dataset(data: DataConfig, split: str) -> torch.utils.data.Dataset:
    """The map-style data set of `Clip` that `data` describes; a toy or composed benchmark that is missing
    is written first.

    Args:
        data: root, subset and reading rules; see `icf.config.DataConfig`.
        split: `train`, `val` or `test`.

    Returns:
        A data set with the attributes `classes` (["background", ...], or [] for binary masks), `subset`, `split` and
        `names`, and the methods `waveform(index)` (float32 [n], 16000), `with_audio(index, waveform)` (a `Clip`),
        `frame_count(index)`, `sounding(index)` (a set of names, empty where they are not known) and
        `sounding_classes()` (those of all clips).

    Raises:
        FileNotFoundError: the root, its metadata or a file that they name is missing.
        ValueError: a setting is out of range, or the root holds a benchmark of other settings.
    """
    if data.toy is not None:
        from icf.data import toy

        toy.ensure(data.root, data.subset, data.toy)
    if data.compose is not None:
        from icf.data import compose

        compose.ensure(data.root, data.subset, data.compose)
    if data.subset == "folder":
        from icf.data.folder import FolderDataset

        return FolderDataset(data, split)
    from icf.data.avsbench import AVSBench

    return AVSBench(data, split)
