"""Registration: schemas, shapes, gradients, operation counts, limits. Imports torch only."""
import math

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


def _gram_schmidt_backward(ctx, backend, grad, *_):
    grad = call("gram_schmidt_backward", backend, grad.contiguous(), *ctx.saved_tensors)
    return grad.to(ctx.dtype), None, None, None


def _wide_like(x, shape):
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


NOISE = 21, 0, 0  # operations an element that is drawn: Box-Muller by polynomials, signs, given


def _blend_flops(z, ratio, noise, options):
    """z.z for each row of z; r.z, r.r and a combination of z and the noise r for each of the result."""
    return 2 * math.prod(z) + math.prod(ratio) * z[-1] * (7 + NOISE[options[0]])


def _blend_backward_flops(grad, *blend):
    """The same sums, two with the gradient, and a combination of three."""
    return _blend_flops(*blend) + 6 * math.prod(grad)


def _gram_schmidt_flops(vectors, rank_tol, threshold, keep_l):
    """Each row: its norm before and after, and its products with the rows before it, which are then subtracted; twice
    where it is always projected a second time."""
    *batch, n, d = vectors
    return math.prod(batch) * (5 * n * d + 2 * n * (n - 1) * d * (2 if threshold == math.inf else 1))


def _gram_schmidt_backward_flops(grad, q, factor):
    """G Q^T, its product with Q, and the solution of a triangular system, for each of its d columns n^2 operations."""
    *batch, n, d = q
    return math.prod(batch) * 5 * n * n * d


def _directions_flops(z, seed, k):
    """z normalised and given signs, its fast Hadamard transform, and k + 1 rows to which a multiple of w is added."""
    return math.prod(z) * (4 + z[-1].bit_length() - 1 + 2 * (k + 1))


# noise: the noise, or the seed of it, as options[0] says: 0 gaussian, 1 rademacher, 2 given. options[1:]: output rows
# that share a row of z, rows after them, whether the norm is restored. One list, as each argument costs microseconds.
BLEND = "Tensor z, Tensor ratio, Tensor noise, SymInt[] options"
define("orthogonal_blend", f"({BLEND}) -> Tensor", triton=TRITON,
       fake=lambda z, ratio, *_: z.new_empty((*ratio.shape, z.shape[-1])),
       flops=_blend_flops, backward=_blend_backward, setup_context=_blend_setup)
define("orthogonal_blend_backward", f"(Tensor grad, {BLEND}) -> (Tensor, Tensor)", triton=TRITON,
       fake=lambda grad, z, ratio, *_: (torch.empty_like(z), torch.empty_like(ratio)),
       flops=_blend_backward_flops)
define("gram_schmidt", "(Tensor vectors, float rank_tol, float threshold, bool keep_l) -> (Tensor, Tensor)",
       fake=lambda x, _, __, keep_l: (_wide_like(x, x.shape),
                                      _wide_like(x, (*x.shape[:-1], x.shape[-2]) if keep_l else 0)),
       flops=_gram_schmidt_flops, backward=_gram_schmidt_backward, setup_context=_gram_schmidt_setup, seen=1)
define("gram_schmidt_backward", "(Tensor grad, Tensor q, Tensor l) -> Tensor",
       fake=lambda grad, q, _: torch.empty_like(q), flops=_gram_schmidt_backward_flops)
define("orthogonal_directions", "(Tensor z, Tensor seed, SymInt k) -> Tensor", triton=TRITON,
       fake=lambda z, seed, k: z.new_empty((*z.shape[:-1], k, z.shape[-1])),
       flops=_directions_flops)
define("philox_noise", "(Tensor seed, SymInt[] shape, int kind) -> Tensor",
       fake=lambda seed, shape, kind: seed.new_empty(shape, dtype=torch.float32),
       flops=lambda seed, shape, kind: math.prod(shape) * NOISE[kind])
