"""Norms of the gradients of each term, and which parameters decay."""
import pytest
import torch
from torch import nn

from icf.config import Config, ObjectiveConfig
from icf.engine.gradients import gradient_norms
from icf.engine.train import parameter_groups
from icf.model.build import build_model


def test_norms_are_those_of_each_term_alone_and_leave_no_gradient(small, make_batch, settle):
    model = settle(build_model(small()))
    losses = model(make_batch((5, 3)))
    norms = gradient_norms(model, losses)
    assert all(p.grad is None for p in model.parameters())
    parts = {name.split("/")[2] for name in norms}
    assert parts == {"encoder", "decoder", "mit", "sc", "cdcl"}
    assert {"total", "bce", "va", "vl_cf", "vl_batch", "eps"} <= {name.split("/")[1] for name in norms}
    assert norms["grad/eps/sc"] > 0 == norms["grad/eps/encoder"] == norms["grad/eps/decoder"]
    assert norms["grad/bce/sc"] == norms["grad/bce/mit"] == 0 < norms["grad/bce/encoder"]
    assert norms["grad/vl_cf/sc"] == 0 < norms["grad/vl_batch/decoder"]
    losses.total.backward()
    own = [p.grad.norm() for p in model.objective.sc.parameters() if p.requires_grad]
    torch.testing.assert_close(norms["grad/total/sc"], torch.stack(own).norm())


@pytest.mark.parametrize("network", ["tpavi", "avsegformer"])
def test_hosts_have_the_same_parts(network, small, make_batch):
    model = build_model(small(model={"network": network}))
    norms = gradient_norms(model, model(make_batch()))
    assert norms["grad/total/encoder"] > 0 and norms["grad/total/decoder"] > 0 and norms["grad/va/sc"] == 0


def test_a_compiled_step_has_no_second_backward():
    config = Config()
    config.train.gradient_norms, config.train.compile = True, "inductor"
    with pytest.raises(ValueError, match="train.gradient_norms: expected false"):
        config.check()


def decaying(model, train):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for group in parameter_groups(model, train) if group["weight_decay"] for p in group["params"]}



@pytest.mark.parametrize("network", ["icf", "tpavi", "avsegformer"])
@pytest.mark.parametrize("objective", [
    {}, {"sc": {"generator": "vqvae"}}, {"mit": {"fuse": "level_scalar", "slot_len": 3}}, {"enabled": False}], ids=str)
def test_decay_falls_on_matrices_of_linear_maps_alone(network, objective, small):
    config = small(model={"network": network}, objective=objective)
    model = build_model(config)
    names = decaying(model, config.train)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        linear = isinstance(owner, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)) and parameter.ndim > 1
        assert (name in names) == linear, name
    learned = {"queries", "audio_queries", "position", "level", "slots", "codes", "mark", "null", "log_tau"}
    assert not [name for name in names if {*name.split(".")} & learned]
    assert sum(len(group["params"]) for group in parameter_groups(model, config.train)) == len(trained)


def test_a_parameter_that_is_new_does_not_decay():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory, self.linear, self.table = nn.Parameter(torch.zeros(4, 4)), nn.Linear(4, 4), nn.Embedding(4, 4)

    assert decaying(Part(), Config(objective=ObjectiveConfig(enabled=False)).train) == {"linear.weight"}
