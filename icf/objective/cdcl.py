"""Collaborative distribution-aware contrast of what is seen, heard and said, Eq. 13-17."""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from icf.objective.average import average, clip_average
from icf.ops import contrast_positives, gaussian_wasserstein, gw_contrast, gw_text_contrast

if TYPE_CHECKING:
    from icf.config import CDCLConfig
    from icf.objective.mit import Text
    from icf.objective.sc import Counterfactuals


class CDCL(nn.Module):
    """Contrast of the modalities of clips, each a set of unit vectors, one a second. Computed in float32.

    Args:
        config: settings.
        visual_dim, audio_dim: widths of the features after interaction.
        text_dim: width of texts; None without text.
    """

    def __init__(self, config: CDCLConfig, visual_dim: int, audio_dim: int, text_dim: int | None):
        super().__init__()
        self.config = config
        widths = {"v": visual_dim, "a": audio_dim, "l": text_dim}
        used = [name for name in widths if any(name in pair for pair in config.pairs)]
        self.project = nn.ModuleDict({name: nn.Linear(widths[name], config.dim) for name in used})

    def forward(self, visual: Tensor, audio: Tensor, text: Text | None = None, cf: Counterfactuals | None = None,
                frame_mask: Tensor | None = None, residual: bool = False,
                negative: Tensor | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms `va`, `al`, `vl` of Eq. 19, and statistics.

        Args:
            visual: [B,T,visual_dim]; audio: [B,T,audio_dim].
            text, cf: the texts of the clips, and what could have been.
            frame_mask: [B,T] bool, real seconds; None: all are.
            residual: also contrast the sound with its part that is orthogonal to what is seen.
            negative: [B] bool, clips whose sound is not theirs, while their text is. None: all sounds are.

        Of `al` and `vl`, what Eq. 17 gives is `al_cf`, `vl_cf`, what texts of other clips give `al_batch`, `vl_batch`;
        `closer_a`, `closer_v` is the share of clips that are closer to their text than to every counterfactual. `alone`
        is the share of clips that no other repels, `spread` the mean distance of a clip's seconds from their mean, of
        sight and of sound.
        """
        with torch.autocast(visual.device.type, enabled=False):
            features = {"v": visual, "a": audio, **({} if text is None else {"l": text.z})}
            points = {name: F.normalize(project(features[name].float()), dim=-1)
                      for name, project in self.project.items()}                                # [B, T, d]
            if self.config.kind == "feature":                                                   # of a pooled text, too
                points = {name: x.expand(-1, visual.shape[1], -1) for name, x in points.items()}
            positives, ignored, alone = self._positives(len(visual), text, frame_mask, visual.device)
            sets = {name: self._set(x, frame_mask if x.shape[1] == visual.shape[1] else None)
                    for name, x in points.items()}
            real, wrong = None if frame_mask is None else frame_mask.any(1), negative           # [R], the rows of sets
            if self.config.kind == "feature":
                real = None if frame_mask is None else frame_mask.flatten()
                wrong = None if negative is None else negative.repeat_interleave(visual.shape[1])
            losses, statistics = {}, {"alone": alone}
            for pair in self.config.pairs:
                parts = {}
                if cf is not None and pair != "va" and self.config.text_negatives != "batch":
                    own = cf if pair == "vl" or cf.of_sound is None else cf.of_sound
                    parts["cf"], statistics[f"closer_{pair.strip('l')}"] = self._against_texts(
                        sets[pair.strip("l")], sets["l"], own, visual.shape[1], frame_mask,
                        _but(real, wrong if pair == "al" else None))
                if not parts or self.config.text_negatives == "both":
                    parts["batch"] = self._against_clips(pair, sets, positives, ignored, real, wrong)
                losses[pair] = torch.stack([*parts.values()]).sum()
                if pair != "va":
                    statistics |= {f"{pair}_{name}": part for name, part in parts.items()}
            if negative is not None and "va" in losses and "l" in sets:
                losses["va"] = losses["va"] + self._against_wrong(sets, real, wrong)
            if residual and "va" in losses:
                losses["va"] = losses["va"] + self._against_residual(points, frame_mask)
            for name in points.keys() & {"v", "a"}:
                statistics[f"spread_{name}"] = _spread(points[name].detach(), frame_mask)
        return losses, statistics

    def _against_clips(self, pair, sets, positives, ignored, real, wrong) -> Tensor:
        """Eq. 16."""
        if self.config.kind == "feature":
            times = len(sets[pair[0]][0]) // (len(positives) // _world(self.group))
            positives, ignored = (m if m is None else m.repeat_interleave(times, 0).repeat_interleave(times, 1)
                                  for m in (positives, ignored))
        x, y = (sets[name] for name in pair)
        real, wrong = _gather(real, self.group), _gather(wrong, self.group)
        if wrong is None or "a" not in pair:
            return self._contrast(x, y, positives, ignored, real, real, self.config.symmetric)
        ways = [(x, y, pair[1]), (y, x, pair[0])][:1 + self.config.symmetric]
        return torch.stack([                # a sound that is not its clip's repels all others, and belongs to none
            self._contrast(x, y, positives & ~wrong if name == "a" else positives, ignored, real, _but(real, wrong),
                           False) for x, y, name in ways]).mean()

    def _contrast(self, x, y, positives, ignored, real, anchors, symmetric) -> Tensor:
        """Eq. 16 for the rows that are `anchors`, among those that are `real`, [R] bool of all processes each."""
        scale = 1.0
        if anchors is not None:
            own = torch.eye(len(positives), dtype=torch.bool, device=positives.device)
            out = ~anchors[:, None] if real is None else ~(anchors[:, None] & real)
            positives, ignored = positives & ~out | own, (out if ignored is None else ignored | out) & ~own
            scale = len(anchors) / anchors.sum().clamp(min=1)       # rows that only have themselves count as zero
        (x, x_mask), (y, y_mask) = x, y
        return scale * gw_contrast(x, y, positives, ignored=ignored, x_mask=x_mask, y_mask=y_mask, group=self.group,
                                   symmetric=symmetric, **self._options)

    def _against_texts(self, x, z, cf, steps, frame_mask, anchors) -> tuple[Tensor, Tensor]:
        """Eq. 17, and the share of clips that are closer to their text than to all counterfactuals."""
        degree = cf.degree if self.config.weights == "rho" else cf.alpha
        weights = cf.texts.new_ones(cf.texts.shape[:2]) if degree is None else (1 - degree.float()).sqrt()
        if not self.config.weight_grad:
            weights = weights.detach()
        weights = weights if cf.valid is None else weights * cf.valid
        count = 1 if self.config.weight_sum == "one" else (weights > 0).sum(1, keepdim=True)
        weights = F.normalize(weights, p=1, dim=1) * count
        texts = F.normalize(self.project["l"](cf.texts.float()), dim=-1)                        # [B, K, T, d]
        (x, x_mask), (z, z_mask) = x, z
        mask = None if frame_mask is None or texts.shape[2] != steps else frame_mask[:, None].expand(texts.shape[:3])
        if self.config.kind == "prototype":
            texts, mask = _direction(texts, mask), None
        elif self.config.kind == "feature":
            texts = texts.expand(-1, -1, steps, -1).transpose(1, 2).flatten(0, 1)[:, :, None]   # [B*T, K, 1, d]
            weights, mask = weights.repeat_interleave(steps, 0), None
        weights = weights if anchors is None else weights * anchors[:, None]
        masks = {"x_mask": x_mask, "z_mask": z_mask, "counterfactual_mask": mask}
        loss = self._scale(anchors) * gw_text_contrast(x, z, texts, weights, **masks, **self._options)
        return loss, self._closer(x, z, texts, weights, **masks)

    @torch.no_grad()
    def _closer(self, x, z, texts, weights, x_mask, z_mask, counterfactual_mask) -> Tensor:
        if not texts.shape[1]:
            return x.new_zeros(())
        times, spectral = texts.shape[1], self.config.spectral
        own = gaussian_wasserstein(x, z, x_mask=x_mask, y_mask=z_mask, pairs="zip", spectral=spectral)
        others = gaussian_wasserstein(
            x.repeat_interleave(times, 0), texts.flatten(0, 1), pairs="zip", spectral=spectral,
            x_mask=None if x_mask is None else x_mask.repeat_interleave(times, 0),
            y_mask=None if counterfactual_mask is None else counterfactual_mask.flatten(0, 1))
        nearest = others.view(-1, times).masked_fill(weights <= 0, torch.inf).amin(1)
        asked = (weights > 0).any(1)
        return ((own < nearest) & asked).sum() / asked.sum().clamp(min=1)

    def _against_wrong(self, sets, real, wrong) -> Tensor:
        """Of clips whose sound is not theirs, sight is closer to the clip's text than to that sound *(ours)*."""
        (seen, mask), (z, z_mask), (heard, _) = (sets[name] for name in "vla")
        weights = (wrong if real is None else wrong & real).to(seen.dtype)[:, None]
        return self._scale(real) * gw_text_contrast(
            seen, z, heard[:, None], weights, x_mask=mask, z_mask=z_mask,
            counterfactual_mask=None if mask is None else mask[:, None], **self._options)

    def _against_residual(self, points, frame_mask) -> Tensor:
        seen, heard = points["v"], points["a"]
        rest = F.normalize(heard - (heard * seen).sum(-1, keepdim=True) * seen, dim=-1)
        return gw_text_contrast(seen, heard, rest[:, None], x_mask=frame_mask, z_mask=frame_mask,
                                counterfactual_mask=None if frame_mask is None else frame_mask[:, None],
                                **self._options)

    def _set(self, x: Tensor, frame_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What stands for each clip, and which of its vectors count."""
        if self.config.kind == "prototype":
            return _direction(x, frame_mask), None
        if self.config.kind == "feature":
            return x.flatten(0, 1)[:, None], None if frame_mask is None else frame_mask.view(-1, 1)
        return x, frame_mask

    def _scale(self, anchors: Tensor | None) -> Tensor | float:
        """What makes a mean over rows, of which those that are not `anchors` are 0, one over the anchors of all
        processes."""
        if anchors is None:
            return 1.0
        anchors = _gather(anchors, self.group)
        return len(anchors) / anchors.sum().clamp(min=1)

    def _positives(self, clips, text, frame_mask, device) -> tuple[Tensor, Tensor | None, Tensor]:
        """Which of all processes' clips count as one another's own sound, which are left out, how many are alone."""
        config = self.config
        if config.positives == "diag" or text is None:
            anchors, mode = torch.arange(clips * _world(self.group), device=device), "diag"
        elif config.positives == "index":
            votes = text.index[..., None] == torch.arange(len(text.choices), device=device)     # [B, T, k]
            votes = votes if frame_mask is None else votes & frame_mask[..., None]
            anchors, mode = _gather(votes.sum(1).argmax(-1), self.group), "labels"
        else:       # the texts of one template are all alike, hence centred
            heard = _direction(text.audio - text.choices.mean(0), frame_mask)[:, 0].detach()    # [B, D]
            anchors, mode = _gather(heard, self.group), config.positives
        positives, ignored = contrast_positives(anchors, mode, theta=config.theta, theta_low=config.theta_low)
        others = ~positives if ignored is None else ~(positives | ignored)
        alone = ~others.any(-1, keepdim=True)
        if config.no_negatives == "diag":
            own = torch.eye(len(positives), dtype=torch.bool, device=device)
            positives = torch.where(alone, own, positives)
            ignored = None if ignored is None else ignored & ~alone
        return positives, ignored, alone.float().mean()

    @property
    def group(self):
        return dist.group.WORLD if self.config.gather and dist.is_available() and dist.is_initialized() else None

    @property
    def _options(self) -> dict:
        config = self.config
        return {"tau": config.tau, "gamma": config.gamma, "eps": config.eps, "entropy": config.entropy,
                "sign": config.sign, "spectral": config.spectral}


def pool(maps: Tensor, mask: Tensor | None = None) -> Tensor:
    """Features [N,C,h,w] averaged where `mask` [N,1,H,W], in [0,1], says, without gradient to it: [N,C].

    Where a mask holds less than one pixel of the map, and without one, all pixels count.
    """
    if mask is None:
        return maps.mean((2, 3))
    mask = F.interpolate(mask.detach().to(maps.dtype), size=maps.shape[2:], mode="bilinear", align_corners=False)
    weight = mask.flatten(1)                                                                    # [N, S]
    weight = torch.where(weight.sum(1, keepdim=True) < 1, 1.0, weight)
    weight = weight / weight.sum(1, keepdim=True)
    return (maps.flatten(2) @ weight[..., None])[..., 0]


def _direction(x: Tensor, mask: Tensor | None) -> Tensor:
    """[..,T,d] -> the unit vector [..,1,d] along the mean over what counts."""
    return F.normalize(average(x, mask, -2), dim=-1)


def _spread(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean distance of the seconds of x [B,T,d] from their mean."""
    return clip_average((x - average(x, mask)).norm(dim=-1), mask)


def _but(rows: Tensor | None, out: Tensor | None) -> Tensor | None:
    """[R] bool, the rows (None: all) that are not `out`; None where those are all."""
    if out is None:
        return rows
    return ~out if rows is None else rows & ~out


def _world(group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _gather(x: Tensor | None, group) -> Tensor | None:
    """Rows of all processes, in their order; constant."""
    if group is None or x is None:
        return x
    if x.dtype == torch.bool:
        return _gather(x.to(torch.uint8), group).bool()
    parts = [torch.empty_like(x) for _ in range(_world(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)
