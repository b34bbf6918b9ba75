"""VGGish: log-mel examples of 0.96 s to 128 numbers each."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from icf.weights import in_short, read_weights

URL = "https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth"
OUT = 128


class VGGish(nn.Module):
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
        super().__init__()
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
        self.trained = train
        self.requires_grad_(train)
        self.train()

    def train(self, mode: bool = True) -> VGGish:
        return super().train(mode and self.trained)

    def forward(self, log_mel: Tensor) -> Tensor:
        """log_mel: [N,1,96,64] (time, mel band) -> [N,128], not negative."""
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            x = self.features(log_mel)                                      # [N, C, 6, 4]
            return self.embeddings(x.permute(0, 2, 3, 1).flatten(1))        # channels last, as in TensorFlow

    def _load(self, weights: str) -> None:
        if weights == "download":
            try:
                state = torch.hub.load_state_dict_from_url(URL, map_location="cpu", check_hash=True, weights_only=True)
            except Exception as error:
                raise ConnectionError(f"model.audio.weights: could not fetch {URL} ({in_short(error)}); give a local "
                                   "vggish-10086976.pth, or 'none' for a random start") from error
        else:
            state = read_weights("model.audio.weights", weights)
        try:
            self.load_state_dict(state)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"model.audio.weights: {weights} holds another network than VGGish, which has "
                             "features.0.weight .. embeddings.4.bias") from error


def _conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)
