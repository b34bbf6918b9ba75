"""Multi-granularity implicit text, Eq. 3-5: learned pseudo-words, read by frozen text towers, matched to the clip."""
from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icf.objective.average import average
from icf.objective.towers import TEMPLATES
from icf.objective.usual import follow

if TYPE_CHECKING:
    from icf.config import MITConfig


class Text(NamedTuple):
    """What a clip is said to be about, per second.

    Args:
        z: [B,T,D] composite text, Eq. 5; [B,1,D] if pooled.
        visual: [B,T,D] fused visual text, Eq. 4.
        audio: [B,T,D] audio text, a unit vector.
        index: [B,T] int64, which of the audio texts that is.
        choices: [k,D] all of them.
        losses: terms of the texts themselves, weighted; empty by default.
        left_out: 0-dim, how many features and texts of all steps so far were not finite, and entered no buffer; None
            where there are none.
    """

    z: Tensor
    visual: Tensor
    audio: Tensor
    index: Tensor
    choices: Tensor
    losses: dict[str, Tensor]
    left_out: Tensor | None = None


class MIT(nn.Module):
    """Visual features of each level and sound to text.

    Every text tower runs once per template and training step, on the prompts alone; the texts are the same for all
    clips. At test time the texts of the last training step are used and no tower runs.

    Args:
        config: settings.
        audio_dim: width of the sound features.
        towers: the frozen text tower of each of `config.levels` and of `audio`, all `config.dim` wide; one object may
            serve several. None: for inference alone.

    Raises:
        ValueError: a tower of another width.
    """

    def __init__(self, config: MITConfig, audio_dim: int, towers: Mapping[str, nn.Module] | None):
        super().__init__()
        self.config, self.levels, dim = config, tuple(config.levels), config.dim
        for level, tower in (towers or {}).items():
            if tower.out != dim:
                raise ValueError(f"mit.dim: the text tower of {level} is {tower.out} wide, mit.dim is {dim}")
        self.towers = nn.ModuleDict(towers)
        self.slots = nn.ParameterDict({level: _slots(tower, config) for level, tower in (towers or {}).items()})
        for level in (*self.levels, "audio"):
            self.register_buffer(f"texts_{level}", torch.zeros(config.texts, dim))
            self.register_buffer(f"usual_{level}", torch.zeros(2, config.texts))
        self.register_buffer("left_out", torch.zeros(()), persistent=False)
        self.register_state_dict_post_hook(_without_towers)
        self.register_load_state_dict_post_hook(_towers_are_not_missed)
        self.hear = nn.Sequential(nn.LayerNorm(audio_dim), nn.Linear(audio_dim, dim))
        self.norm = nn.LayerNorm(dim)
        self.weight = nn.Parameter(torch.randn(dim) if config.fuse == "query" else torch.zeros(len(self.levels)))
        self.visual_gate, self.audio_gate = _gate(dim), _gate(dim)
        self.compose = nn.Linear(2 * dim, dim)

    def forward(self, features: Mapping[str, Tensor], member: Tensor, audio: Tensor,
                frame_mask: Tensor | None = None) -> Text:
        """The text of each second.

        Args:
            features: unit vectors of each level, [B,1,D], [B,S,D], [B,T,D].
            member: [B or 1,T,N] bool, which of the N = 1 + S + T of them speak of a second, in the order of `levels`.
            audio: [B,T,audio_dim].
            frame_mask: [B,T] bool, real seconds; None: all are.
        """
        texts = self.texts()
        heard = F.normalize(self.hear(audio), dim=-1)
        real = member.any(1).split([features[level].shape[1] for level in self.levels], 1)      # [B or 1, n] each
        matches = [self._match(features[level], texts[level], level, r)[0]
                   for level, r in zip(self.levels, real, strict=True)]
        visual = self._fuse(matches, member)                                                    # [B, T, D]
        audio_text, index = self._match(heard, texts["audio"], "audio", frame_mask)  # [B, T, D], [B, T]
        z = self.composite(visual, audio_text)
        if self.config.z_mode == "pooled":
            z = average(z, frame_mask)
        losses = self._losses(texts, {**features, "audio": heard}, [*real, frame_mask])
        return Text(z, visual, audio_text, index, texts["audio"], losses, self.left_out.clone())

    def hearing(self, audio: Tensor, choices: Tensor) -> Tensor:
        """The audio text of sounds [..,T,audio_dim] outside the batch among `choices` [k,D]: [..,T,D]. What is usual is
        learned from the batch alone."""
        return self._match(F.normalize(self.hear(audio), dim=-1), choices, "audio", learn=False)[0]

    def composite(self, visual: Tensor, audio: Tensor) -> Tensor:
        """Eq. 5: gated visual and audio text [..,D] to one text [..,D]."""
        return self.compose(torch.cat(self._gated(visual, audio), -1))

    def parts(self, visual: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """What the visual and the audio text give to `composite`, which is their sum and a bias: [..,D] each."""
        visual, audio = self._gated(visual, audio)
        return tuple(F.linear(x, w) for x, w in zip((visual, audio), self.compose.weight.chunk(2, 1), strict=True))

    def _gated(self, visual: Tensor, audio: Tensor) -> list[Tensor]:
        return [torch.sigmoid(gate(x)) * x for gate, x in ((self.visual_gate, visual), (self.audio_gate, audio))]

    def texts(self) -> dict[str, Tensor]:
        """The texts of each level and of sound, unit vectors [k,D]."""
        if not self.training:
            return self.kept
        texts = {level: F.normalize(self.towers[level](slots, TEMPLATES[level]).float(), dim=-1)
                 for level, slots in self.slots.items()}
        with torch.no_grad():
            for level, text in texts.items():
                finite = text.isfinite().all()
                self.kept[level].copy_(torch.where(finite, text, self.kept[level]))
                self.left_out += ~finite
        return texts

    def cost(self) -> str:
        """What the towers cost a step, in words: parameters, prompts, measured time of forward and backward."""
        parameters = sum(p.numel() for p in self.towers.parameters())
        prompts = sum(len(slots) for slots in self.slots.values())
        kept = {level: text.clone() for level, text in self.kept.items()}
        times = []
        for _ in range(3):
            start = time.perf_counter()
            total = sum(text.sum() for text in self.texts().values())
            torch.autograd.grad(total, [*self.slots.values()])[0].sum().item()
            times.append(time.perf_counter() - start)
        for level, text in self.kept.items():
            text.copy_(kept[level])
        return (f"text towers: {parameters / 1e6:.1f} M frozen parameters read {prompts} prompts a step, "
                f"{1e3 * min(times):.0f} ms with gradient")

    @property
    def tau(self) -> float:
        """Temperature of the straight-through gradient, in what similarities are measured by."""
        default = 1.0 if self.config.standardise else 0.07
        return default if self.config.match_tau is None else self.config.match_tau

    @property
    def kept(self) -> dict[str, Tensor]:
        """The texts of the last training step."""
        return {level: getattr(self, f"texts_{level}") for level in (*self.levels, "audio")}

    def _match(self, features: Tensor, texts: Tensor, level: str, real: Tensor | None = None,
               learn: bool = True) -> tuple[Tensor, Tensor]:
        """Best match of features [B,N,D] among texts [k,D], Eq. 3: [B,N,D] and which, [B,N]; real: [B or 1,N]; learn:
        in training, from them what is usual."""
        similarity = features @ texts.T                                                         # [B, N, k]
        if self.config.standardise:
            usual = getattr(self, f"usual_{level}")
            if self.training and learn:
                self.left_out += follow(usual, similarity.detach().float(), real)
            mean, square = usual
            similarity = (similarity - mean) * (square - mean.square()).clamp(min=1e-8).rsqrt()
        index = similarity.argmax(-1)
        if self.config.match == "mean":
            return texts.mean(0).expand_as(features), index
        weight = (index[..., None] == torch.arange(len(texts), device=index.device)).to(texts.dtype)
        if self.config.match == "st_top1":
            soft = (similarity / self.tau).softmax(-1)
            weight = weight + soft - soft.detach()
        return weight @ texts, index

    def _fuse(self, matches: list[Tensor], member: Tensor) -> Tensor:
        """Eq. 4 for each second, over the texts that speak of it: [B,T,D]."""
        texts = torch.cat(matches, 1)                                                           # [B, N, D]
        if self.config.fuse == "query":
            scores = self.norm(texts) @ self.weight / math.sqrt(texts.shape[-1])                       # [B, N]
        else:
            scores = torch.cat([w.expand(m.shape[1]) for w, m in zip(self.weight, matches, strict=True)])
            scores = scores.expand(texts.shape[:2])
        if self.config.softmax == "clip":
            member = member.any(1, keepdim=True).expand_as(member)
        member = member | ~member.any(-1, keepdim=True)                                         # padded seconds
        return scores[:, None].masked_fill(~member, -torch.inf).softmax(-1) @ texts

    def _losses(self, texts: Mapping[str, Tensor], features: Mapping[str, Tensor],
                real: list[Tensor | None]) -> dict[str, Tensor]:
        """real: [B or 1,N] of each level and of sound; None where all are."""
        losses = {}
        if self.config.inversion_weight:
            similarity = []
            for level, r in zip((*self.levels, "audio"), real, strict=True):
                mean = (features[level] @ texts[level].T).mean(-1)                              # [B, N]
                weight = torch.ones_like(mean) if r is None else r.expand_as(mean).to(mean.dtype)
                similarity.append((mean * weight).sum() / weight.sum().clamp(min=1))
            losses["inversion"] = -self.config.inversion_weight * torch.stack(similarity).mean()
        if self.config.diversity_weight:
            cosine = torch.stack([text @ text.T for text in texts.values()])                    # [levels, k, k]
            others = cosine - torch.eye(cosine.shape[-1], device=cosine.device)
            losses["diversity"] = self.config.diversity_weight * others.square().mean()
        return losses


def _without_towers(module: MIT, state: dict, prefix: str, _) -> None:
    """The towers are frozen and come from files of their own: a state dict goes without them."""
    for name in [name for name in state if name.startswith(f"{prefix}towers.")]:
        del state[name]


def _towers_are_not_missed(module: MIT, keys) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if ".towers." not in f".{name}"]


def _slots(tower: nn.Module, config: MITConfig) -> nn.Parameter:
    """Pseudo-words [k,slot_len,width], near a neutral word."""
    start = tower.neutral().detach().float()
    return nn.Parameter(start + 0.02 * torch.randn(config.texts, config.slot_len, len(start)))


def _gate(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
