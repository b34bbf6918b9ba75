"""Registration: schemas, shapes, gradients, limits. Imports torch only."""
import torch

from .._common import backend as backends
from .._common.library import call, define

TRITON = "icf_kernels.gram_schmidt.triton"
WIDEST = {"cuda": {"orthogonal_blend": 1024, "orthogonal_directions": 4096},  # elements of a row, held in registers or
          "triton": {"orthogonal_blend": 8192, "orthogonal_directions": 8192}}  # shared memory


def _check_width(op, backend, x):
    widest = WIDEST[backend].get(op)
    if widest is None or x.shape[-1] <= widest:
        return True, ""
    return False, f"it holds rows of at most {widest} elements, got {x.shape[-1]}"


def can_run_cuda(op, x, *_):
    ok, reason = backends.can_run_cuda(op, x)
    return _check_width(op, "cuda", x) if ok else (ok, reason)


def can_run_triton(op, x, *_):
    if op not in WIDEST["triton"]:
        return False, f"{op} has no Triton kernel"
    if x.dtype == torch.float64:
        return False, "its Triton kernel computes in float32, got float64"
    ok, reason = backends.can_run_triton(op, x)
    return _check_width(op, "triton", x) if ok else (ok, reason)


CAN_RUN = {**backends.CAN_RUN, "cuda": can_run_cuda, "triton": can_run_triton}


def _blend_setup(ctx, inputs, output):
    z, ratio, noise, ctx.options = inputs
    ctx.save_for_backward(z, ratio, noise)


def _blend_backward(ctx, backend, grad):
    grads = call("orthogonal_blend_backward", backend, grad.contiguous(), *ctx.saved_tensors, ctx.options)
    return *grads, None, None


def _gram_schmidt_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output)
    ctx.dtype = inputs[0].dtype


def _gram_schmidt_backward(ctx, backend, grad, _):
    grad = call("gram_schmidt_backward", backend, grad.contiguous(), *ctx.saved_tensors)
    return grad.to(ctx.dtype), None, None, None


def _wide_like(x, shape):
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


# noise: the noise, or the seed of it, as options[0] says: 0 gaussian, 1 rademacher, 2 given. options[1:]: output rows
# that share a row of z, rows after them, whether the norm is restored. One list, as each argument costs microseconds.
BLEND = "Tensor z, Tensor ratio, Tensor noise, SymInt[] options"
define("orthogonal_blend", f"({BLEND}) -> Tensor", triton=TRITON,
       fake=lambda z, ratio, *_: z.new_empty((*ratio.shape, z.shape[-1])),
       backward=_blend_backward, setup_context=_blend_setup)
define("orthogonal_blend_backward", f"(Tensor grad, {BLEND}) -> (Tensor, Tensor)", triton=TRITON,
       fake=lambda grad, z, ratio, *_: (torch.empty_like(z), torch.empty_like(ratio)))
define("gram_schmidt", "(Tensor vectors, float rank_tol, float threshold, bool keep_l) -> (Tensor, Tensor)",
       fake=lambda x, _, __, keep_l: (_wide_like(x, x.shape),
                                      _wide_like(x, (*x.shape[:-1], x.shape[-2]) if keep_l else 0)),
       backward=_gram_schmidt_backward, setup_context=_gram_schmidt_setup)
define("gram_schmidt_backward", "(Tensor grad, Tensor q, Tensor l) -> Tensor",
       fake=lambda grad, q, _: torch.empty_like(q))
define("orthogonal_directions", "(Tensor z, Tensor seed, SymInt k) -> Tensor", triton=TRITON,
       fake=lambda z, seed, k: z.new_empty((*z.shape[:-1], k, z.shape[-1])))
define("philox_noise", "(Tensor seed, SymInt[] shape, int kind) -> Tensor",
       fake=lambda seed, shape, kind: seed.new_empty(shape, dtype=torch.float32))
