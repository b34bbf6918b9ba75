"""`ICF`: builds the parts from the configuration and holds the path through them; no other file knows the order."""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icf.config import LossConfig, ModelConfig, ObjectiveConfig
from icf.context import VisualContext
from icf.model.audio import OUT as AUDIO_DIM
from icf.model.audio import sound_encoder
from icf.model.decoder import Decoded, Decoder
from icf.model.losses import Losses, dense_counts, dense_losses, matched_counts, matched_losses
from icf.model.packing import Packing, background
from icf.model.pixel_decoder import PixelDecoder
from icf.model.standardise import Standardise
from icf.model.visual import VisualEncoder
from icf.objective.objective import ICFObjective, Reading

if TYPE_CHECKING:
    from icf.data import Batch
    from icf.objective.sc import Counterfactuals


class ICF(nn.Module):
    """Audio-visual segmentation: which pixels of a frame belong to what is heard.

    Args:
        model, loss: settings.
        objective: settings of the training objective beside segmentation; None: there is none, as in the baseline.
        inference: without what only training needs; the model is then for `eval` alone.
        pretrained: False leaves weight files alone, for a model whose weights are loaded next.

    Raises:
        ValueError: settings that contradict each other, or weights that do not fit.
        FileNotFoundError, ConnectionError: weights that are missing, or cannot be fetched.
    """

    def __init__(self, model: ModelConfig, loss: LossConfig | None = None,
                 objective: ObjectiveConfig | None = None, pretrained: bool = True, inference: bool = False):
        super().__init__()
        loss, decoder, context = loss or LossConfig(), model.decoder, model.context
        self.classes, self.inference = model.classes, inference
        self.dense = decoder.head == "dense" or (decoder.head == "auto" and model.classes == 1)
        if self.dense and model.classes > 1:
            raise ValueError(f"model.decoder.head: the dense head has one foreground, model.classes is {model.classes}")
        if self.dense and loss.preset == "combo":
            raise ValueError("loss.preset: combo weighs matched masks; use it with model.decoder.head=mask2former")
        self.visual = VisualEncoder(model.visual.name, model.visual.weights if pretrained else "none",
                                    model.visual.freeze_norm)
        self.audio = sound_encoder(model.audio, pretrained)
        self.standardise = Standardise(AUDIO_DIM) if model.audio.standardise else None
        channels = self.visual.channels
        self.context = VisualContext(channels[2:], context.levels, context.dim, context.literal_product)
        self.pixel_decoder = PixelDecoder(channels, decoder.dim, decoder.pixel_layers, decoder.pixel_ffn, decoder.heads,
                                          decoder.points)
        objective = objective if objective is not None and objective.enabled else None
        self.injected = objective is not None and objective.mit.enabled and objective.mit.inject == "cross_attention"
        self.decoder = Decoder(AUDIO_DIM, decoder.dim, decoder.layers, decoder.ffn, decoder.heads, decoder.queries,
                               decoder.query_mode, decoder.audio_keys, None if self.dense else model.classes,
                               objective.mit.dim if self.injected else None)
        self.objective = None
        if objective is not None and (self.injected or not inference):
            if objective.cdcl.enabled and not self.decoder.hear:
                raise ValueError("model.decoder.query_mode: expected a mode that hears for objective.cdcl, got "
                                 f"{decoder.query_mode!r}")
            self.objective = ICFObjective(
                decoder.dim, decoder.dim, objective, map_dims=channels[2:], sound_dim=AUDIO_DIM, attended=("segment",),
                context_dim=context.dim, literal_product=context.literal_product, inference=inference)
        self.deep_supervision, self.preset = loss.deep_supervision, loss.preset
        self.weights = {"bce": 5.0, "dice": 5.0, "ce": 2.0} if loss.preset == "combo" else {
            "bce": loss.bce, "dice": loss.dice, "focal": loss.focal}

    def forward(self, batch: Batch) -> Losses | Tensor:
        """Training: the losses. Eval: logits [B,T,1,H,W] of the foreground, or scores [B,T,K,H,W] of K classes.

        Padded frames are never computed; they come out as background.
        """
        if self.training:
            return self._step(batch)
        clips = Packing(batch.real, batch.frame_mask)
        maps, coarse, audio = self._encode(batch, clips)
        text = self._text(self._read(coarse, audio, clips), batch.real) if self.injected else None
        decoded = self.decoder(*self.pixel_decoder(maps), audio, batch.real, clips.mask, text=text)
        with torch.autocast(audio.device.type, enabled=False):
            return clips.unpack(self._predict(decoded, batch.frames.shape[-2:]), background(self.classes))

    def _step(self, batch: Batch) -> Losses:
        """The path of training: encoders, MIT, SC, decoder, CDCL, loss."""
        if self.inference:
            raise RuntimeError("ICF: this model was built for inference, without its training objective")
        clips = Packing(batch.real, batch.frame_mask)
        maps, coarse, audio = self._encode(batch, clips)                    # res2..res5 [N,C,H/4,W/4] .., [B, T, 128]
        own = audio if batch.own_log_mel is None else self._hear(batch.own_log_mel, clips)
        reading = self._read(coarse, own, clips)                            # MIT: text [B, T, D], of the clips' sounds
        cf = self._imagine(reading, batch, clips)                           # SC: counterfactual texts [B, K, T, D]
        contrasted = self.objective is not None and self.objective.cdcl is not None
        frames = batch.real if contrasted else batch.labelled               # [M], those to be decoded, among B*T
        text = self._text(reading, frames) if self.injected else None
        pixels, levels = self.pixel_decoder([x[clips.find(frames)] for x in maps])
        decoded = self.decoder(pixels, levels, audio, frames, clips.mask, self.deep_supervision, text,
                               clips.find(batch.labelled) if contrasted else None)
        with torch.autocast(audio.device.type, enabled=False):
            losses = self._losses(decoded, batch.masks.flatten(0, 1)[batch.labelled])           # Eq. 18
            if self.objective is None:
                return losses
            if not contrasted:
                return losses + self.objective.contrast(None, None, reading, cf)
            seen, heard, where = (clips.unpack(x) for x in (decoded.pixels, decoded.audio[:, 0], decoded.foreground))
            return losses + self.objective.contrast(seen, heard, reading, cf, clips.mask,  # CDCL, Eq. 19
                                                    batch.negative, where)

    def _encode(self, batch: Batch, clips: Packing) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Maps of the real frames, res4 and res5 again by clip [B,T,C,h,w], and sound [B,T,128]."""
        maps = self.visual(clips.pack(batch.frames))                        # res2..res5 [N,C,H/4,W/4] ..
        audio = self._hear(batch.log_mel, clips, learn=True)                # [B, T, 128]
        coarse = [clips.unpack(x).flatten(0, 1) for x in maps[2:]]          # res4, res5 [B*T, C, h, w]
        coarse = self.context(coarse, clips.shape[1], clips.mask)
        coarse = [x.unflatten(0, clips.shape) for x in coarse]
        return [*maps[:2], *(clips.pack(x) for x in coarse)], coarse, audio

    def _hear(self, log_mel: Tensor, clips: Packing, learn: bool = False) -> Tensor:
        """[B,T,1,96,64] -> [B,T,128]; learn: what sounds usually are, in training."""
        heard = self.audio(clips.pack(log_mel))
        return clips.unpack(heard if self.standardise is None else self.standardise(heard, learn))

    def _read(self, coarse: list[Tensor], audio: Tensor, clips: Packing) -> Reading | None:
        return None if self.objective is None else self.objective.read(coarse, audio, clips.mask)

    def _imagine(self, reading: Reading | None, batch: Batch, clips: Packing) -> Counterfactuals | None:
        if self.objective is None:
            return None
        replaced = None if batch.replaced_log_mel is None else self._hear(batch.replaced_log_mel, clips)
        return self.objective.imagine(reading, clips.mask, replaced, batch.captions)

    @staticmethod
    def _text(reading: Reading, frames: Tensor) -> Tensor:
        """Visual, audio and composite text of frames given by their places among the B*T: [N,3,D]."""
        text = reading.text
        z = text.z.expand(-1, text.visual.shape[1], -1)
        return torch.stack([text.visual, text.audio, z], 2).flatten(0, 1)[frames]

    def _losses(self, decoded: Decoded, masks: Tensor) -> Losses:
        """masks: [M,H,W] of the decoded frames."""
        terms = dense_losses(decoded.masks, masks) if self.dense else matched_losses(
            decoded.classes, decoded.masks, masks, self.preset)
        return Losses({name: self.weights[name] * value for name, value in terms.items()}, terms)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What each segmentation term of a batch is a mean over, 0-dim, to weigh batches of one step by."""
        masks = batch.masks.flatten(0, 1)[batch.labelled]
        return dense_counts(masks) if self.dense else matched_counts(masks, self.classes, len(self.decoder.queries))

    def _predict(self, decoded: Decoded, size: tuple[int, int]) -> Tensor:
        """[M,1,H,W] logits, or [M,K,H,W] sum over queries of p(class) sigmoid(mask), at the size of the frames."""
        masks = decoded.masks[-1].float()
        if self.dense:
            return _enlarge(masks, size)
        classes = decoded.classes[-1].float().softmax(-1)[..., :-1]         # [M, Q, K]
        if torch.compiler.is_exporting():                                   # of any number of frames
            scores = torch.einsum("nqk,nqhw->nkhw", classes, _enlarge(masks, size).sigmoid())
        else:                                                               # frame by frame: Q maps of full size
            scores = torch.stack([torch.einsum("qk,qhw->khw", p, _enlarge(m[None], size)[0].sigmoid())
                                  for p, m in zip(classes, masks, strict=True)])
        return torch.logit(scores, eps=1e-6) if self.classes == 1 else scores


def _enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
