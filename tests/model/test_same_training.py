"""Training is the same whatever runs the operators: losses, gradients and curves of the whole model."""
from functools import partial

import pytest
import torch

from icf.model.icf import ICF
from icf_kernels._common.backend import PROBLEM, use_backend
from icf_kernels._common.testing import Calls

FAST = [pytest.param(name, marks=pytest.mark.skipif(bool(problem), reason=problem))
        for name, problem in (("cpp", PROBLEM["_C"]),)]
OPERATORS = {"ms_deform_attn_fused", "orthogonal_blend", "gaussian_w2"}

plain_descent = partial(torch.optim.SGD, lr=1e-2)


@pytest.fixture
def train(small, make_batch, settle):
    """Trains the same small model on the same clips, on one backend."""
    def run(backend: str, steps: int, optimizer=plain_descent, autocast: bool = False):
        """Losses of every step, [steps, terms], the total first, and the gradients of the last."""
        cfg, batch, history = small(model={"decoder": {"layers": 1}}), make_batch((5, 3)), []
        torch.manual_seed(0)
        model = settle(ICF(cfg.model, cfg.loss, cfg.objective), 0.1)
        optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
        with use_backend(backend):
            for step in range(steps):
                optimizer.zero_grad()
                torch.manual_seed(step)
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    losses = model(batch)
                losses.total.backward()
                optimizer.step()
                history.append(torch.stack([x.detach() for x in (losses.total, *losses.terms.values())]))
        return torch.stack(history), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return run


@pytest.mark.parametrize("backend", FAST)
def test_one_step_has_the_same_losses_and_gradients(train, backend):
    with Calls() as calls:
        losses, gradients = train(backend, 1)
    assert {function.overloadpacket.__name__ for function, _ in calls} >= OPERATORS
    expected_losses, expected = train("reference", 1)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max() + 1e-6, name


@pytest.mark.parametrize("backend", FAST)
def test_twenty_steps_have_the_same_losses(train, backend):
    losses, expected = (train(name, 20)[0] for name in (backend, "reference"))
    assert expected[-1, 0] < expected[0, 0]
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-3)  # 20 steps make 3e-7 of rounding up to 3e-4


@pytest.mark.parametrize("backend", FAST)
def test_curves_overlap_in_bf16(train, backend):
    """What rounding makes of the losses is a small part of what training makes of them."""
    adam = partial(torch.optim.AdamW, lr=1e-3)
    losses, expected = (train(name, 20, adam, autocast=True)[0][:, 0] for name in (backend, "reference"))
    assert (losses - expected).abs().max() < 0.05 * (expected[0] - expected[-1])
