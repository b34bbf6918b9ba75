"""The mean over real seconds, in the shapes in which the parts of the objective ask for it."""
import pytest
import torch

from icf.objective.average import average

REAL = torch.tensor([[True, True, False], [True, True, True]])


@pytest.mark.parametrize(("shape", "dim", "real"), [
    ((2, 3), 1, REAL), ((2, 3, 4), 1, REAL), ((2, 5, 3), -1, REAL[:, None]), ((2, 5, 3, 4), -2, REAL[:, None])])
def test_only_real_seconds_count(shape, dim, real):
    x = torch.randn(shape, dtype=torch.float64)
    mean = average(x, real, dim)
    torch.testing.assert_close(mean[:1], x[:1].narrow(dim, 0, 2).mean(dim, keepdim=True))
    torch.testing.assert_close(mean[1:], x[1:].mean(dim, keepdim=True))
    torch.testing.assert_close(average(x, None, dim), x.mean(dim, keepdim=True))


def test_padding_gets_no_gradient_and_a_clip_of_nothing_is_zero():
    x = torch.randn(2, 3, 4, requires_grad=True)
    real = REAL.clone()
    real[1] = False
    mean = average(x, real)
    mean.sum().backward()
    assert mean[1].eq(0).all() and x.grad[0, :2].eq(0.5).all()
    assert x.grad[0, 2].eq(0).all() and x.grad[1].eq(0).all()
