"""Hosts of the objective: AVSBench's TPAVI and AVSegFormer, compact, with the interface of `icf.model.icf.ICF`.

They show that `ICFObjective` is a plug-in (Table 3 of the paper): it sees what a host's own audio-visual interaction
yields, its terms are added to the host's own loss, and nothing of it is left at test time.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icf.config import DecoderConfig, LossConfig, ModelConfig, ObjectiveConfig
from icf.model.audio import OUT as AUDIO_DIM
from icf.model.audio import sound_encoder
from icf.model.losses import IGNORE, Losses, class_counts, class_losses, dense_counts, dense_losses
from icf.model.packing import Packing, background
from icf.model.pixel_decoder import PixelDecoder
from icf.model.standardise import Standardise
from icf.model.visual import VisualEncoder, keep_finite
from icf.objective.objective import ICFObjective

if TYPE_CHECKING:
    from icf.data import Batch

MIX = 0.1
"""Weight of the dice loss of the mask that a host's features themselves are *(AVSegFormer)*."""


class Interaction(NamedTuple):
    """What a host makes of M frames.

    Args:
        logits: [M,K,H,W] of one foreground, or of K classes.
        visual: [M,C,h,w], the finest map after the interaction with sound.
        maps: coarse ones [M,C,..], to which text is matched.
        audio: [M,D], the sound of each frame after the interaction.
        mix: [M,1,h,w] logits of the foreground that are trained besides; None where there are none.
    """

    logits: Tensor
    visual: Tensor
    maps: Sequence[Tensor]
    audio: Tensor
    mix: Tensor | None = None


class Host(nn.Module):
    """A model that segments sound, to which the objective may be added. Subclasses say how they `build` and `interact`.

    The arguments are those of `icf.model.icf.ICF`. One foreground is trained by the weights of `loss`, classes by cross
    entropy.

    Raises:
        ValueError: settings that ask a host for what it does not have, or weights that do not fit.
        FileNotFoundError, ConnectionError: weights that are missing, or cannot be fetched.
    """

    def __init__(self, model: ModelConfig, loss: LossConfig | None = None,
                 objective: ObjectiveConfig | None = None, pretrained: bool = True, inference: bool = False):
        super().__init__()
        loss, objective = loss or LossConfig(), objective if objective is not None and objective.enabled else None
        _check(model, loss, objective)
        self.classes, self.inference = model.classes, inference
        self.weights = {"bce": loss.bce, "dice": loss.dice, "focal": loss.focal, "ce": 1.0, "mix": MIX}
        self.visual = VisualEncoder(model.visual.name, model.visual.weights if pretrained else "none",
                                    model.visual.freeze_norm)
        self.audio = sound_encoder(model.audio, pretrained)
        self.standardise = Standardise(AUDIO_DIM) if model.audio.standardise else None
        dim, audio_dim = model.decoder.dim, self.build(self.visual.channels, model.decoder, model.classes)
        self.objective = None                                               # the last, so that the same seed gives the
        if objective is not None and not inference:                         # same host with and without it
            self.objective = ICFObjective(dim, audio_dim, objective, map_dims=[dim, dim], sound_dim=AUDIO_DIM,
                                          context_dim=model.context.dim, literal_product=model.context.literal_product)

    def build(self, channels: Sequence[int], decoder: DecoderConfig, classes: int) -> int:
        """Create the parts for maps of these channels; returns the width of `Interaction.audio`."""
        raise NotImplementedError

    def interact(self, maps: Sequence[Tensor], audio: Tensor, clips: Packing, frames: Tensor) -> Interaction:
        """maps: res2..res5 of the real frames [N,C,H/4,W/4] ..; audio: [B,T,128]; frames: [M] places among the B*T of
        those to be segmented."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Losses | Tensor:
        """Training: the losses. Eval: logits [B,T,1,H,W] of the foreground, or probabilities [B,T,K,H,W] of K classes.

        Padded frames are never computed; they come out as background.
        """
        if self.training and self.inference:
            raise RuntimeError(f"{type(self).__name__}: this model was built for inference, without its training "
                               "objective")
        clips = Packing(batch.real, batch.frame_mask)
        maps = self.visual(clips.pack(batch.frames))                        # res2..res5 [N,C,H/4,W/4] ..
        audio = self._hear(batch.log_mel, clips, learn=True)                # [B, T, 128]
        only_labelled = self.training and self.objective is None
        found = self.interact(maps, audio, clips, batch.labelled if only_labelled else batch.real)
        with torch.autocast(audio.device.type, enabled=False):
            if not self.training:
                logits = found.logits.float()
                return clips.unpack(logits if self.classes == 1 else logits.softmax(1), background(self.classes))
            wanted = slice(None) if only_labelled else clips.find(batch.labelled)
            losses = self._losses(found, wanted, batch.masks.flatten(0, 1)[batch.labelled])
            return losses if self.objective is None else losses + self._objective(found, audio, clips, batch)

    def _hear(self, log_mel: Tensor, clips: Packing, learn: bool = False) -> Tensor:
        """[B,T,1,96,64] -> [B,T,128]; learn: what sounds usually are, in training."""
        heard = self.audio(clips.pack(log_mel))
        return clips.unpack(heard if self.standardise is None else self.standardise(heard, learn))

    def _losses(self, found: Interaction, wanted: Tensor | slice, masks: Tensor) -> Losses:
        """wanted: places of the labelled among the frames found; masks: [L,H,W], theirs."""
        losses = dense_losses if self.classes == 1 else class_losses
        terms = losses(found.logits[None, wanted], masks)
        if found.mix is not None:
            known = masks.clamp(max=1).where(masks != IGNORE, masks)
            terms["mix"] = dense_losses(found.mix[None, wanted], known)["dice"]
        return Losses({name: self.weights[name] * value for name, value in terms.items()}, terms)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """As of `icf.model.icf.ICF`."""
        masks = batch.masks.flatten(0, 1)[batch.labelled]
        dense = dense_counts(masks)
        return {**(dense if self.classes == 1 else class_counts(masks)), "mix": dense["dice"]}

    def _objective(self, found: Interaction, audio: Tensor, clips: Packing, batch: Batch) -> dict[str, Tensor]:
        seen, heard, *maps = (clips.unpack(x.float()) for x in (found.visual, found.audio, *found.maps))
        logits = found.logits.detach().float()
        where = logits.sigmoid() if self.classes == 1 else 1 - logits.softmax(1)[:, :1]
        own, replaced = (None if x is None else self._hear(x, clips).float()
                         for x in (batch.own_log_mel, batch.replaced_log_mel))
        return self.objective(seen, heard, clips.mask, clips.unpack(where), maps=maps,
                              sound=audio.float() if own is None else own, replaced_sound=replaced,
                              captions=batch.captions, negative=batch.negative)


class TPAVI(Host):
    """AVSBench's model (Zhou et al., ECCV 2022): atrous convolutions, sound attended to at four levels, and fusion from
    coarse to fine. Its loss is cross entropy; the optional KL loss between sight and sound is left out."""

    def build(self, channels: Sequence[int], decoder: DecoderConfig, classes: int) -> int:
        dim = decoder.dim
        self.reduce = nn.ModuleList(Atrous(c, dim) for c in channels)
        self.attend = nn.ModuleList(SoundAttention(AUDIO_DIM, dim) for _ in channels)
        self.adapt = nn.ModuleList(Residual(dim) for _ in channels[1:])
        self.smooth = nn.ModuleList(Residual(dim) for _ in channels)
        self.head = _mask_head(dim, classes, 2)
        return AUDIO_DIM

    def interact(self, maps: Sequence[Tensor], audio: Tensor, clips: Packing, frames: Tensor) -> Interaction:
        maps = [attend(reduce(x), audio, clips)
                for reduce, attend, x in zip(self.reduce, self.attend, maps, strict=True)]
        maps = [x[clips.find(frames)] for x in maps]                        # [M, C, H/4, W/4] .. [M, C, H/32, W/32]
        x = _double(self.smooth[3](maps[3]))
        for level in (2, 1, 0):
            x = _double(self.smooth[level](x + self.adapt[level](maps[level])))
        return Interaction(self.head(x), maps[0], maps[2:], audio.flatten(0, 1)[frames])


class Atrous(nn.Module):
    """The sum of 3x3 convolutions that look 3, 6, 12 and 18 pixels far."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, dim, 3, padding=d, dilation=d) for d in (3, 6, 12, 18))
        for conv in self.convs:
            nn.init.normal_(conv.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return sum(conv(x) for conv in self.convs)


class SoundAttention(nn.Module):
    """Temporal pixel-wise audio-visual interaction: `LayerNorm(x + BatchNorm(W y))`, where pixel p of a clip receives
    `y_p = 1/N sum_q (theta(x_p) . phi(a_q)) g(x_q)` from its N = T*H*W pixels q and the sounds a_q of their seconds.

    There is no softmax, and all pixels of a second share its sound, so that the sum is `theta(x_p) M` with one matrix
    for the clip, `M = 1/T sum_t phi(a_t) g(mean x_t)^T`; N x N scores are never computed. The norm starts at zero, as
    published: the features of the encoder are whole at the start.
    """

    def __init__(self, audio_dim: int, dim: int):
        super().__init__()
        inner = dim // 2
        self.theta = nn.Conv2d(dim, inner, 1)
        self.phi, self.g = nn.Linear(audio_dim, inner), nn.Linear(dim, inner)
        self.expand = keep_finite(nn.Sequential(nn.Conv2d(inner, dim, 1, bias=False), nn.BatchNorm2d(dim)))
        self.norm = nn.LayerNorm(dim)
        nn.init.zeros_(self.expand[1].weight)

    def forward(self, x: Tensor, audio: Tensor, clips: Packing) -> Tensor:
        """x: [N,C,h,w] of the real frames; audio: [B,T,D] -> as x."""
        steps = audio.shape[1]
        value = clips.unpack(self.g(x.mean((2, 3))))                        # [B, T, C'], zero where there is no frame
        count = steps if clips.mask is None else clips.mask.sum(1).clamp(min=1)[:, None, None]
        mixed = value.transpose(1, 2) @ self.phi(audio) / count             # [B, C', C'], M transposed
        y = mixed[clips.real // steps] @ self.theta(x).flatten(2)           # [N, C', S]
        x = x + self.expand(y.unflatten(2, x.shape[2:]))
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Residual(nn.Module):
    """A residual unit of RefineNet's fusion."""

    def __init__(self, dim: int):
        super().__init__()
        self.convs = nn.Sequential(nn.ReLU(), _conv(dim, dim), nn.ReLU(), _conv(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convs(x)


class AVSegFormer(Host):
    """AVSegFormer (Gao et al., AAAI 2024): queries of sound read a deformable encoder's memory, sound gates the
    channels of the mask features, and what the queries find there is added to them. Without dropout *(ours)*."""

    def build(self, channels: Sequence[int], decoder: DecoderConfig, classes: int) -> int:
        dim, heads, ffn, queries = decoder.dim, decoder.heads, decoder.ffn, decoder.queries
        self.pixel_decoder = PixelDecoder(channels, dim, decoder.pixel_layers, decoder.pixel_ffn, heads, decoder.points)
        self.hear = nn.Linear(AUDIO_DIM, dim)
        self.audio_queries, self.queries = (nn.Parameter(torch.randn(queries, dim)) for _ in range(2))
        self.listen, self.look = (nn.ModuleList(QueryLayer(dim, ffn, heads) for _ in range(decoder.layers))
                                  for _ in range(2))
        self.gate = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.find = nn.Sequential(nn.Conv2d(queries, ffn, 1), nn.ReLU(), nn.Conv2d(ffn, ffn, 1), nn.ReLU(),
                                  nn.Conv2d(ffn, dim, 1))
        self.head = _mask_head(dim, classes, 4)
        return dim

    def interact(self, maps: Sequence[Tensor], audio: Tensor, clips: Packing, frames: Tensor) -> Interaction:
        pixels, levels = self.pixel_decoder([x[clips.find(frames)] for x in maps])
        memory = torch.cat([x.flatten(2).transpose(1, 2) for x in levels], 1)                           # [M, S, C]
        own = self.hear(audio.flatten(0, 1)[frames, None])                                              # [M, 1, C]
        queries = self.audio_queries.expand(len(own), -1, -1)                                           # [M, Q, C]
        for layer in self.listen:
            queries = layer(queries, own)
        queries = queries + self.queries
        for layer in self.look:
            queries = layer(queries, memory)
        tokens = pixels.flatten(2).transpose(1, 2)
        gate = self.gate(own, tokens, tokens, need_weights=False)[0].sigmoid()                          # [M, 1, C]
        pixels = pixels * gate.transpose(1, 2)[..., None]
        found = self.find(torch.einsum("mqc,mchw->mqhw", queries, pixels))
        return Interaction(self.head(pixels + found), pixels, levels[1:], queries.mean(1), pixels.mean(1, keepdim=True))


class QueryLayer(nn.Module):
    """Self-attention of queries, their attention to a memory, and a feed-forward network; LayerNorm after each."""

    def __init__(self, dim: int, ffn: int, heads: int):
        super().__init__()
        self.self_attention, self.cross_attention = (
            nn.MultiheadAttention(dim, heads, batch_first=True) for _ in range(2))
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.GELU(), nn.Linear(ffn, dim))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """queries: [M,Q,C]; memory: [M,S,C] -> queries."""
        queries = self.norm1(queries + self.self_attention(queries, queries, queries, need_weights=False)[0])
        queries = self.norm2(queries + self.cross_attention(queries, memory, memory, need_weights=False)[0])
        return self.norm3(queries + self.ffn(queries))


def _check(model: ModelConfig, loss: LossConfig, objective: ObjectiveConfig | None) -> None:
    if model.decoder.head == "mask2former":
        raise ValueError(f"model.decoder.head: expected auto or dense for model.network={model.network}, got "
                         "mask2former")
    if loss.preset == "combo":
        raise ValueError(f"loss.preset: combo weighs matched masks, model.network={model.network} has none")
    if objective is not None and objective.mit.enabled and objective.mit.inject != "none":
        raise ValueError(f"objective.mit.inject: expected none for model.network={model.network}, got "
                         f"{objective.mit.inject}")


def _mask_head(dim: int, classes: int, scale: int) -> nn.Sequential:
    """Features to logits `scale` times as large, through a half and an eighth of the channels."""
    return nn.Sequential(_conv(dim, dim // 2), nn.Upsample(scale_factor=scale, mode="bilinear", align_corners=False),
                         _conv(dim // 2, dim // 8), nn.ReLU(), nn.Conv2d(dim // 8, classes, 1))


def _conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
