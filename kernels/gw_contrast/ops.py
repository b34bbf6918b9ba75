"""Registration: schemas, shapes, gradient, limits. Imports torch only."""
import torch

from .._common import backend as backends
from .._common.library import call, define

TRITON = "icf_kernels.gw_contrast.triton"


MAX_FRAMES = 49  # a matrix per warp has to fit into shared memory


def _limited(name, check):
    def can_run(op, x, y, x_mask, y_mask, spectral, regularization, eps):
        if spectral == "eps":
            return False, "spectral='eps' is a reference for tests, computed in plain PyTorch"
        if name == "triton" and x.dtype == torch.float64:
            return False, "its Triton kernels compute in float32, got float64"
        if name in ("cuda", "triton") and max(x.shape[2], y.shape[2]) > MAX_FRAMES:
            return False, f"takes up to {MAX_FRAMES} frames on a GPU, got {x.shape[2]} and {y.shape[2]}"
        return check(op, x)
    return can_run


CAN_RUN = {name: check if name == "reference" else _limited(name, check) for name, check in backends.CAN_RUN.items()}


def _fake(x, y, x_mask, y_mask, spectral, regularization, eps, polar=True):
    (N, Bx, Tx, d), (_, By, Ty, _) = x.shape, y.shape
    m, n, dtype = Tx - 1, Ty - 1, torch.float64 if x.dtype == torch.float64 else torch.float32

    def new(*shape):
        return x.new_empty(shape, dtype=dtype)

    inverse = (new(N, Bx, m, m), new(N, By, n, n)) if eps else (new(0), new(0))
    return (new(N, Bx, By), new(N, Bx), new(N, By), new(N, Bx, d), new(N, By, d), new(N, Bx, m, d), new(N, n, By, d),
            *inverse, new(N, Bx, m, n, By) if polar else new(0))


def _fake_backward(grad, grad_x_entropy, grad_y_entropy, x, y, *saved):
    return torch.empty_like(x), torch.empty_like(y)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], *output[3:], *inputs[2:4])  # x and y, so that a second derivative is refused
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)
    ctx.shapes = [out.shape for out in output[:3]]


def _backward(ctx, backend, *grads):
    mean = ctx.saved_tensors[2]
    grads = [mean.new_zeros(shape) if grad is None else grad.contiguous()
             for grad, shape in zip(grads, ctx.shapes, strict=False)]
    return *call("gaussian_w2_backward", backend, *grads, *ctx.saved_tensors), *[None] * 6


define("gaussian_w2", "(Tensor x, Tensor y, Tensor? x_mask, Tensor? y_mask, str spectral, float regularization, "
       "float eps, bool polar=True) -> (" + ", ".join(["Tensor"] * 10) + ")",
       triton=TRITON, fake=_fake, backward=_backward, setup_context=_setup_context)
define("gaussian_w2_backward", "(Tensor grad_distance, Tensor grad_x_entropy, Tensor grad_y_entropy, Tensor x, "
       "Tensor y, Tensor x_mean, Tensor y_mean, Tensor x_factor, Tensor y_factor, Tensor x_inverse, "
       "Tensor y_inverse, Tensor polar, Tensor? x_mask, Tensor? y_mask) -> (Tensor, Tensor)",
       triton=TRITON, fake=_fake_backward)
