"""Collaborative distribution-aware contrast of what is seen, heard and said, Eq. 13-17."""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from icf.objective.average import average
from icf.ops import contrast_positives, gw_contrast, gw_text_contrast

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
                frame_mask: Tensor | None = None,
                residual: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms `va`, `al`, `vl` of Eq. 19, and statistics.

        Args:
            visual: [B,T,visual_dim]; audio: [B,T,audio_dim].
            text, cf: the texts of the clips, and what could have been.
            frame_mask: [B,T] bool, real seconds; None: all are.
            residual: also contrast the sound with its part that is orthogonal to what is seen.

        `alone` is the share of clips that no other repels, `spread` the mean distance of a clip's seconds from their
        mean, of sight and of sound.
        """
        with torch.autocast(visual.device.type, enabled=False):
            features = {"v": visual, "a": audio, **({} if text is None else {"l": text.z})}
            points = {name: F.normalize(project(features[name].float()), dim=-1)
                      for name, project in self.project.items()}                                # [B, T, d]
            positives, ignored, alone = self._positives(len(visual), text, frame_mask, visual.device)
            sets = {name: self._set(x, frame_mask if x.shape[1] == visual.shape[1] else None)
                    for name, x in points.items()}
            losses = {}
            for pair in self.config.pairs:
                x, y = sets[pair[0]], sets[pair[1]]
                imagined = cf is not None and pair != "va" and self.config.text_negatives != "batch"
                losses[pair] = (self._against_texts(x, y, cf, visual.shape[1], frame_mask) if imagined else
                                self._against_clips(x, y, positives, ignored))
                if imagined and self.config.text_negatives == "both":
                    losses[pair] = losses[pair] + self._against_clips(x, y, positives, ignored)
            if residual and "va" in losses:
                losses["va"] = losses["va"] + self._against_residual(points, frame_mask)
            statistics = {"alone": alone}
            for name in points.keys() & {"v", "a"}:
                statistics[f"spread_{name}"] = _spread(points[name].detach(), frame_mask)
        return losses, statistics

    def _against_clips(self, x, y, positives, ignored) -> Tensor:
        """Eq. 16."""
        (x, x_mask), (y, y_mask) = x, y
        if self.config.kind == "feature":
            times = len(x) // (len(positives) // _world(self.group))
            positives, ignored = (m if m is None else m.repeat_interleave(times, 0).repeat_interleave(times, 1)
                                  for m in (positives, ignored))
        return gw_contrast(x, y, positives, ignored=ignored, x_mask=x_mask, y_mask=y_mask, group=self.group,
                           symmetric=self.config.symmetric, **self._options)

    def _against_texts(self, x, z, cf, steps, frame_mask) -> Tensor:
        """Eq. 17."""
        degree = cf.degree if self.config.weights == "rho" else cf.alpha
        weights = cf.texts.new_ones(cf.texts.shape[:2]) if degree is None else (1 - degree.float()).sqrt()
        weights = F.normalize(weights, p=1, dim=1) * (1 if self.config.weight_sum == "one" else weights.shape[1])
        texts = F.normalize(self.project["l"](cf.texts.float()), dim=-1)                        # [B, K, T, d]
        (x, x_mask), (z, z_mask) = x, z
        mask = None if frame_mask is None or texts.shape[2] != steps else frame_mask
        if self.config.kind == "prototype":
            texts, mask = _direction(texts, None if mask is None else mask[:, None]), None
        elif self.config.kind == "feature":
            times = len(x) // len(texts)
            z = z if len(z) == len(x) else z.repeat_interleave(times, 0)
            texts = texts.expand(-1, -1, times, -1).transpose(1, 2).flatten(0, 1)[:, :, None]   # [B*T, K, 1, d]
            weights, mask = weights.repeat_interleave(times, 0), None
            keep = slice(None) if frame_mask is None else frame_mask.flatten()
            x, z, texts, weights = x[keep], z[keep], texts[keep], weights[keep]
            x_mask = z_mask = None
        return gw_text_contrast(x, z, texts, weights, x_mask=x_mask, z_mask=z_mask, **self._options,
                                counterfactual_mask=None if mask is None else mask[:, None].expand(texts.shape[:3]))

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
    return average((x - average(x, mask)).norm(dim=-1), mask).mean()


def _world(group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _gather(x: Tensor, group) -> Tensor:
    """Rows of all processes, in their order; constant."""
    if group is None:
        return x
    parts = [torch.empty_like(x) for _ in range(_world(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)
