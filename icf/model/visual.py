"""Visual encoder: a timm network that returns its maps at strides 4, 8, 16 and 32."""
from __future__ import annotations

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from icf.weights import in_short, read_weights

STRIDES = [4, 8, 16, 32]


class VisualEncoder(nn.Module):
    """uint8 pictures to four feature maps; any timm model whose `features_only` form has strides 4, 8, 16, 32.

    Args:
        name: timm's name, e.g. `pvt_v2_b5` or `resnet50.tv_in1k`.
        weights: `imagenet` (through timm), `none` (random, from torch's generator), or a local file, `.safetensors` or
            torch, with timm's key names or those of the original `pvt_v2_b5.pth` and `resnet50-19c8e357.pth`, with or
            without a classifier.
        freeze_norm: BatchNorm layers stay in eval mode, so that their stored statistics do not move.

    Attributes:
        channels: of the four maps.

    Raises:
        ValueError: unknown model, one without these strides, or a file that does not fit it.
        FileNotFoundError, ConnectionError: weights that are missing, or cannot be fetched.
    """

    def __init__(self, name: str, weights: str = "imagenet", freeze_norm: bool = True):
        super().__init__()
        self.freeze_norm = freeze_norm
        self.net = keep_finite(_create(name, weights))
        strides = self.net.feature_info.reduction()
        if strides != STRIDES:
            raise ValueError(f"model.visual.name: expected a timm model with maps at strides {STRIDES}, "
                             f"{name} has {strides}")
        self.channels: list[int] = self.net.feature_info.channels()
        self.channels_last = str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC")
        config = self.net.pretrained_cfg
        mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        self.train()

    def train(self, mode: bool = True) -> VisualEncoder:
        super().train(mode)
        if self.freeze_norm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, frames: Tensor) -> list[Tensor]:
        """frames: [N,3,H,W] uint8 RGB -> four maps [N,C,H/4,W/4] .. [N,C,H/32,W/32]. Normalised on their device."""
        x = torch.addcmul(self.shift, frames.to(self.scale.dtype), self.scale)
        maps = self.net(x.contiguous(memory_format=torch.channels_last))
        return [x.permute(0, 3, 1, 2) for x in maps] if self.channels_last else maps


def keep_finite(module: nn.Module) -> nn.Module:
    """In place: no BatchNorm of `module` takes what is not finite into its running statistics, of which one value, an
    overflow in half precision say, would stay for ever; its buffer `left_out` counts the batches of which any was."""
    for norm in module.modules():
        if isinstance(norm, _BatchNorm) and norm.track_running_stats:
            norm.register_buffer("left_out", torch.zeros_like(norm.running_mean[0]), persistent=False)
            norm.register_forward_pre_hook(_remember)
            norm.register_forward_hook(_restore)
    return module


def _remember(norm: _BatchNorm, _) -> None:
    if norm.training:
        norm.before = torch.stack([norm.running_mean, norm.running_var])


def _restore(norm: _BatchNorm, _, __) -> None:
    if norm.training:
        now = torch.stack([norm.running_mean, norm.running_var])
        norm.left_out += ~now.isfinite().all()
        for running, kept in zip((norm.running_mean, norm.running_var), now.where(now.isfinite(), norm.before),
                                 strict=True):
            running.data.copy_(kept)                                    # backward keeps it, unread


def _create(name: str, weights: str) -> nn.Module:
    options = {"features_only": True, "out_indices": (-4, -3, -2, -1)}
    if not timm.is_model(name):
        raise ValueError(f"model.visual.name: expected the name of a timm model, got {name!r}")
    if weights == "none":
        return timm.create_model(name, pretrained=False, **options)
    if weights == "imagenet":
        try:
            return timm.create_model(name, pretrained=True, **options)
        except Exception as error:
            raise ConnectionError(f"model.visual.weights: timm could not fetch the ImageNet weights of {name} "
                               f"({in_short(error)}); give a local file, or 'none' for a random start") from error
    state = read_weights("model.visual.weights", weights)
    with torch.random.fork_rng(devices=[]):
        whole = timm.create_model(name, pretrained=False)
    heads = whole.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    own = {key: value for key, value in whole.state_dict().items() if key.startswith(heads)}
    state = {**state, **own}            # a pyramid has no head: that of the file may be of other classes, or missing
    try:
        for form in ({}, options):      # only the whole network is loaded strictly: timm lets a pyramid miss any weight
            net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(state)}, **form)
        return net
    except Exception as error:
        raise ValueError(f"model.visual.weights: {weights} does not fit {name} ({in_short(error)})") from error
