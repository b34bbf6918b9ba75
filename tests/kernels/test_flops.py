"""FlopCounterMode knows what the operators cost, forward and backward, whatever is imported first."""
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from icf_kernels._common import backend as backends
from icf_kernels._common.testing import module, operator_function, require_grad, results

needs_cpp = pytest.mark.skipif(bool(backends.PROBLEM["_C"]), reason=f"icf_kernels._C {backends.PROBLEM['_C']}")
# Operations counted by hand, forward and backward, of small inputs as in cases.py.
BY_HAND = [
    # 2 images, 3 queries, 2 heads, 1 level, 2 points are 24 samples; 4 channels at 4 corners, a product and a sum each
    ("ms_deform_attn", (2, 3, 2, 4, 2, 3, 2, "apart"), 24 * (4 * 4 * 2 + 14), 24 * (2 * 4 * 4 * 2 + 40)),
    ("ms_deform_attn_fused", (2, 3, 2, 4, 2, 3, 2, "apart"), 24 * (32 + 14 + 4), 24 * (64 + 40 + 4)),
    # 3 rows of 5: z.z, r.z and r.r, 10 each, and 15 for a combination of two; then g.z, g.r and one of three
    ("orthogonal_blend", (3, 5, "given", "unit"), 3 * (30 + 15), 3 * (45 + 20 + 10)),
    ("orthogonal_blend", (3, 5, "gaussian", "unit"), 3 * (45 + 21 * 5), 3 * (75 + 21 * 5)),
    # 16 rows of the result, of one row of z
    ("orthogonal_blend", (1, 16, 1, 5, "given", "unit"), 10 + 16 * 35, 10 + 16 * (35 + 30)),
    # 2 matrices of 3 rows of 5: 3 projections, 2 times 5 products and sums each; norms, 5 * 5 a row
    ("gram_schmidt", (2, 3, 5), 2 * (3 * 20 + 3 * 25), 2 * (2 * 3 * 3 * 5 * 2 + 3 * 3 * 5)),
    ("orthogonal_directions", (3, 8, 7), 3 * 8 * (4 + 3 + 2 * 8), 0),
    # 2 samples of 3 frames and 2 of 3 in 4 dimensions: factors, traces and Gram matrices (and, for the gradient, their
    # inverses); 4 pairs: a product of 2 x 4 and 4 x 2, means, and the singular values of 2 x 2
    ("gaussian_w2", (1, 2, 3, 2, 3, 4, "plain"), 4 * (72 + 16 + 16 + 2) + 4 * (32 + 12 + 16 + 16),
     4 * (72 + 32) + 4 * (4 + 64 + 20)),
]


def counted(counters, function, args):
    """What two counters say of the forward, without a gradient, and of the backward alone."""
    with counters[0]:
        results(function, args)
    args, leaves = require_grad(args)
    outs = results(function, args)
    with counters[1]:
        if outs[0].requires_grad:
            torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])
    return [counter.get_total_flops() for counter in counters]


@needs_cpp
@pytest.mark.parametrize("op, shape, forward, backward", BY_HAND)
def test_counts_are_those_made_by_hand(op, shape, forward, backward):
    room = backends.FAMILY[op]
    args = module(room, "cases").CASES[op].make_inputs(shape, torch.float32, "cpu")
    function = operator_function(room, op, "api", backend="cpp")
    assert counted([FlopCounterMode(display=False) for _ in range(2)], function, args) == [forward, backward]


def test_every_operator_has_a_formula():
    assert {getattr(torch.ops.icf, op) for op in backends.IMPLEMENTED} <= {*flop_registry}


class Arithmetic(TorchDispatchMode):
    """Operations of a definition in plain PyTorch: products of matrices, and one for each element of other results."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function.overloadpacket in flop_registry:
            self.count += flop_registry[function.overloadpacket](*args, out_val=out)
        else:
            self.count += sum(t.numel() for t in tree_leaves(out)
                              if isinstance(t, torch.Tensor) and t.is_floating_point() and not function.is_view)
        return out

    def get_total_flops(self):
        return self.count


@needs_cpp
@pytest.mark.parametrize("room, op, shape", [
    ("ms_deform_attn", "ms_deform_attn", (1, 67, 2, 64, 4, 8, 8, 4, 4, "apart")),
    ("ms_deform_attn", "ms_deform_attn_fused", (1, 67, 2, 64, 4, 8, 8, 4, 4, "boxes")),
    ("gram_schmidt", "orthogonal_blend", (3, 1500, "gaussian", "unit")),
    ("gram_schmidt", "orthogonal_blend", (1, 16, 2, 32, "gaussian", "norm")),
    ("gram_schmidt", "gram_schmidt", (1, 20, 300)), ("gram_schmidt", "orthogonal_directions", (1, 2048, 3)),
    ("gw_contrast", "gaussian_w2", (1, 3, 10, 3, 10, 64, "plain")),
    ("gw_contrast", "gaussian_w2", (2, 2, 5, 3, 4, 64, "smooth-masked"))])
def test_counts_are_below_those_of_the_definition_and_near(room, op, shape):
    args = module(room, "cases").CASES[op].make_inputs(shape, torch.float32, "cpu")
    ours = counted([FlopCounterMode(display=False) for _ in range(2)],
                   operator_function(room, op, "api", backend="cpp"), args)
    definition = counted([Arithmetic(), Arithmetic()], operator_function(room, op, "reference"), args)
    for count, plain in zip(ours, definition, strict=True):
        assert 0.8 * count <= plain <= 4 * count


@needs_cpp
@pytest.mark.parametrize("first", ["import icf.ops", "import torch.utils.flop_counter"])
def test_the_order_of_imports_does_not_matter(first):
    code = (f"{first}; from torch.utils.flop_counter import FlopCounterMode; from icf.ops import gram_schmidt\n"
            "import torch\nwith FlopCounterMode(display=False) as counter: gram_schmidt(torch.ones(2, 3, 5))\n"
            "print(counter.get_total_flops())")
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["270"]
