"""Registration: schemas, shapes, gradients, operation counts, limits. Imports torch only."""
import math
from functools import partial

import torch

from .._common import backend as backends
from .._common.library import call, define
from . import reference

TRITON = "icf_kernels.ms_deform_attn.triton"
MOST_LEVELS = 128  # which the CUDA kernels take as parameters


def can_run_cuda(op, value, sizes, *_):
    ok, reason = backends.can_run_cuda(op, value)
    if ok and len(sizes) > MOST_LEVELS:
        return False, f"it takes at most {MOST_LEVELS} levels, got {len(sizes)}"
    return ok, reason


CAN_RUN = {**backends.CAN_RUN, "cuda": can_run_cuda}


def _pairs(sizes):
    return list(zip(sizes[::2], sizes[1::2], strict=True))


def _reference(op, value, sizes, *rest):
    if op == "ms_deform_attn":
        return reference.ms_deform_attn(value, _pairs(sizes), None, *rest)
    return reference.ms_deform_attn_fused(value, _pairs(sizes), *rest)


SOFTMAX = {"ms_deform_attn": 0, "ms_deform_attn_fused": 4}  # operations a logit: difference, exponential, sum, ratio


def flops(op, value, sizes, *rest):
    """Of D channels at 4 corners a product and a sum each, and of each sample 14 for its place and its corners' shares.
    The last of `rest` is the shape of the weights: one a sample."""
    return math.prod(rest[-1]) * (8 * value[3] + 14 + SOFTMAX[op])


def backward_flops(op, grad, value, sizes, *rest):
    """Twice the products of the forward: with value for the gradient of the shares, with these for that of value."""
    return math.prod(rest[-2]) * (16 * value[3] + 40 + SOFTMAX[op])


def _define(op, arguments):
    """The operator and its backward. The backward's own gradient is that of the definition in plain PyTorch."""

    def setup_context(ctx, inputs, output):
        value, ctx.sizes, *rest = inputs
        ctx.save_for_backward(value, *rest)

    def backward(ctx, backend, grad):
        value, *rest = ctx.saved_tensors
        grad_value, *grads = call(f"{op}_backward", backend, grad.contiguous(), value, ctx.sizes, *rest,
                                  torch.are_deterministic_algorithms_enabled())
        return grad_value, None, *grads

    def setup_second(ctx, inputs, output):
        grad, value, ctx.sizes, *rest, _ = inputs
        ctx.save_for_backward(grad, value, *rest)

    def second(ctx, backend, *grads):
        further = torch.is_grad_enabled()
        with torch.enable_grad():
            grad, *inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_()  # apart from each other
                             for x in ctx.saved_tensors]
            out = _reference(op, inputs[0], ctx.sizes, *inputs[1:])
            first = torch.autograd.grad(out, inputs, grad, create_graph=True)
            grad_grad, grad_value, *rest = torch.autograd.grad(first, [grad, *inputs], grads, allow_unused=True,
                                                               create_graph=further)
        return grad_grad, grad_value, None, *rest, None

    def fake(value, sizes, *rest):
        return value.new_empty(value.shape[0], rest[-1].shape[1], value.shape[2] * value.shape[3])

    def fake_backward(grad, value, sizes, *rest):
        return tuple(tensor.new_empty(tensor.shape) for tensor in (value, *rest[:-1]))

    inputs = ", ".join(["Tensor value", "SymInt[] sizes", *(f"Tensor {name}" for name in arguments)])
    gradients = ", ".join(["Tensor"] * (1 + len(arguments)))
    define(op, f"({inputs}) -> Tensor", triton=TRITON, fake=fake, flops=partial(flops, op), backward=backward,
           setup_context=setup_context)
    define(f"{op}_backward", f"(Tensor grad, {inputs}, bool deterministic) -> ({gradients})", triton=TRITON,
           fake=fake_backward, flops=partial(backward_flops, op), backward=second, setup_context=setup_second)


_define("ms_deform_attn", ["locations", "weights"])
_define("ms_deform_attn_fused", ["reference_points", "offsets", "logits"])
