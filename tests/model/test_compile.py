"""torch.compile takes the model and its parts whole: no graph break, in our operators or between them."""
import copy
from dataclasses import replace

import pytest
import torch

from icf.config import CDCLConfig, MITConfig, ObjectiveConfig, SCConfig
from icf.context import LevelFeatures, VisualContext
from icf.model.decoder import Decoder
from icf.model.losses import dense_losses
from icf.model.pixel_decoder import PixelDecoder
from icf.objective.cdcl import CDCL
from icf.objective.mit import MIT, Text
from icf.objective.objective import build_towers
from icf.objective.sc import SC, Counterfactuals

B, T, D = 3, 5, 24
MIT_CONFIG = MITConfig(frame="hash", video="hash", audio="hash", texts=6)
SC_CONFIG = SCConfig(dim=16, blocks=2, candidates=5, keep=3, ddim_steps=2, width=16, layers=1, heads=2)


def maps(*sizes, channels=12):
    return [torch.randn(B * T, channels, n, n) for n in sizes]


def said() -> Text:
    choices = torch.randn(6, D)
    index = torch.arange(B * T).view(B, T) % 6
    return Text(torch.randn(B, T, D), torch.randn(B, T, D), choices[index], index, choices, {})


def imagined() -> Counterfactuals:
    return Counterfactuals(torch.randn(B, 3, T, D), torch.rand(B, 3), torch.rand(B, 3), {}, {})


def mit():
    part, levels = MIT(MIT_CONFIG, 7, build_towers(MIT_CONFIG)), LevelFeatures([12], 512, MIT_CONFIG.levels, ())
    return part, (*levels([torch.randn(B, T, 12, 4, 4)]), torch.randn(B, T, 7))


def sc(**options):
    return SC(replace(SC_CONFIG, **options), D, 12), (torch.randn(B, T, D), torch.randn(B, T, 12))


def cdcl(**options):
    return CDCL(CDCLConfig(dim=16, **options), 12, 7, D), (torch.randn(B, T, 12), torch.randn(B, T, 7), said(),
                                                           imagined())


PARTS = {
    "pixel_decoder": lambda: (PixelDecoder([12] * 4, 16, 1, 32, 2, 4), (maps(16, 8, 4, 2),)),
    "decoder": lambda: (Decoder(7, 16, 2, 32, 2, 4, "bidirectional", "clip_null", None, None),
                        (maps(16, channels=16)[0], maps(8, 4, 2, channels=16), torch.randn(B, T, 7),
                         torch.arange(B * T), None)),
    "context": lambda: (VisualContext([12, 12], ("video", "frame"), 4), (maps(4, 2), T)),
    "levels": lambda: (LevelFeatures([12], 6, ("video", "segment", "frame"), ("segment",), 4),
                       ([torch.randn(B, T, 12, 4, 4)],)),
    "mit": mit,
    "sc": sc, "sc_feature": lambda: sc(generator="feature", latent="identity"),
    "cdcl": cdcl, "cdcl_batch": lambda: cdcl(text_negatives="batch"), "cdcl_band": lambda: cdcl(positives="band"),
    "losses": lambda: (dense_losses, (torch.randn(2, B, 1, 4, 4), torch.randint(0, 2, (B, 8, 8)).to(torch.uint8))),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_compile_without_graph_break(name):
    part, args = PARTS[name]()
    torch.compiler.reset()  # one limit of compilations counts for all tests
    torch.compile(part, fullgraph=True, backend="eager")(*args)


def test_training_is_one_graph_with_the_same_losses(make_model, make_batch):
    model = make_model(objective=ObjectiveConfig(mit=MIT_CONFIG, sc=SC_CONFIG, cdcl=CDCLConfig(dim=16)))
    batch, losses = make_batch((5, 3)), []
    torch.compiler.reset()
    twin = copy.deepcopy(model)
    for run in (model, torch.compile(twin, fullgraph=True, backend="eager")):
        torch.manual_seed(1)
        losses.append(run(batch))
        losses[-1].total.backward()
    torch.testing.assert_close(losses[1].detached(), losses[0].detached())
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, msg=name)
