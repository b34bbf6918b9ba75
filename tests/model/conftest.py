import pytest
import torch

from icf.config import AudioConfig, ContextConfig, DecoderConfig, ModelConfig, VisualConfig
from icf.data import Batch
from icf.model import ICF


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def make_model():
    """A small model; keywords go to the decoder's settings."""
    def make(classes=1, loss=None, objective=None, levels=("video", "frame"), **decoder):
        sizes = {"dim": 32, "pixel_layers": 1, "pixel_ffn": 64, "layers": 3, "ffn": 64, "heads": 4, "queries": 6}
        settings = ModelConfig(
            classes=classes, visual=VisualConfig("test_resnet", "none", freeze_norm=False),
            audio=AudioConfig("none", width=0.0625, train=True), context=ContextConfig(levels, dim=8),
            decoder=DecoderConfig(**{**sizes, **decoder}))
        return ICF(settings, loss, objective)
    return make


@pytest.fixture
def make_batch():
    """Random clips; `lengths`: real frames of each, `labels`: how many of them are labelled."""
    def make(lengths=(5, 5), steps=5, size=64, classes=1, labels=None, values=None):
        b, generator = len(lengths), torch.Generator().manual_seed(1)
        step = torch.arange(steps).expand(b, steps)
        frame_mask = step < torch.tensor(lengths)[:, None]
        label_mask = frame_mask & (step < (labels or steps))
        coarse = torch.randint(0, values or max(2, classes), (b, steps, 4, 4), generator=generator, dtype=torch.uint8)
        masks = coarse.repeat_interleave(size // 4, 2).repeat_interleave(size // 4, 3)
        frames = torch.randint(0, 256, (b, steps, 3, size, size), generator=generator, dtype=torch.uint8)
        log_mel = torch.randn(b, steps, 1, 96, 64, generator=generator)
        return Batch(frames * frame_mask[..., None, None, None], log_mel, masks * label_mask[..., None, None],
                     frame_mask, label_mask, [str(i) for i in range(b)], [()] * b)
    return make


@pytest.fixture
def settle():
    """Moves what starts at zero, or nearly so, away from it, so that its effects can be seen."""
    @torch.no_grad()
    def settle(model, scale=0.3):
        for parameter in model.parameters():
            if parameter.numel() and parameter.abs().max() < 1e-3:
                parameter.add_(scale * torch.randn_like(parameter))
        return model
    return settle
