"""Whatever an operator is given, it raises an error that names it, or computes what the reference does."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icf_kernels._common.backend import PROBLEM
from icf_kernels._common.testing import forward_backward, module, operator_function, operators

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ODD_DTYPES = (torch.int64, torch.bool, torch.complex64)
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}


def shorter(x, dim, draw):
    return x.narrow(dim, 0, draw(st.integers(0, x.shape[dim])))


def longer(x, dim, draw):
    return torch.cat([x, torch.zeros_like(x.narrow(dim, 0, min(1, x.shape[dim])))], dim)


def without_axis(x, dim, draw):
    return x.select(dim, 0) if x.shape[dim] else x


def with_axis(x, dim, draw):
    return x.unsqueeze(dim)


def swapped(x, dim, draw):
    return x.transpose(dim, draw(st.integers(0, x.dim() - 1)))


def expanded(x, dim, draw):
    return x.narrow(dim, 0, 1).expand_as(x) if x.shape[dim] else x


def strided(x, dim, draw):
    return torch.stack([x, x], dim + 1).select(dim + 1, 0)


def offset(x, dim, draw):
    """The same numbers at an address of odd alignment."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def turned(x, dim, draw):
    """The same numbers, laid out with another axis innermost."""
    return x.transpose(dim, -1).contiguous().transpose(dim, -1)


def odd_dtype(x, dim, draw):
    return x.to(draw(st.sampled_from((*DTYPES, *ODD_DTYPES))))


def scaled(x, dim, draw):
    return (x * draw(st.sampled_from((0.0, 1e-30, 1e-3, 1e3, -1.0)))).to(x.dtype)


def not_finite(x, dim, draw):
    if not x.is_floating_point() or not x.numel():
        return x
    x = x.clone().contiguous()
    x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from((torch.nan, torch.inf, -torch.inf)))
    return x


CHANGES = (shorter, longer, without_axis, with_axis, swapped, expanded, strided, offset, turned, odd_dtype, scaled,
           not_finite)
NUMBERS = st.one_of(st.integers(-3, 9), st.sampled_from((0.0, -1.0, 0.5, 2**63 - 1, -(2**63))))


@st.composite
def arguments(draw, cases):
    """Arguments of an operator of which some are spoilt, and by what."""
    shape = draw(st.sampled_from([s for s in cases.shapes if max(n for n in s if isinstance(n, int)) <= 300]))
    args, changes = list(cases.make_inputs(shape, draw(st.sampled_from(cases.dtypes)), "cpu")), []
    for _ in range(draw(st.integers(0, 3))):
        i = draw(st.integers(0, len(args) - 1))
        if isinstance(args[i], torch.Tensor) and args[i].dim():
            change = draw(st.sampled_from(CHANGES))
            changes.append((i, change.__name__))
            args[i] = change(args[i], draw(st.integers(0, args[i].dim() - 1)), draw)
        elif isinstance(args[i], (int, float)) and not isinstance(args[i], bool):
            args[i] = draw(NUMBERS)
        elif isinstance(args[i], list):  # of sizes
            args[i] = draw(st.lists(st.tuples(st.integers(-1, 5), st.integers(-1, 5)), max_size=4))
        elif isinstance(args[i], str):
            args[i] = draw(st.sampled_from((args[i], "plain", "gaussian", "odd")))
    return shape, changes, args


def outcome(function, args):
    """Results and gradients, or the error."""
    try:
        return forward_backward(function, args, torch.float32)
    except (ValueError, RuntimeError) as error:
        return error


@pytest.mark.skipif(bool(PROBLEM["_C"]), reason=PROBLEM["_C"])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("room, op", [pytest.param(room, op, id=op) for room, op in operators()])
@given(data=st.data())
def test_any_input_is_refused_or_computed_as_the_reference_does(room, op, data):
    shape, changes, args = data.draw(arguments(module(room, "cases").CASES[op]))
    fast, plain = (outcome(operator_function(room, op, "api", backend=backend), args)
                   for backend in ("cpp", "reference"))
    if isinstance(fast, Exception):
        assert op in str(fast), fast
        assert isinstance(plain, Exception) or "cannot run" in str(fast), (fast, plain)
        return
    assert not isinstance(plain, Exception), plain
    assert [(x.shape, x.dtype) for x in fast] == [(x.shape, x.dtype) for x in plain]
    tolerance = max(TOLERANCE.get(x.dtype, 0) for x in [*args, *plain] if isinstance(x, torch.Tensor))
    for x, y in zip(fast, plain, strict=True):
        if x.numel() and all(a.isfinite().all() for a in args if isinstance(a, torch.Tensor)):
            scale = y[y.isfinite()].abs().max() if y.isfinite().any() else 1
            torch.testing.assert_close(x, y, rtol=0, atol=float(tolerance * max(scale, 1)), equal_nan=True)
