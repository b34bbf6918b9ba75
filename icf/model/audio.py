"""Sound encoders: log-mel examples of 0.96 s to 128 numbers each."""
from __future__ import annotations

import re
from collections.abc import Callable
from hashlib import blake2b

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icf.config import AudioConfig
from icf.weights import in_short, read_weights

URLS = {"vggish-10086976.pth": "https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth",
        "yamnet.pth": "https://github.com/w-hc/torch_audioset/releases/download/v0.1/yamnet.pth"}
OUT = 128
KEPT = 256 * 2**20  # bytes of frozen features that are kept at most


def sound_encoder(audio: AudioConfig, pretrained: bool = True) -> VGGish | YAMNet:
    """The encoder of these settings, from its weights or, not `pretrained`, at random. Raises as its class does."""
    return {"vggish": VGGish, "yamnet": YAMNet}[audio.name](audio.weights if pretrained else "none", audio.width,
                                                            audio.train)


class SoundEncoder(nn.Module):
    """What `embed` makes of an example is computed once where it is frozen and on a CPU: examples are known by their
    values, so that a sound that was disturbed is another."""

    def __init__(self, train: bool):
        super().__init__()
        self.trained = train
        self.kept = Kept()
        self.register_load_state_dict_post_hook(lambda *_: self.kept.clear())

    def embed(self, log_mel: Tensor) -> Tensor:
        """log_mel: [N,1,96,64] (time, mel band) -> [N,D]."""
        raise NotImplementedError

    def project(self, features: Tensor) -> Tensor:
        """[N,D] -> [N,128]; trained also where `embed` is frozen."""
        return features

    def forward(self, log_mel: Tensor) -> Tensor:
        """log_mel: [N,1,96,64] as of `icf.data.audio`, -> [N,128]."""
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            keeps = not self.trained and log_mel.device.type == "cpu" and not torch.compiler.is_compiling()
            features = self.kept(self.embed, log_mel) if keeps else self.embed(log_mel)
        return self.project(features)


class Kept:
    """Rows of a function of examples by the digest of each, until they take `KEPT` bytes. A copy starts empty.

    Each is computed alone: among others it may be rounded otherwise, and a result would depend on what came before.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.rows: dict[tuple, Tensor] = {}
        self.size = 0

    def __deepcopy__(self, memo: dict) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple:
        return Kept, ()

    def __call__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """function: [N,...] -> [N,D] row by row; x: [N,...] on the CPU."""
        precision = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        keys = [(blake2b(row.numpy().data, digest_size=16).digest(), precision) for row in x.detach().contiguous()]
        found = {}
        for place, key in enumerate(keys):
            if key not in self.rows and key not in found:
                found[key] = function(x[place:place + 1])[0]
                if self.size + found[key].nbytes <= KEPT:
                    self.rows[key] = found[key]
                    self.size += found[key].nbytes
        return torch.stack([found[key] if key in found else self.rows[key] for key in keys])


class VGGish(SoundEncoder):
    """The VGG network of VGGish (Hershey et al., 2017), without its PCA and quantisation, as AVSBench uses it.

    Args:
        weights: a local `vggish-10086976.pth`, `download` (torch.hub's cache, needs a network once), or `none`: random
            by He et al., from torch's generator.
        width: multiplies the channels of all layers but the last; weights exist for 1 only.
        train: whether it is trained. Otherwise its parameters need no gradient and it stays in eval mode.

    Raises:
        ValueError: `width` other than 1 with weights, or a file of another network.
        FileNotFoundError, ConnectionError: weights that are missing, or cannot be fetched.
    """

    def __init__(self, weights: str = "download", width: float = 1.0, train: bool = False):
        super().__init__(train)
        c1, c2, c3, c4, hidden = (max(1, round(width * channels)) for channels in (64, 128, 256, 512, 4096))
        pool = nn.MaxPool2d(2)
        self.features = nn.Sequential(                                      # pool before ReLU: the same, cheaper
            _conv(1, c1), pool, nn.ReLU(True), _conv(c1, c2), pool, nn.ReLU(True),
            _conv(c2, c3), nn.ReLU(True), _conv(c3, c3), pool, nn.ReLU(True),
            _conv(c3, c4), nn.ReLU(True), _conv(c4, c4), pool, nn.ReLU(True),
        )
        self.embeddings = nn.Sequential(
            nn.Linear(c4 * 24, hidden), nn.ReLU(True), nn.Linear(hidden, hidden), nn.ReLU(True),
            nn.Linear(hidden, OUT), nn.ReLU(True),
        )
        if weights == "none":
            self.apply(_initialise)
        elif width != 1:
            raise ValueError(f"model.audio.width: expected 1 with weights {weights!r}, got {width}")
        else:
            self._load(weights)
        self.requires_grad_(train)
        self.train()

    def train(self, mode: bool = True) -> VGGish:
        return super().train(mode and self.trained)

    def embed(self, log_mel: Tensor) -> Tensor:
        """log_mel: [N,1,96,64] (time, mel band) -> [N,128], not negative."""
        x = self.features(log_mel)                                          # [N, C, 6, 4]
        return self.embeddings(x.permute(0, 2, 3, 1).flatten(1))            # channels last, as in TensorFlow

    def _load(self, weights: str) -> None:
        state = _read(weights, "vggish-10086976.pth")
        try:
            self.load_state_dict(state)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"model.audio.weights: {weights} holds another network than VGGish, which has "
                             "features.0.weight .. embeddings.4.bias") from error


STRIDES = (2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)  # of layer1 .. layer14
CHANNELS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
OFFSETS = 0.01, 0.001  # added to mel before the logarithm: by VGGish, which the examples follow, and by YAMNet
EPSILON = 1e-4  # of its batch norms, which have no scale
PARTS = {"conv": "conv", "fused": "conv", "dw": "dw", "depthwise_conv": "dw", "pw": "pw", "pointwise_conv": "pw"}
KINDS = {"depthwise_kernel": "kernel", "depthwise_weights": "kernel", "weights": "kernel",
         "bn.weight": "scale", "bn.bias": "shift", "bn.running_mean": "mean", "bn.running_var": "variance",
         "bn/gamma": "scale", "bn/beta": "shift", "bn/moving_mean": "mean", "bn/moving_variance": "variance"}
LAYER = re.compile(rf"(layer\d+)[./]({'|'.join(PARTS)})[./](?:conv\.)?([^:]+)")


class YAMNet(SoundEncoder):
    """YAMNet (Plakal and Ellis, 2020): MobileNet-v1 of AudioSet without its classifier; its mean over time and bands,
    1,024 wide, passes a LayerNorm and a linear layer, both learned. Batch norms are folded into the convolutions.

    Its front end is that of VGGish with an offset of .001 in place of .01, so that it reads the same examples.

    Args:
        weights: a local `.pth`, `.safetensors` or `.npz` with the names of torch_audioset's port, those of Google's
            release (`layer2/depthwise_conv/bn/beta`) or of folded arrays (`layer2.dw.bias`); `download` (that port, in
            torch.hub's cache, needs a network once); or `none`: random.
        width: multiplies the channels of all layers; weights exist for 1 only.
        train: whether the network before the projection is trained.

    Raises:
        ValueError: `width` other than 1 with weights, or a file of another network.
        FileNotFoundError, ConnectionError: weights that are missing, or cannot be fetched.
    """

    def __init__(self, weights: str, width: float = 1.0, train: bool = False):
        super().__init__(train)
        channels = [max(1, round(width * c)) for c in CHANNELS]
        self.net = nn.ModuleDict({"layer1": nn.ModuleDict({"conv": nn.Conv2d(1, channels[0], 3, STRIDES[0])})})
        for i, (c, out, stride) in enumerate(zip(channels, channels[1:], STRIDES[1:], strict=False), 2):
            self.net[f"layer{i}"] = nn.ModuleDict({"dw": nn.Conv2d(c, c, 3, stride, groups=c),
                                                   "pw": nn.Conv2d(c, out, 1)})
        self.projection = nn.Sequential(nn.LayerNorm(channels[-1]), nn.Linear(channels[-1], OUT))
        if weights == "none":
            self.net.apply(_initialise)
        elif width != 1:
            raise ValueError(f"model.audio.width: expected 1 with weights {weights!r}, got {width}")
        else:
            self._load(weights)
        self.net.requires_grad_(train)
        self.train()

    def train(self, mode: bool = True) -> YAMNet:
        super().train(mode)
        self.net.train(mode and self.trained)
        return self

    def embed(self, log_mel: Tensor) -> Tensor:
        """log_mel: [N,1,96,64] by VGGish's front end -> [N,1024], not negative."""
        x = rebase(log_mel)
        for layer in self.net.values():
            for conv in layer.values():
                x = F.relu(conv(_same(x, conv)))
        return x.mean((2, 3))

    def project(self, features: Tensor) -> Tensor:
        return self.projection(features)

    def _load(self, weights: str) -> None:
        try:
            self.net.load_state_dict(_folded(_read(weights, "yamnet.pth")))
        except (RuntimeError, KeyError, TypeError) as error:
            raise ValueError(f"model.audio.weights: {weights} holds another network than YAMNet ({in_short(error)})"
                             ) from error


def rebase(log_mel: Tensor) -> Tensor:
    """Log-mel examples of VGGish's front end as YAMNet's, float32; the two differ in their offset alone."""
    vggish, yamnet = OFFSETS
    return torch.log((log_mel.float().exp() - vggish).clamp(min=0) + yamnet)


def _read(weights: str, published: str) -> dict[str, Tensor]:
    """The tensors of a local file, or of the published one."""
    if weights != "download":
        return read_weights("model.audio.weights", weights)
    try:
        return torch.hub.load_state_dict_from_url(URLS[published], map_location="cpu", check_hash="-" in published,
                                                  weights_only=True)
    except Exception as error:
        raise ConnectionError(f"model.audio.weights: could not fetch {URLS[published]} ({in_short(error)}); give a "
                              f"local {published}, or 'none' for a random start") from error


def _folded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any of the layouts that `YAMNet` reads as its own: convolutions with a bias, and no batch norm."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if found := LAYER.search(name):
            layer, part, kind = found.groups()
            layers.setdefault(f"{layer}.{PARTS[part]}", {})[KINDS.get(kind, kind)] = value.float()
    folded = {}
    for name, own in layers.items():
        if "kernel" in own:                                                 # TensorFlow's: height, width, in, out
            own["weight"] = own["kernel"].permute((2, 3, 0, 1) if name.endswith("dw") else (3, 2, 0, 1))
        if "mean" in own:
            scale = own.get("scale", 1.0) * (own["variance"] + EPSILON).rsqrt()
            own["weight"] = own["weight"] * scale.view(-1, 1, 1, 1)
            own["bias"] = own["shift"] - own["mean"] * scale
        folded |= {f"{name}.weight": own["weight"], f"{name}.bias": own["bias"]}
    return folded


def _same(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """TensorFlow's padding: what is odd goes to the end."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    (top, bottom), (left, right) = (
        (more // 2, more - more // 2) for more in (max(kernel - (n % stride or stride), 0) for n in x.shape[2:]))
    return F.pad(x, (left, right, top, bottom))


def _conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)
