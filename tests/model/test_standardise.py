"""Features in standard deviations from what they usually are."""
import copy

import pytest
import torch

from icf.model.build import build_model
from icf.model.standardise import Standardise


def alike(count=4000, dim=8, seed=0):
    """Features that share nearly all, as those of a network without training."""
    generator = torch.Generator().manual_seed(seed)
    return 5 + torch.linspace(0.05, 0.5, dim) * torch.randn(count, dim, generator=generator)


def test_alike_features_come_apart():
    norm = Standardise(8).train()
    for batch in alike().split(100):
        norm(batch, learn=True)
    cosine = lambda x: torch.nn.functional.cosine_similarity(x[:-1], x[1:]).abs().mean()  # noqa: E731
    x = alike(seed=1)
    out = norm(x)
    assert cosine(x) > 0.99 and cosine(out) < 0.4
    assert out.mean(0).abs().max() < 0.15
    torch.testing.assert_close(out.std(0), torch.ones(8), atol=0.25, rtol=0)


def test_it_learns_in_training_only_and_from_what_it_is_told_to():
    norm = Standardise(8).train()
    norm(alike(), learn=True)
    usual = norm.usual.clone()
    norm(alike(seed=2) + 9)
    norm.eval()(alike(seed=2) + 9, learn=True)
    assert torch.equal(norm.usual, usual)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_out(value):
    norm, x = Standardise(8).train(), alike()
    norm(x, learn=True)
    usual = norm.usual.clone()
    x[3, 2] = value
    norm(x, learn=True)
    torch.testing.assert_close(norm.usual, usual, atol=1e-2, rtol=0)


def test_a_silent_feature_is_not_blown_up():
    norm, x = Standardise(8).train(), alike()
    x[:, 3] = 0
    norm(x, learn=True)
    x[:, 3] = 0.1
    assert norm.eval()(x)[:, 3].abs().max() < 10


@pytest.mark.parametrize("network", ["icf", "tpavi", "avsegformer"])
def test_every_network_hears_through_it(small, make_batch, network):
    """Padded seconds, and the sounds of other clips, teach nothing; weights carry what is usual with them."""
    cfg = small(model={"network": network, "audio": {"standardise": True, "train": False}})
    model, batch = build_model(cfg), make_batch((5, 3))
    model.train()(batch)
    usual = model.standardise.usual.clone()
    assert usual.any()
    other = copy.deepcopy(batch)
    other.log_mel[1, 3:] = 100                                              # padding
    again = build_model(cfg).train()
    again.load_state_dict(model.state_dict())
    again.standardise.usual.zero_()
    again(other)
    torch.testing.assert_close(again.standardise.usual, usual)
    assert any("standardise.usual" in name for name in model.state_dict())
