"""Latent diffusion of texts, Eq. 6 and 9: the schedule and its sampler (diffusers), and the denoiser."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Noise(nn.Module):
    """Noise added by the schedule of diffusers' DDIM.

    Args:
        steps, beta: of the schedule; `scaled_linear` is that of latent diffusion.
    """

    def __init__(self, steps: int = 1000, beta: str = "scaled_linear"):
        super().__init__()
        try:
            from diffusers import DDIMScheduler
        except ImportError as error:
            raise ValueError(f"sc.generator: diffusion and feature need the package diffusers ({error}); pip install "
                             "diffusers") from error
        low, high = (0.00085, 0.012) if beta == "scaled_linear" else (1e-4, 0.02)
        self.schedule = DDIMScheduler(steps, low, high, beta_schedule=beta, clip_sample=False, set_alpha_to_one=True)

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """Eq. 6 in one jump: x, noise [B,..,D] at t, an integer or [B]."""
        if isinstance(t, int):
            t = torch.full((len(x),), t, device=x.device)
        return self.schedule.add_noise(x, noise, t)


class Diffusion(Noise):
    """Noise added and taken away by one schedule, and the network that predicts it.

    Args:
        dim: width of the latents.
        condition_dim: width of what is seen; None denoises without.
        start: diffusion steps, of `steps`, that a latent is noised by before it is denoised again.
        ddim_steps: in which it is denoised.
        steps, beta: of `Noise`.
        width, layers, heads: of the denoiser.
    """

    def __init__(self, dim: int, condition_dim: int | None, start: int, ddim_steps: int, steps: int = 1000,
                 beta: str = "scaled_linear", width: int = 256, layers: int = 4, heads: int = 4):
        super().__init__(steps, beta)
        self.start, stride = start, start // ddim_steps
        self.schedule.set_timesteps(steps // stride)                        # so that a step of it is one stride
        self.timesteps = range(start - 1, -1, -stride)
        self.register_buffer("alphas", self.schedule.alphas_cumprod.clone(), persistent=False)
        self.denoiser = Denoiser(dim, condition_dim, width, layers, heads)

    def predict(self, x: Tensor, t: Tensor | int, condition: Tensor | None, frame_mask: Tensor | None) -> Tensor:
        """Noise in x [B,M,T,D] at t, an integer or [B]. condition: [B,T,C]; frame_mask: [B,T]."""
        t = t if isinstance(t, Tensor) else torch.full((len(x),), t, device=x.device)
        return self.denoiser(x, t, condition, frame_mask).float()

    def clean(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What x [B,..,D] at t [B] was before `noise` was added."""
        alpha = self.alphas[t].view(-1, *[1] * (x.ndim - 1))
        return (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()

    def denoise(self, x: Tensor, condition: Tensor | None, frame_mask: Tensor | None, grad: str) -> Tensor:
        """Eq. 9 by DDIM from `start` on: x [B,M,T,D] -> the same; grad: through `last_step`, `none` or `full`."""
        for t in self.timesteps:
            last = t == self.timesteps[-1]
            with torch.set_grad_enabled(torch.is_grad_enabled() and (grad == "full" or (grad == "last_step" and last))):
                noise = self.predict(x, t, condition, frame_mask)
                x = self.schedule.step(noise, t, x, return_dict=False)[0]
        return x


class Denoiser(nn.Module):
    """Transformer over the seconds of a text, with the time and what is seen in adaptive norms (AdaLN-Zero, DiT).

    The M candidates of a clip share time and condition, so the norms' shifts and scales are computed once a clip.
    """

    def __init__(self, dim: int, condition_dim: int | None, width: int, layers: int, heads: int):
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.see = None if condition_dim is None else nn.Linear(condition_dim, width)
        self.enter = nn.Linear(dim, width)
        self.layers = nn.ModuleList(DenoiserLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, dim)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None, frame_mask: Tensor | None) -> Tensor:
        """x: [B,M,T,D]; t: [B]; condition: [B,T,C]; frame_mask: [B,T] -> the noise in x."""
        context = self.time(_sinusoid(t, self.width))[:, None]                                  # [B, 1, W]
        if self.see is not None:
            context = context + self.see(condition)                                             # [B, T, W]
        context = F.silu(context)[:, None]                                                      # [B, 1, 1 or T, W]
        place = _sinusoid(torch.arange(x.shape[2], device=x.device), self.width)
        x = self.enter(x) + place
        if frame_mask is not None:                          # a clip without any second sees its padding
            frame_mask = frame_mask | ~frame_mask.any(1, keepdim=True)
        seen = None if frame_mask is None else frame_mask.repeat_interleave(x.shape[1], 0)[:, None, None]
        for layer in self.layers:
            x = layer(x, context, seen)
        shift, scale = self.modulate(context).chunk(2, -1)
        return self.leave(self.norm(x) * (1 + scale) + shift)


class DenoiserLayer(nn.Module):
    """Self-attention over T and a feed-forward network, each behind an adaptive norm and a gate that starts at zero."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor, context: Tensor, seen: Tensor | None) -> Tensor:
        """x: [B,M,T,W]; context: [B,1,1 or T,W]; seen: [B*M,1,1,T] bool."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(context).chunk(6, -1)
        h = self.qkv(self.norm(x) * (1 + scale1) + shift1).flatten(0, 1)                        # [B*M, T, 3W]
        q, k, v = h.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)                    # [B*M, heads, T, d]
        h = F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2)
        x = x + gate1 * self.out(h).view_as(x)
        return x + gate2 * self.ffn(self.norm(x) * (1 + scale2) + shift2)


def _sinusoid(t: Tensor, width: int) -> Tensor:
    """[N] -> [N,width]."""
    rate = torch.exp(torch.arange(width // 2, device=t.device) * (-math.log(10_000) / (width // 2)))
    angle = t[:, None].float() * rate
    return torch.cat([angle.cos(), angle.sin()], -1)
