"""`ICF`: builds the parts from the configuration and holds the path through them; no other file knows the order."""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icf.config import LossConfig, ModelConfig
from icf.context import VisualContext
from icf.decoder import Decoded, Decoder
from icf.encoders.audio import OUT as AUDIO_DIM
from icf.encoders.audio import VGGish
from icf.encoders.visual import VisualEncoder
from icf.losses import Losses, dense_losses, matched_losses
from icf.pixel_decoder import PixelDecoder

if TYPE_CHECKING:
    from icf.data import Batch

SILENT = -20.0
"""Logit of a pixel of a padded frame."""


class ICF(nn.Module):
    """Audio-visual segmentation: which pixels of a frame belong to what is heard.

    Args:
        model, loss: settings.
        pretrained: False leaves weight files alone, for a model whose weights are loaded next.

    Raises:
        ValueError: settings that contradict each other, or weights that do not fit.
        FileNotFoundError, RuntimeError: weights that are missing, or cannot be fetched.
    """

    def __init__(self, model: ModelConfig, loss: LossConfig | None = None, pretrained: bool = True):
        super().__init__()
        loss, decoder, context = loss or LossConfig(), model.decoder, model.context
        self.classes = model.classes
        self.dense = decoder.head == "dense" or (decoder.head == "auto" and model.classes == 1)
        if self.dense and model.classes > 1:
            raise ValueError(f"model.decoder.head: the dense head has one foreground, model.classes is {model.classes}")
        if self.dense and loss.preset == "combo":
            raise ValueError("loss.preset: combo weighs matched masks; use it with model.decoder.head=mask2former")
        self.visual = VisualEncoder(model.visual.name, model.visual.weights if pretrained else "none",
                                    model.visual.freeze_norm)
        self.audio = VGGish(model.audio.weights if pretrained else "none", model.audio.width, model.audio.train)
        channels = self.visual.channels
        self.context = VisualContext(channels[2:], context.levels, context.dim, context.literal_product)
        self.pixel_decoder = PixelDecoder(channels, decoder.dim, decoder.pixel_layers, decoder.pixel_ffn, decoder.heads,
                                          decoder.points)
        self.decoder = Decoder(AUDIO_DIM, decoder.dim, decoder.layers, decoder.ffn, decoder.heads, decoder.queries,
                               decoder.query_mode, decoder.audio_keys, None if self.dense else model.classes)
        self.deep_supervision, self.preset = loss.deep_supervision, loss.preset
        self.weights = {"bce": 5.0, "dice": 5.0, "ce": 2.0} if loss.preset == "combo" else {
            "bce": loss.bce, "dice": loss.dice, "focal": loss.focal}

    def forward(self, batch: Batch) -> Losses | Tensor:
        """Training: the losses. Eval: logits [B,T,1,H,W] of the foreground, or scores [B,T,K,H,W] of K classes.

        Padded frames are never computed; they come out as background.
        """
        clips = Packing(batch.real, batch.frame_mask)
        maps = self.visual(clips.pack(batch.frames))                        # res2..res5 [N,C,H/4,W/4] ..
        audio = clips.unpack(self.audio(clips.pack(batch.log_mel)))         # [B, T, 128]
        maps = self._context(maps, clips)
        frames = batch.labelled if self.training else batch.real            # [M], those to be decoded, among B*T
        pixels, levels = self.pixel_decoder([x[clips.find(frames)] for x in maps] if self.training else maps)
        decoded = self.decoder(pixels, levels, audio, frames, clips.mask, self.training and self.deep_supervision)
        with torch.autocast(frames.device.type, enabled=False):
            if self.training:
                return self._losses(decoded, batch.masks.flatten(0, 1)[frames])
            return clips.unpack(self._predict(decoded, batch.frames.shape[-2:]), self._background)

    def _context(self, maps: list[Tensor], clips: Packing) -> list[Tensor]:
        coarse = [clips.unpack(x).flatten(0, 1) for x in maps[2:]]          # res4, res5 [B*T, C, h, w]
        coarse = self.context(coarse, clips.shape[1], clips.mask)
        return [*maps[:2], *(clips.pack(x.unflatten(0, clips.shape)) for x in coarse)]

    def _losses(self, decoded: Decoded, masks: Tensor) -> Losses:
        """masks: [M,H,W] of the decoded frames."""
        terms = dense_losses(decoded.masks, masks) if self.dense else matched_losses(
            decoded.classes, decoded.masks, masks, self.preset)
        return Losses(sum(self.weights[name] * value for name, value in terms.items()), terms)

    def _predict(self, decoded: Decoded, size: tuple[int, int]) -> Tensor:
        """[M,1,H,W] logits, or [M,K,H,W] sum over queries of p(class) sigmoid(mask), at the size of the frames."""
        masks = decoded.masks[-1].float()
        if self.dense:
            return _enlarge(masks, size)
        classes = decoded.classes[-1].float().softmax(-1)[..., :-1]         # [M, Q, K]
        scores = torch.stack([torch.einsum("qk,qhw->khw", p, _enlarge(m[None], size)[0].sigmoid())
                              for p, m in zip(classes, masks, strict=True)])  # frame by frame: Q maps of full size
        return torch.logit(scores, eps=1e-6) if self.classes == 1 else scores

    @property
    def _background(self) -> Tensor:
        """What a pixel of a padded frame comes out as, [K,1,1]."""
        value = [SILENT] if self.classes == 1 else [1.0] + [0.0] * (self.classes - 1)
        return torch.tensor(value)[:, None, None]


class Packing:
    """The real frames of B clips of T frames: [B,T,...] to [N,...] and back; free where all frames are real.

    Args:
        real: [N] their places among the B*T, ascending.
        frame_mask: [B,T] bool, the same as a mask.
    """

    def __init__(self, real: Tensor, frame_mask: Tensor):
        self.shape, self.real = frame_mask.shape, real
        self.mask = None if len(real) == frame_mask.numel() else frame_mask

    def pack(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1) if self.mask is None else x.flatten(0, 1)[self.real]

    def unpack(self, x: Tensor, fill: Tensor | float = 0.0) -> Tensor:
        """Frames that are not real are `fill`."""
        if self.mask is not None:
            out = x.new_empty(self.mask.numel(), *x.shape[1:])
            out.copy_(fill) if isinstance(fill, Tensor) else out.fill_(fill)
            x = out.index_copy(0, self.real, x)
        return x.unflatten(0, self.shape)

    def find(self, frames: Tensor) -> Tensor:
        """Places among the N packed frames of real frames, given by their places among the B*T."""
        return frames if self.mask is None else torch.searchsorted(self.real, frames)


def _enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
