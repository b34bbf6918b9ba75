"""Audio-visual queries and the masked decoder that turns them into masks, as in Mask2Former and COMBO-AVS."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icf.model.position import sine_position


class Decoded(NamedTuple):
    """What the decoder hands on: of every supervised head (P of them; one at test time) and of the interaction.

    Args:
        masks: [P,M,1,h,w] logits (dense), or [P,M,Q,h,w], at stride 4, of the supervised frames.
        classes: [P,M,Q,K+1] logits, the last for "no object"; None for the dense head.
        pixels: [N,C,h,w] mask features after the interaction with sound.
        audio: [N,1,C] the frame's sound after the interaction with pixels; None where queries hear nothing.
        foreground: [N,1,h,w] probability that a pixel belongs to what sounds, constant; None if not asked for.
    """

    masks: Tensor
    classes: Tensor | None
    pixels: Tensor
    audio: Tensor | None
    foreground: Tensor | None = None


class Decoder(nn.Module):
    """Mask features, levels and sound to masks.

    Args:
        audio_dim: width of the sound features.
        dim, layers, ffn, heads, queries: of the transformer.
        mode: `bidirectional`: sound and mask features attend to each other, then queries receive the sound; `audio`:
            they receive it as it is; `learnable`: they hear nothing.
        audio_keys: sounds that pixels attend to: `clip_null`, the clip's seconds and a learned null token, or their
            `own` second (a softmax over one key is constant: pixels then cannot tell where the sound fits).
        classes: K of the class head (Mask2Former); None for the dense head: one foreground, whose logit is the mean of
            the queries' masks, weighted by a softmax over the queries.
        text_dim: width of texts that the queries read (an ablation of the paper); None: they read none.
    """

    def __init__(self, audio_dim: int, dim: int, layers: int, ffn: int, heads: int, queries: int,
                 mode: str = "bidirectional", audio_keys: str = "clip_null", classes: int | None = None,
                 text_dim: int | None = None):
        super().__init__()
        self.hear = mode != "learnable"
        if self.hear:
            hidden = 16 * dim                                               # 4096 at width 256 (COMBO)
            # The norm is ours: VGGish's rectified features have any scale, and without it a network trained from
            # nothing grows them until the queries' rectifiers die and it goes deaf.
            self.audio = nn.Sequential(nn.LayerNorm(audio_dim), nn.Linear(audio_dim, dim))
            self.to_queries = _mlp(dim, hidden, hidden, dim)
            self.to_queries.apply(_keep_scale)                              # so that sound and query weigh alike (ours)
        self.fusion = Fusion(dim, heads, audio_keys == "clip_null") if mode == "bidirectional" else None
        self.queries = nn.Parameter(torch.randn(queries, dim))
        self.masked = MaskedDecoder(dim, layers, ffn, heads, queries, 1 if classes is None else classes + 1)
        self.dense = classes is None
        if text_dim is not None:
            self.text, self.read = _linear(text_dim, dim), Attention(dim, heads)

    def forward(self, pixels: Tensor, levels: Sequence[Tensor], audio: Tensor, frames: Tensor,
                frame_mask: Tensor | None = None, all_heads: bool = False, text: Tensor | None = None,
                supervised: Tensor | None = None) -> Decoded:
        """Masks of N frames, taken from clips of T.

        Args:
            pixels: [N,C,h,w] mask features.
            levels: [N,C,..] maps at strides 8, 16, 32.
            audio: [B,T,audio_dim] of the clips.
            frames: [N] places of the N frames among the B*T.
            frame_mask: [B,T] bool; sounds of other frames are not heard. None: all are real.
            all_heads: masks of the initial queries and of every layer, instead of the last.
            text: [N,W,text_dim], what the queries read.
            supervised: [M] places among the N of the frames whose masks are wanted, with the foreground of all, which
                takes no gradient. None: masks of all, no foreground.
        """
        queries, own = self.queries.expand(pixels.shape[0], -1, -1), None       # [N, Q, C]
        if self.hear:
            audio = self.audio(audio)                                       # [B, T, C]
            own = audio.flatten(0, 1)[frames, None]                         # [N, 1, C]
            if self.fusion is not None:
                pixels, own = self.fusion(pixels, audio, own, frames, frame_mask)
            queries = queries + self.to_queries(own)                        # each frame's queries, its own sound
        if text is not None:
            read = self.text(text)                                          # [N, W, C]
            queries = queries + self.read(queries, read, read)
        if supervised is None:
            return Decoded(*self._masks(queries, levels, pixels, all_heads), pixels, own)
        wanted = queries[supervised], [x[supervised] for x in levels], pixels[supervised]
        masks, classes = self._masks(*wanted, all_heads)
        with torch.no_grad():
            if supervised.shape[0] == pixels.shape[0]:
                foreground = self._foreground(masks[-1:], classes)
            else:                                                           # the frames between, in one cheap pass
                foreground = self._foreground(*self._masks(queries, levels, pixels, False))
        return Decoded(masks, classes, pixels, own, foreground)

    def _masks(self, queries, levels, pixels, all_heads) -> tuple[Tensor, Tensor | None]:
        embeddings, scores = self.masked(queries, levels, pixels, all_heads)
        if self.dense:                                                      # a mean of masks is the mask of the mean
            embeddings, scores = (scores.softmax(2) * embeddings).sum(2, keepdim=True), None
        return torch.einsum("pnqc,nchw->pnqhw", embeddings, pixels), scores

    def _foreground(self, masks: Tensor, classes: Tensor | None) -> Tensor:
        """[N,1,h,w] from the last head; with classes, the share that is not background."""
        masks = masks[-1].float().sigmoid()                                 # [N, 1 or Q, h, w]
        if classes is None:
            return masks
        scores = torch.einsum("nqk,nqhw->nkhw", classes[-1].float().softmax(-1)[..., :-1], masks)
        if scores.shape[1] == 1:
            return scores.clamp(max=1)
        return 1 - scores[:, :1] / scores.sum(1, keepdim=True).clamp(min=1e-6)


class Fusion(nn.Module):
    """Attention between the sounds of a clip and the pixels of a frame in both directions, from one score matrix.

    Pixels attend to the sounds of all seconds, with their own marked, and to a null token; the frame's own sound
    attends to the pixels. Both residuals start at 1e-4 of their size *(COMBO)*. As there are few sounds, the pixels'
    projections are moved to the sounds' side, `(W p) . k = p . (W^T k)`, which leaves T+1 columns per head to compute
    instead of C.
    """

    def __init__(self, dim: int, heads: int, clip_keys: bool, scale: float = 1e-4):
        super().__init__()
        self.heads, self.clip_keys = heads, clip_keys
        self.pixel_norm, self.audio_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.pixel_query, self.audio_key = _linear(dim, dim), _linear(dim, dim)
        self.pixel_value, self.audio_value = _linear(dim, dim), _linear(dim, dim)
        self.pixel_out, self.audio_out = _linear(dim, dim), _linear(dim, dim)
        self.pixel_scale, self.audio_scale = (nn.Parameter(torch.full((dim,), scale)) for _ in range(2))
        if clip_keys:
            self.mark = nn.Parameter(0.02 * torch.randn(dim))
            self.null = nn.Parameter(0.02 * torch.randn(dim))

    def forward(self, pixels: Tensor, audio: Tensor, own: Tensor, frames: Tensor,
                frame_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """pixels: [N,C,h,w]; audio: [B,T,C]; own: [N,1,C]; frames: [N] -> pixels, own, with what they learned."""
        n, c, h, w = pixels.shape
        x = self.pixel_norm(pixels.flatten(2).transpose(1, 2))                                          # [N, S, C]
        keys, place, hidden = self._keys(audio, own, frames, frame_mask)                                # [N, K, C]
        keys = self.audio_norm(keys)
        k = self.audio_key(keys).unflatten(2, (self.heads, -1)) * (c // self.heads) ** -0.5             # [N, K, M, D]
        weight, bias = self.pixel_query.weight.unflatten(0, (self.heads, -1)), self.pixel_query.bias
        folded = torch.einsum("nkmd,mdc->nmkc", k, weight).flatten(1, 2)                                # [N, M*K, C]
        shift = torch.einsum("nkmd,md->nmk", k, bias.unflatten(0, (self.heads, -1)))                    # [N, M, K]
        scores = (x @ folded.transpose(1, 2)).unflatten(2, (self.heads, -1)) + shift[:, None]           # [N, S, M, K]

        heard = scores if hidden is None else scores.masked_fill(hidden[:, None, None], -torch.inf)
        value = self.audio_value(keys).unflatten(2, (self.heads, -1))                                   # [N, K, M, D]
        out = self.pixel_out.weight.unflatten(1, (self.heads, -1))                                      # [C, M, D]
        folded = torch.einsum("nkmd,cmd->nmkc", value, out).flatten(1, 2)                               # [N, M*K, C]
        heard = heard.softmax(-1).flatten(2) @ folded + self.pixel_out.bias                             # [N, S, C]

        index = place.view(n, 1, 1, 1).expand(-1, h * w, self.heads, 1)
        seen = scores.gather(3, index)[..., 0].softmax(1).transpose(1, 2) @ x                           # [N, M, C]
        weight, bias = self.pixel_value.weight.unflatten(0, (self.heads, -1)), self.pixel_value.bias
        seen = torch.einsum("nmc,mdc->nmd", seen, weight).flatten(1) + bias                             # [N, C]
        heard = (self.pixel_scale * heard).transpose(1, 2).unflatten(2, (h, w))
        return pixels + heard, own + (self.audio_scale * self.audio_out(seen))[:, None]

    def _keys(self, audio: Tensor, own: Tensor, frames: Tensor,
              frame_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The sounds of each frame [N,K,C], which of them is its own [N], and which are padding [N,K]."""
        if not self.clip_keys:
            return own, torch.zeros_like(frames), None
        steps = audio.shape[1]
        clip = frames // steps
        place = frames - clip * steps                                       # %, which ONNX has of constants only
        marked = (place[:, None] == torch.arange(steps, device=place.device))[..., None] * self.mark
        keys = torch.cat([audio[clip] + marked, self.null.to(audio.dtype).expand(frames.shape[0], 1, -1)], 1)
        return keys, place, None if frame_mask is None else F.pad(~frame_mask[clip], (0, 1))


class MaskedDecoder(nn.Module):
    """Layers of cross-attention to the pixels inside each query's current mask, self-attention and feed-forward.

    Args:
        outputs: numbers per query beside its mask: classes, or one weight.
    """

    def __init__(self, dim: int, layers: int, ffn: int, heads: int, queries: int, outputs: int):
        super().__init__()
        self.position = nn.Parameter(torch.randn(queries, dim))
        self.level = nn.Parameter(torch.randn(3, dim))
        self.layers = nn.ModuleList(MaskedLayer(dim, ffn, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.score = nn.Linear(dim, outputs)
        self.mask = _mlp(dim, dim, dim, dim)

    def forward(self, queries: Tensor, levels: Sequence[Tensor], pixels: Tensor,
                all_heads: bool) -> tuple[Tensor, Tensor]:
        """queries: [N,Q,C]; levels: strides 8, 16, 32; pixels: [N,C,h,w] -> mask embeddings [P,N,Q,C], [P,N,Q,outputs].

        The product of embeddings and pixels is linear in the pixels, so the masks that steer attention are computed at
        each level's own size.
        """
        memory, values, small = [], [], []
        for i in (2, 1, 0):                                                 # strides 32, 16, 8, and again
            level = levels[i].flatten(2).transpose(1, 2) + self.level[i]                                # [N, S, C]
            values.append(level)
            memory.append(level + sine_position(*levels[i].shape[2:], level.shape[2], level.device).to(level.dtype))
            small.append(F.interpolate(pixels.detach(), size=levels[i].shape[2:], mode="bilinear",
                                       align_corners=False).flatten(2))                                 # [N, C, S]
        heads = [self._head(queries)]
        for i, layer in enumerate(self.layers):
            level = i % 3
            with torch.no_grad():
                allowed = heads[-1][0].detach() @ small[level] >= 0                                     # [N, Q, S]
                allowed = allowed | ~allowed.any(-1, keepdim=True)
            queries = layer(queries, self.position, memory[level], values[level], allowed)
            heads.append(self._head(queries))
        embeddings, scores = zip(*(heads if all_heads else heads[-1:]), strict=True)
        return torch.stack(embeddings), torch.stack(scores)

    def _head(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        queries = self.norm(queries)
        return self.mask(queries), self.score(queries)


class MaskedLayer(nn.Module):
    """One decoder layer; residual and LayerNorm after each part."""

    def __init__(self, dim: int, ffn: int, heads: int):
        super().__init__()
        self.cross_attention, self.self_attention = Attention(dim, heads), Attention(dim, heads)
        self.ffn = nn.Sequential(_linear(dim, ffn), nn.ReLU(), _linear(ffn, dim))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, queries: Tensor, position: Tensor, memory: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
        queries = self.norm1(queries + self.cross_attention(queries + position, memory, values, allowed))
        placed = queries + position
        queries = self.norm2(queries + self.self_attention(placed, placed, queries))
        return self.norm3(queries + self.ffn(queries))


class Attention(nn.Module):
    """Multi-head attention. query: [N,Q,C]; key, value: [N,S,C]; allowed: [N,Q,S] bool, the same for all heads."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (_linear(dim, dim) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        q, k, v = (linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for linear, x in ((self.query, query), (self.key, key), (self.value, value)))
        mask = None if allowed is None else allowed[:, None]
        return self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


def _linear(dim: int, out: int) -> nn.Linear:
    linear = nn.Linear(dim, out)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _keep_scale(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)


def _mlp(*widths: int) -> nn.Sequential:
    modules = [module for a, b in zip(widths, widths[1:], strict=False) for module in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*modules[:-1])
