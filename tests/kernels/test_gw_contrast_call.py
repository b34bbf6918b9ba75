"""gw_contrast in one native call is the composition in plain PyTorch, whatever its settings."""
import pytest
import torch
from torch.nn.functional import normalize

from icf.ops import gw_contrast
from icf_kernels._common import backend as backends
from icf_kernels._common.testing import Calls, require_grad

pytestmark = pytest.mark.skipif(bool(backends.PROBLEM["_C"]), reason=f"icf_kernels._C {backends.PROBLEM['_C']}")
B, EYE = 5, torch.eye(5, dtype=torch.bool)
OPTIONS = {
    "defaults": {}, "one way": {"symmetric": False}, "no entropy": {"entropy": "none"}, "no weight": {"gamma": 0},
    "regularizer": {"entropy": "regularizer", "gamma": 2}, "temperature": {"tau": 1}, "smooth": {"spectral": "smooth"},
    "pairs": {"positives": EYE | EYE.roll(1, 0)}, "all": {"positives": torch.ones(B, B, dtype=torch.bool)},
    "ignored": {"positives": EYE, "ignored": EYE.roll(2, 0) | EYE}, "one-way ignored": {
        "positives": EYE | EYE.roll(1, 0), "ignored": EYE.roll(2, 0), "symmetric": False},
    "strided pairs": {"positives": (EYE | EYE.roll(1, 0)).mT}, "threshold": {"positives": "threshold", "theta": 0.3},
    "band": {"positives": "band", "theta": 0.4, "theta_low": -0.5}, "entropic": {"spectral": "entropic"},
}


def value_and_gradients(x, y, **options):
    (x, y), leaves = require_grad((x, y))
    loss = gw_contrast(x, y, anchors=x.mean(1), **options)
    return [loss.detach(), *torch.autograd.grad(1.7 * loss, leaves)]


def clips(dtype):
    generator = torch.Generator().manual_seed(0)
    return [normalize(torch.randn(B, T, 6, generator=generator, dtype=torch.float64), dim=-1).to(dtype) for T in (4, 3)]


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("options", OPTIONS)
def test_is_the_composition(options, masked):
    options = {**OPTIONS[options], "x_mask": torch.arange(4) < torch.arange(1, B + 1)[:, None] if masked else None}
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-5), (torch.bfloat16, 5e-2)):
        x, y = clips(dtype)
        expected = value_and_gradients(x, y, backend="reference", **options)
        for _ in range(2):  # looked at anew, then remembered
            for got, true in zip(value_and_gradients(x, y, backend="cpp", **options), expected, strict=True):
                assert got.dtype == true.dtype
                torch.testing.assert_close(got, true, rtol=tolerance, atol=tolerance)


def test_is_one_call_each_way():
    x, y = (clip.requires_grad_() for clip in clips(torch.float32))
    with Calls() as calls:
        gw_contrast(x, y, backend="cpp").backward()
    assert [str(op) for op, _ in calls] == ["icf.gw_contrast.cpp", "icf.gw_contrast_backward.cpp"]
    for operator, args in calls:
        torch.library.opcheck(operator, [a.detach() if isinstance(a, torch.Tensor) else a for a in args])


def test_a_row_without_negatives_counts_as_exactly_zero():
    loss, *gradients = value_and_gradients(*clips(torch.float32), backend="cpp", **OPTIONS["all"])
    assert loss == 0 and not any(gradient.any() for gradient in gradients)


def test_gradients_by_finite_differences():
    x, y = (clip.requires_grad_() for clip in clips(torch.float64))
    options = {**OPTIONS["ignored"], "backend": "cpp"}
    assert torch.autograd.gradcheck(lambda x, y: gw_contrast(x, y, **options), (x, y))


@pytest.mark.parametrize("wrong, error", [
    ({"tau": 0}, "tau must be above 0"), ({"entropy": "all"}, "entropy one of"), ({"sign": "plus"}, "sign must be"),
    ({"positives": EYE.float()}, "positives must be bool"), ({"ignored": EYE[:3], "positives": EYE}, "ignored must be"),
    ({"x_mask": torch.ones(B, 4)}, "x_mask must be bool"), ({"spectral": "flat"}, "spectral must be one of"),
    ({"positives": "band"}, "needs anchors")])
def test_a_call_that_was_right_does_not_excuse_another(wrong, error):
    x, y = clips(torch.float32)
    for options in ({}, {"positives": EYE}):
        gw_contrast(x, y, **options)
    with pytest.raises(ValueError, match=error):
        gw_contrast(x, y, **wrong)


def test_the_printed_sign_warns_at_each_call():
    x, y = clips(torch.float32)
    for _ in range(2):
        with pytest.warns(UserWarning, match="drives positives apart"):
            gw_contrast(x, y, sign="paper")


def test_a_learned_temperature_keeps_its_gradient():
    x, y = clips(torch.float64)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda tau: gw_contrast(x, y, tau=tau), tau)
