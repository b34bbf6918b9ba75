"""Semantic counterfactuals, Eq. 6-12: texts rotated away from what is said, in the latent space of a diffusion."""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icf.objective.average import average, clip_average
from icf.objective.diffusion import Diffusion, Noise
from icf.ops import orthogonal_blend

if TYPE_CHECKING:
    from icf.config import SCConfig

GENERATORS = ("diffusion", "feature", "vqvae", "dropout")
"""Those that make counterfactuals of the text alone; the others need other sounds, clips or captions."""
GROUPS, CODES, COMMITMENT = 4, 256, 0.25        # of the discrete space


class Counterfactuals(NamedTuple):
    """Texts of what could have been.

    Args:
        texts: [B,K,T,D], hardest first; None where nothing consumes them.
        degree: [B,K], how far each was rotated, in [0,1]; None where that is not known.
        alpha: [B,K], the control value alone; None likewise.
        losses: `cf`, Eq. 11, and its parts; empty for generators without parameters.
        statistics: mean `degree` of all candidates, `degree_kept` of those kept, and mean `cosine` of these with the
            factual text.
        valid: [B,K] bool, those that say something else than their text; None: all do.
        of_sound: what sound is contrasted with, where that is not what sight is contrasted with.
    """

    texts: Tensor | None
    degree: Tensor | None
    alpha: Tensor | None
    losses: dict[str, Tensor]
    statistics: dict[str, Tensor]
    valid: Tensor | None = None
    of_sound: Counterfactuals | None = None

    def of_halves(self) -> Counterfactuals:
        """Of a batch whose second half is for the sound of the first."""
        halves = zip(*((None, None) if x is None else x.chunk(2) for x in (self.texts, self.degree, self.alpha)),
                     strict=True)
        sight, sound = (Counterfactuals(*half, self.losses, self.statistics) for half in halves)
        return sight._replace(of_sound=sound)


class SC(nn.Module):
    """Counterfactual texts of a batch of texts.

    Args:
        config: settings; its generator is one of `GENERATORS`.
        dim: width of texts.
        condition_dim: width of what is seen.
    """

    def __init__(self, config: SCConfig, dim: int, condition_dim: int):
        super().__init__()
        self.config, self.generator = config, config.generator
        latent = dim if self._stays else config.dim
        if self.generator != "dropout":
            self.degree = Degree(latent, config)
        if not self._stays:
            self.encode, self.decode = nn.Linear(dim, latent), nn.Linear(latent, dim)
        if self.generator == "diffusion":
            self.diffusion = Diffusion(latent, condition_dim if config.condition else None, config.start,
                                       config.ddim_steps, config.steps, config.beta, config.width, config.layers,
                                       config.heads)
        if self.generator == "feature":
            self.noise = Noise(config.steps, config.beta)
        if self.generator == "vqvae":
            self.codes = nn.Parameter(torch.randn(GROUPS, CODES, latent // GROUPS))

    @property
    def _stays(self) -> bool:
        """The latent is the text itself."""
        return self.generator in ("feature", "dropout") or self.config.latent == "identity"

    def forward(self, z: Tensor, seen: Tensor, frame_mask: Tensor | None = None, *, rest: Tensor | None = None,
                wanted: bool = True) -> Counterfactuals:
        """Counterfactuals of each text, and the loss of their generator.

        Args:
            z: [B,T,D], or [B,1,D], pooled over time.
            seen: [B,T,C], what is seen in each second; constant here.
            frame_mask: [B,T] bool, real seconds; None: all are.
            rest: as z, what is added to counterfactuals where z is but a part of the text.
            wanted: False leaves out the texts, for a run in which they would not be used.
        """
        z = z.float().detach() if self.config.detach_z else z.float()
        if z.shape[1] != seen.shape[1]:
            seen = average(seen.float(), frame_mask)
            frame_mask = None if frame_mask is None else frame_mask.any(1, keepdim=True)
        seen = seen.detach().float() if self.config.condition else None
        make = {"diffusion": self._diffuse, "feature": self._rotate, "vqvae": self._quantise, "dropout": self._drop}
        losses, rho, alpha, candidates = make[self.generator](z, seen, frame_mask)
        statistics = {} if rho is None else {"degree": clip_average(rho.detach().mean((1, 3)), frame_mask)}
        if not wanted:
            return Counterfactuals(None, None, None, losses, statistics)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.grad != "none"):
            change = candidates()                                                               # [B, M, T, D]
        z = z if rest is None else z + (rest.float().detach() if self.config.detach_z else rest.float())
        return self._keep(z[:, None] + govern(change, self.config.grad), z, rho, alpha, frame_mask, losses, statistics)

    def _diffuse(self, z, seen, frame_mask) -> tuple:
        config, diffusion = self.config, self.diffusion
        clean = self._encode(z)                                                                 # [B, T, L]
        source = clean.detach() if config.detach_z else clean
        noise = torch.randn_like(source)                # one for all candidates: noise added is the noise removed
        noised = diffusion.add_noise(source, noise, config.start - 1)
        rho, alpha = self.degree(noised, frame_mask)                                                # [B, M, T, blocks]
        # The degree is constant here, or it would shrink until nothing is rotated, which is easiest to denoise.
        losses = self._diffusion_losses(source, rho[:, :1].detach(), seen, frame_mask)
        losses |= self._degree_loss(noised, rho, frame_mask, losses.pop("target", 0))
        if config.latent == "linear":
            losses["rec"] = clip_average(1 - F.cosine_similarity(self._decode(clean, z), z, -1), frame_mask)
        losses["cf"] = losses["eps"] + config.lambda_ortho * losses["ortho"] + losses.get("rec", 0)
        steps = "last_step" if config.grad == "reversed" else config.grad

        def candidates() -> Tensor:
            if config.rotate == "clean":
                rotated = rotate(source, rho)
                rotated = diffusion.add_noise(rotated, noise[:, None].expand_as(rotated), config.start - 1)
            else:
                rotated = rotate(noised, rho)
            return self._change(noised, rotated, z, lambda x: diffusion.denoise(x, seen, frame_mask, steps))
        return losses, rho, alpha, candidates

    def _diffusion_losses(self, clean, rho, seen, frame_mask) -> dict[str, Tensor]:
        """Of the denoiser, at a random step: the noise it finds in the clean and the rotated text, and, as the target
        of Eq. 10, the cosine of the two once denoised against that at which they were built."""
        diffusion, config = self.diffusion, self.config
        t = torch.randint(0, config.start, (len(clean),), device=clean.device)
        noise = torch.randn_like(clean)
        noised = diffusion.add_noise(clean, noise, t)[:, None]
        rotated = rotate(noised[:, 0], rho)                                                     # [B, 1, T, L]
        rows = torch.cat([noised, rotated], 1)                                                  # [B, 2, T, L]
        found = diffusion.predict(rows, t, seen, frame_mask)
        error = (found - noise[:, None]).square().mean(-1)                                      # [B, 2, T]
        error = error.mean(1) if config.predict == "mixed" else error[:, 1]
        losses = {"eps": clip_average(error, frame_mask)}
        if config.ortho == "target":
            cosine = F.cosine_similarity(*diffusion.clean(rows, found, t).unbind(1), dim=-1)    # [B, T]
            built = F.cosine_similarity(noised, rotated, -1)[:, 0].detach()
            losses["target"] = clip_average((cosine - built).square(), frame_mask)
        return losses

    def _degree_loss(self, latent, rho, frame_mask, target) -> dict[str, Tensor]:
        """Eq. 10. The printed form, on unit vectors, is least where nothing is rotated."""
        config = self.config
        if config.ortho == "off":
            return {"ortho": rho.sum() * 0}
        cosine = _built_cosine(latent, rho)                                                     # [B, M, T]
        if config.ortho == "paper":
            error = 2 - 2 * cosine + config.lambda_z * cosine.square()
            return {"ortho": clip_average(error.mean(1), frame_mask)}
        least = config.min_degree * sum(config.alpha) / 2
        excess = clip_average(cosine.mean(1), frame_mask) - (1 - least) ** 0.5
        return {"ortho": target + config.lambda_z * excess.relu().square()}

    def _rotate(self, z, seen, frame_mask) -> tuple:
        """As diffusion does it, in the space of the texts and without taking the noise away."""
        config, clean = self.config, self._encode(z)
        noise = torch.randn_like(clean)
        noised = self.noise.add_noise(clean, noise, config.start - 1)
        rho, alpha = self.degree(noised.detach(), frame_mask)
        losses = self._degree_loss(noised.detach(), rho, frame_mask, 0)
        losses["cf"] = config.lambda_ortho * losses["ortho"]

        def candidates() -> Tensor:
            if config.rotate == "clean":
                rotated = rotate(clean, rho)
                rotated = self.noise.add_noise(rotated, noise[:, None].expand_as(rotated), config.start - 1)
            else:
                rotated = rotate(noised, rho)
            return self._change(noised, rotated, z, lambda x: x)
        return losses, rho, alpha, candidates

    def _quantise(self, z, seen, frame_mask) -> tuple:
        clean = self._encode(z)
        rho, alpha = self.degree(clean.detach(), frame_mask)
        quantised, error = self._nearest(clean)
        losses = self._degree_loss(clean.detach(), rho, frame_mask, 0)
        losses["vq"] = clip_average(error, frame_mask)
        losses["rec"] = clip_average(1 - F.cosine_similarity(self._decode(quantised, z), z, -1), frame_mask)
        losses["cf"] = losses["vq"] + losses["rec"] + self.config.lambda_ortho * losses["ortho"]
        return losses, rho, alpha, lambda: self._change(clean, rotate(clean, rho), z, lambda x: self._nearest(x)[0])

    def _drop(self, z, seen, frame_mask) -> tuple:
        kept = torch.rand(len(z), self.config.candidates, *z.shape[1:], device=z.device) < 0.5
        return {}, None, None, lambda: z[:, None] * kept - z[:, None]

    def _change(self, latent: Tensor, rotated: Tensor, z: Tensor, restore: Callable[[Tensor], Tensor]) -> Tensor:
        """What a text z [B,T,D] becomes, less z, once its latent [B,T,L] is rotated to [B,M,T,L] and restored."""
        if not self.config.symmetric:
            return self._decode(restore(rotated), z) - z[:, None]
        texts = self._decode(restore(torch.cat([latent[:, None], rotated], 1)), z)  # a candidate that is not rotated
        return texts[:, 1:] - texts[:, :1]

    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes, with a straight-through gradient, and the codebook and commitment losses [..]."""
        groups = x.unflatten(-1, (GROUPS, -1))                                                  # [.., G, L/G]
        distance = self.codes.square().sum(-1) - 2 * torch.einsum("...gd,gkd->...gk", groups, self.codes)
        code = F.one_hot(distance.argmin(-1), CODES).to(x.dtype)
        nearest = torch.einsum("...gk,gkd->...gd", code, self.codes).flatten(-2)
        error = (nearest - x.detach()).square() + COMMITMENT * (x - nearest.detach()).square()
        return x + (nearest - x).detach(), error.mean(-1)

    def _encode(self, z: Tensor) -> Tensor:
        x = z if self._stays else self.encode(z)
        return F.layer_norm(x, x.shape[-1:]) if self.config.latent_norm == "layer" else F.normalize(x, dim=-1)

    def _decode(self, x: Tensor, z: Tensor) -> Tensor:
        """Latents [B,M,T,L] or [B,T,L] as texts, of the norm of their text z [B,T,D]."""
        texts = x if self._stays else self.decode(F.layer_norm(x, x.shape[-1:]))
        norm = z.norm(dim=-1, keepdim=True)
        return F.normalize(texts, dim=-1) * (norm[:, None] if x.ndim == 4 else norm)

    def _keep(self, texts, z, rho, alpha, frame_mask, losses, statistics) -> Counterfactuals:
        """Eq. 12: the candidates [B,M,T,D] that are closest to the text, on average over its seconds."""
        real = None if frame_mask is None else frame_mask[:, None]
        keep, cosine = self.config.keep, F.cosine_similarity(texts.detach(), z.detach()[:, None], dim=-1)
        cosine, best = average(cosine, real, -1)[..., 0].topk(keep)                             # [B, K]
        texts = texts.gather(1, best[..., None, None].expand(-1, -1, *texts.shape[2:]))
        clips = None if frame_mask is None else frame_mask.any(1)
        statistics["cosine"] = average(cosine.mean(1), clips, 0)[0]
        if rho is not None:
            rho = govern(average(rho.mean(-1), real, -1)[..., 0].gather(1, best), self.config.grad)
            alpha = govern(alpha.expand(len(best), -1).gather(1, best), self.config.grad)
            statistics["degree_kept"] = average(rho.detach().mean(1), clips, 0)[0]
        return Counterfactuals(texts, rho, alpha, losses, statistics)


def govern(x: Tensor, grad: str) -> Tensor:
    """x, with the gradient that `sc.grad` lets through to what made it."""
    if grad == "none":
        return x.detach()
    return 2 * x.detach() - x if grad == "reversed" else x


class Degree(nn.Module):
    """Degree of the counterfactual of each candidate, clip, second and block: `rho = alpha m s` of Eq. 8.

    alpha lies in a fixed interval, learned per candidate; m depends on the clip and s on second and block, both with
    logistic noise, so that candidates differ. Their heads start at zero: the degree grows from about .2 while training.
    """

    def __init__(self, dim: int, config: SCConfig):
        super().__init__()
        self.interval, self.floor, self.mode = config.alpha, config.floor, config.mode
        spread = torch.logit((torch.arange(config.candidates) + 0.5) / config.candidates)
        self.theta = nn.Parameter(spread, requires_grad=config.alpha_learnable)
        if self.mode != "intra":
            self.inter = _zero(nn.Linear(dim, 1))
        if self.mode != "inter":
            self.intra = _zero(nn.Linear(dim, config.blocks))
        self.blocks = config.blocks

    def forward(self, latent: Tensor, frame_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """latent: [B,T,L]; frame_mask: [B,T] bool, real seconds -> rho [B,M,T,blocks], alpha [1,M]."""
        (b, steps, _), low, high = latent.shape, *self.interval
        alpha = (low + (high - low) * self.theta.sigmoid())[None]                               # [1, M]
        rho = alpha[..., None, None].expand(b, -1, steps, self.blocks)
        unit = latent / latent.norm(dim=-1, keepdim=True).clamp(min=1e-6) * latent.shape[-1] ** 0.5
        if self.mode != "intra":
            clip = self.inter(average(unit, frame_mask)[:, 0])                                  # [B, 1]
            rho = rho * self._factor(clip.expand(-1, alpha.shape[1]))[..., None, None]
        if self.mode != "inter":
            rho = rho * self._factor(self.intra(unit)[:, None].expand_as(rho))
        return rho.clamp(1e-4, 1 - 1e-4), alpha

    def _factor(self, x: Tensor) -> Tensor:
        noise = torch.logit(torch.rand_like(x), eps=1e-6)
        return self.floor + (1 - self.floor) * torch.sigmoid(x + noise)


def rotate(x: Tensor, rho: Tensor) -> Tensor:
    """Eq. 7-8: x [B,T,L] by degrees rho [B,M,T,blocks], each block of dimensions by itself, norms kept: [B,M,T,L]."""
    blocks = x[:, None].unflatten(-1, (rho.shape[-1], -1))                                      # [B, 1, T, blocks, d]
    return orthogonal_blend(blocks.float(), rho.float(), restore_norm=True).flatten(-2)


def _built_cosine(x: Tensor, rho: Tensor) -> Tensor:
    """Cosine of x [B,T,L] with `rotate(x, rho)`, known without it: [B,M,T]."""
    share = x.unflatten(-1, (rho.shape[-1], -1)).square().sum(-1)                               # [B, T, blocks]
    share = share / share.sum(-1, keepdim=True).clamp(min=1e-12)
    return (share[:, None] * (1 - rho).sqrt()).sum(-1)


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
