"""`ICFObjective`: implicit text (MIT), counterfactuals (SC) and contrast (CDCL) for any model that segments sound."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icf.config import MITConfig, ObjectiveConfig
from icf.context import LevelFeatures
from icf.objective.average import average
from icf.objective.cdcl import CDCL, pool
from icf.objective.checks import check_config, check_features, check_masks, warn_of_untrained
from icf.objective.mit import MIT, Text
from icf.objective.sc import GENERATORS, SC, Counterfactuals, govern

LEVELS = ("video", "segment", "frame")
SAME = 1e-3         # relative distance below which two texts are one


class Reading(NamedTuple):
    """A batch in words: its `text`, and what is `seen` in each second, [B,T,C], constant."""

    text: Text
    seen: Tensor


class ICFObjective(nn.Module):
    """The training objective of ICF beside segmentation, to be added to the loss of any model. Nothing of it runs at
    test time.

        objective = ICFObjective(visual_dim=256, audio_dim=128)
        losses = objective(visual, audio)          # features after the model's own audio-visual interaction
        (segmentation_loss + losses["total"]).backward()

    Its parameters are trained, too, and have to be in an optimiser (docs/objective.md has a whole host).

    Args:
        visual_dim, audio_dim: channels of `visual` and `audio` below.
        config: settings; the defaults need the text towers of CLIP, X-CLIP and CLAP (`transformers`), and `diffusers`.
            With `MITConfig(frame="hash", video="hash", audio="hash")` no file is needed, for tests.
        map_dims, sound_dim: channels of `maps` and `sound` below; by default those of `visual` and `audio`.
        attended: levels whose frames attend to one another before they are matched to text (Eq. 1-2).
        context_dim, literal_product: of that attention, see `icf.context.ChannelAttention`.
        inference: only what a model with `mit.inject` needs at test time.

    Raises:
        TypeError: a `config` that is no `ObjectiveConfig`.
        ValueError: settings that contradict each other, text towers that do not fit, a package that is missing.
        FileNotFoundError, ConnectionError: weights of text towers that are missing, or cannot be fetched.
    """

    def __init__(self, visual_dim: int, audio_dim: int, config: ObjectiveConfig | None = None, *,
                 map_dims: Sequence[int] | None = None, sound_dim: int | None = None,
                 attended: Sequence[str] = LEVELS, context_dim: int = 256, literal_product: bool = False,
                 inference: bool = False):
        super().__init__()
        self.config = config = config or ObjectiveConfig()
        check_config(config)
        mit, sc, cdcl = config.mit, config.sc, config.cdcl
        self.visual_dim, self.audio_dim = visual_dim, audio_dim
        self.map_dims, self.sound_dim = map_dims, sound_dim = list(map_dims or [visual_dim]), sound_dim or audio_dim
        self.levels = self.mit = self.sc = self.cdcl = None
        if mit.enabled:
            self.levels = LevelFeatures(map_dims, mit.dim, mit.levels, attended, context_dim, literal_product,
                                        mit.parts, mit.stride)
            self.mit = MIT(mit, sound_dim, None if inference else build_towers(mit))
        if sc.enabled and sc.generator in GENERATORS and not inference:
            self.sc = SC(sc, mit.dim, sum(map_dims))
        if cdcl.enabled and not inference:
            self.cdcl = CDCL(cdcl, visual_dim, audio_dim, mit.dim if mit.enabled else None)
        self._captions: dict[str, Tensor] = {}
        self._looked = False
        if not inference:
            warn_of_untrained(self)

    def forward(self, visual: Tensor | Sequence[Tensor], audio: Tensor, frame_mask: Tensor | None = None,
                visual_mask: Tensor | None = None, *, maps: Sequence[Tensor] | None = None,
                sound: Tensor | None = None, replaced_sound: Tensor | None = None,
                captions: Sequence[Sequence[str]] | None = None,
                negative: Tensor | None = None) -> dict[str, Tensor]:
        """The terms of the objective by name, each 0-dim: `total`, weighted, to be added to the model's loss; `cf`,
        `va`, `al`, `vl` and their parts, as they are; statistics.

        Args:
            visual: features of B clips of T seconds after interaction, [B,T,C,H,W], or several maps, the finest first.
                Features of 16 bits are taken as float32.
            audio: [B,T,D], the sound after interaction.
            frame_mask: [B,T] bool, seconds that exist; they come first. None: all do.
            visual_mask: [B,T,1,h,w] probability of the foreground, where vision is averaged; None: everywhere.
            maps, sound: [B,T,..] features before interaction, to which text is matched; by default `visual`, `audio`.
            replaced_sound: [B,T,..] as `sound`, of what could sound instead, for `sc.generator=audio_replacement`.
            captions: revised captions of each clip, equally many, for `sc.generator=text_revision`.
            negative: [B] bool, clips whose `audio` is not theirs; their `sound` is, so that texts are true.

        Raises:
            TypeError: features that are no floating tensors.
            ValueError: parameters that are not float32; features of other channels than the objective was built for, or
                whose shapes do not go together; in the first call that is not compiled, also a `frame_mask` with holes,
                and logits as `visual_mask`.
        """
        visual = [visual] if isinstance(visual, Tensor) else list(visual)
        visual, maps, audio, sound = self._features(visual, maps, audio, sound)
        look = not (self._looked or torch.compiler.is_compiling())          # at values: this waits for the device
        check_masks(audio.shape[:2], frame_mask, visual_mask, negative, look)
        self._looked = self._looked or look
        reading = self.read(maps, sound, frame_mask)
        cf = self.imagine(reading, frame_mask, replaced_sound, captions)
        return self.contrast(visual[0], audio, reading, cf, frame_mask, negative, visual_mask)

    def _features(self, visual: list[Tensor], maps: Sequence[Tensor] | None, audio: Tensor,
                  sound: Tensor | None) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """All features, checked, in float32; what is not given is that after interaction."""
        dtype = next((p.dtype for p in self.parameters() if p.requires_grad), torch.float32)
        if dtype != torch.float32:
            raise ValueError(f"ICFObjective: expected parameters in float32, got {dtype}; torch.autocast makes the "
                             "model's work one of 16 bits and leaves parameters as they are")
        audio = check_features("audio", audio, None, self.audio_dim, 3)
        clips = audio.shape[:2]
        sound = check_features("sound", audio if sound is None else sound, clips, self.sound_dim, 3)
        own = maps is None
        maps = visual if own else list(maps)
        if not visual:
            raise ValueError("visual: expected at least one map, got none")
        visual = [check_features("visual", visual[0], clips, self.visual_dim, 5), *visual[1:]]
        if len(maps) != len(self.map_dims):
            raise ValueError(f"{'visual' if own else 'maps'}: expected {len(self.map_dims)} maps, of map_dims="
                             f"{self.map_dims}, got {len(maps)}")
        names = [("visual" if own else "maps") + (f"[{i}]" if len(maps) > 1 else "") for i in range(len(maps))]
        maps = [check_features(name, x, clips, channels, 5)
                for name, x, channels in zip(names, maps, self.map_dims, strict=True)]
        return visual, maps, audio, sound

    def read(self, maps: Sequence[Tensor], sound: Tensor, frame_mask: Tensor | None = None) -> Reading | None:
        """MIT. maps: [B,T,C,h,w] each; sound: [B,T,D]. None where it is switched off."""
        if self.mit is None:
            return None
        features, member = self.levels(maps, frame_mask)
        seen = torch.cat([x.detach().mean((3, 4)) for x in maps], -1)                           # [B, T, C]
        return Reading(self.mit(features, member, sound, frame_mask), seen)

    def imagine(self, reading: Reading | None, frame_mask: Tensor | None = None, replaced_sound: Tensor | None = None,
                captions: Sequence[Sequence[str]] | None = None) -> Counterfactuals | None:
        """SC. None where it is switched off, or makes no texts."""
        config = self.config.sc
        if reading is None or not config.enabled or config.generator == "residual":
            return None
        if self.sc is not None:
            wanted = self.cdcl is not None and bool({"al", "vl"} & {*self.config.cdcl.pairs})
            if config.part == "all":
                return self.sc(reading.text.z, reading.seen, frame_mask, wanted=wanted)
            return self._imagine_parts(reading, frame_mask, wanted)
        if config.generator == "text_revision":
            return self._chosen(reading.text, self._revised(reading.text, captions), frame_mask)
        if config.generator == "audio_replacement":
            return self._chosen(reading.text, self._resounded(reading.text, frame_mask, replaced_sound), frame_mask, 1)
        return self._chosen(reading.text, self._swapped(reading.text, frame_mask), frame_mask, config.keep)

    def _imagine_parts(self, reading: Reading, frame_mask: Tensor | None, wanted: bool) -> Counterfactuals:
        """For sight, the audio part of the text is rotated, for sound the visual part, so that each has to know of the
        other *(ours)*."""
        text = reading.text
        visual, audio = self.mit.parts(text.visual, text.audio)
        if text.z.shape[1] == 1:
            visual, audio = average(visual, frame_mask), average(audio, frame_mask)
        parts, twice = torch.cat([audio, visual]), (2, 1, 1)
        cf = self.sc(parts, reading.seen.repeat(twice), None if frame_mask is None else frame_mask.repeat(2, 1),
                     rest=text.z.repeat(twice) - parts, wanted=wanted)
        return cf.of_halves() if wanted else cf

    def contrast(self, visual: Tensor | None, audio: Tensor | None, reading: Reading | None,
                 cf: Counterfactuals | None, frame_mask: Tensor | None = None, negative: Tensor | None = None,
                 visual_mask: Tensor | None = None) -> dict[str, Tensor]:
        """CDCL, and the sum of Eq. 19. visual: [B,T,C,H,W]; audio: [B,T,D]; negative: [B]; visual_mask: [B,T,1,h,w];
        the features are None where CDCL is switched off."""
        config, text = self.config, None if reading is None else reading.text
        terms, statistics = dict(cf.losses) if cf else {}, dict(cf.statistics) if cf else {}
        weighted = [config.cf_weight * terms["cf"]] if terms else []
        if self.cdcl is not None:
            mask = visual_mask.flatten(0, 1) if visual_mask is not None and config.cdcl.visual_pool == "mask" else None
            seen = pool(visual.flatten(0, 1), mask).unflatten(0, audio.shape[:2])               # [B, T, C]
            residual = config.sc.enabled and config.sc.generator == "residual"
            losses, more = self.cdcl(seen, audio, text, cf, frame_mask, residual, negative)
            weighted += [config.cdcl_weight * getattr(config, pair) * loss for pair, loss in losses.items()]
            terms, statistics = {**terms, **losses}, {**statistics, **more}
        if text is not None:
            weighted += text.losses.values()
            terms |= text.losses
            if text.left_out is not None:
                statistics["left_out"] = text.left_out
        total = torch.stack(weighted).sum() if weighted else text.z.new_zeros(())
        return {"total": total, **terms, **statistics}

    def _swapped(self, text: Text, frame_mask: Tensor | None) -> Tensor:
        """Texts in which the sound, and then the sight, is that of each other clip of the batch: [B,2(B-1),T,D]."""
        heard, seen = others(text.audio, frame_mask), others(text.visual, frame_mask)
        swapped = (self.mit.composite(text.visual[:, None].expand_as(heard), heard),
                   self.mit.composite(seen, text.audio[:, None].expand_as(seen)))
        return torch.stack(swapped, 2).flatten(1, 2)

    def _resounded(self, text: Text, frame_mask: Tensor | None, replaced_sound: Tensor | None) -> Tensor:
        """Texts with other sounds: those that could sound instead, [B,1,T,D], or those of other clips, [B,B-1,T,D]."""
        heard = others(text.audio, frame_mask) if replaced_sound is None else self.mit.hearing(
            replaced_sound, text.choices)[:, None]
        return self.mit.composite(text.visual[:, None].expand_as(heard), heard)

    def _revised(self, text: Text, captions: Sequence[Sequence[str]] | None) -> Tensor:
        """Texts of revised captions in place of what is seen: [B,K,T,D]."""
        if captions is None or len(captions) != len(text.z) or len({len(c) for c in captions}) != 1:
            raise ValueError("captions: expected equally many revised captions of each clip for text_revision, got "
                             f"{captions if captions is None else [len(c) for c in captions]}")
        tower = self.mit.towers[self.config.mit.levels[0]]
        for caption in {c for clip in captions for c in clip} - self._captions.keys():
            self._captions[caption] = F.normalize(tower.encode([caption])[0].float(), dim=-1)
        said = torch.stack([torch.stack([self._captions[c] for c in clip]) for clip in captions])   # [B, K, D]
        shape = -1, -1, text.audio.shape[1], -1
        return self.mit.composite(said[:, :, None].expand(shape), text.audio[:, None].expand(-1, said.shape[1], -1, -1))

    def _chosen(self, text: Text, texts: Tensor, frame_mask: Tensor | None, keep: int | None = None) -> Counterfactuals:
        """Of texts [B,K,T,D], the first that say something else than the clip's own, `keep` of them or all."""
        if text.z.shape[1] == 1:
            texts = average(texts, None if frame_mask is None else frame_mask[:, None], 2)
        own = text.z.detach()[:, None]
        differs = (texts.detach() - own).norm(dim=-1) > SAME * own.norm(dim=-1)                 # [B, K, T]
        if frame_mask is not None and differs.shape[2] == frame_mask.shape[1]:
            differs = differs & frame_mask[:, None]
        same, order = (~differs.any(-1)).to(torch.uint8).sort(dim=1, stable=True)
        same, order = same[:, :keep], order[:, :keep]
        texts = texts.gather(1, order[..., None, None].expand(-1, -1, *texts.shape[2:]))
        return Counterfactuals(govern(texts, self.config.sc.grad), None, None, {}, {}, same == 0)


def others(x: Tensor, frame_mask: Tensor | None = None) -> Tensor:
    """What x [B,T,D] says of the other clips, [B,B-1,T,D]. Where another one is shorter, its seconds are repeated."""
    clips, second = torch.arange(len(x), device=x.device), torch.arange(x.shape[1], device=x.device)
    if frame_mask is not None:
        second = second % frame_mask.sum(1, keepdim=True).clamp(min=1)                          # [B, T]
        x = x[clips[:, None], second]
    return x[(clips[:, None] - clips[1:]) % len(x)]


def build_towers(config: MITConfig) -> dict[str, nn.Module]:
    """The frozen text tower of each level and of sound; equal settings share one."""
    from icf.objective.towers import require_towers, text_tower

    specs = {level: config.frame if level == "frame" else config.video for level in config.levels}
    specs["audio"] = config.audio
    require_towers({f"objective.mit.{name}": getattr(config, name) for name in ("frame", "video", "audio")
                    if getattr(config, name) in specs.values()})
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    keys = {"frame": "frame", "video": "video", "segment": "video", "audio": "audio"}
    built: dict[str, nn.Module] = {}
    for level, spec in specs.items():
        if spec not in built:
            kind, _, weights = spec.partition(":")
            built[spec] = text_tower(kind, weights or "default", dtype, f"objective.mit.{keys[level]}")
    return {level: built[spec] for level, spec in specs.items()}
