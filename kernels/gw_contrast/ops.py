"""Registration: schemas, shapes, gradient, operation counts, limits. Imports torch only."""
import torch

from .._common import backend as backends
from .._common.library import call, define

TRITON = "icf_kernels.gw_contrast.triton"


MAX_FRAMES = 49  # a matrix per warp has to fit into shared memory
MANY_FRAMES = 64  # of the shorter side, above which LAPACK's singular values are faster than rotations in C++
MANY_INVERTED = 128  # of the longer side, above which its inverses are, where there are entropies


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


def avoid(backend, x, y, x_mask, y_mask, spectral, regularization, eps):
    """Why the automatic choice passes by a backend that can run, or ''."""
    shorter, longer = min(x.shape[2], y.shape[2]), max(x.shape[2], y.shape[2])  # sort() is not traced
    if backend == "cpp" and (shorter > MANY_FRAMES or (eps and longer > MANY_INVERTED)):
        return f"plain PyTorch is faster for this many frames, got {shorter} and {longer}"
    return ""


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


FRAME = 6  # operations an element of a frame: the first frame subtracted, two running sums, a row of the factor


def _flops(x, y, x_mask, y_mask, spectral, regularization, eps, polar=True):
    """Factors and traces of each sample; products, means and singular values of each pair; with a gradient singular
    vectors, and with entropies Gram matrices and their Cholesky factors. Decompositions as in Golub and Van Loan,
    Matrix Computations, for bidiagonalisation after QR, whatever the kernel does."""
    (N, Bx, Tx, d), (_, By, Ty, _) = x, y
    m, n = Tx - 1, Ty - 1
    small, large = sorted((m, n))
    samples = sum(B * (FRAME * T * d + 2 * (T - 1) * d) for B, T in ((Bx, Tx), (By, Ty)))
    if eps:
        samples += sum(B * (k * k * d + k**3 // 3 + (k**3 if polar else 0)) for B, k in ((Bx, m), (By, n)))
    singular = 8 * large * small**2 + 11 * small**3 if polar else 2 * large * small**2 + 2 * small**3
    return N * (samples + Bx * By * (2 * m * n * d + 3 * d + singular))


def _backward_flops(grad, grad_x_entropy, grad_y_entropy, x, y, x_mean, y_mean, x_factor, y_factor, x_inverse,
                    *others):
    """Weighted polar factors times the factors of x and of y, differences of means, and entropies, if there were."""
    (N, Bx, Tx, d), (_, By, Ty, _) = x, y
    m, n = Tx - 1, Ty - 1
    samples = sum(FRAME * B * T * d for B, T in ((Bx, Tx), (By, Ty)))
    if len(x_inverse) > 1:
        samples += sum(2 * B * k * k * d for B, k in ((Bx, m), (By, n)))
    return N * (samples + Bx * By * (m * n + 4 * m * n * d + 5 * d))


define("gaussian_w2", "(Tensor x, Tensor y, Tensor? x_mask, Tensor? y_mask, str spectral, float regularization, "
       "float eps, bool polar=True) -> (" + ", ".join(["Tensor"] * 10) + ")",
       triton=TRITON, fake=_fake, flops=_flops, backward=_backward, setup_context=_setup_context, seen=3)
define("gaussian_w2_backward", "(Tensor grad_distance, Tensor grad_x_entropy, Tensor grad_y_entropy, Tensor x, "
       "Tensor y, Tensor x_mean, Tensor y_mean, Tensor x_factor, Tensor y_factor, Tensor x_inverse, "
       "Tensor y_inverse, Tensor polar, Tensor? x_mask, Tensor? y_mask) -> (Tensor, Tensor)",
       triton=TRITON, fake=_fake_backward, flops=_backward_flops)


def _fake_contrast(x, y, x_mask, y_mask, positives, ignored, spectral, regularization, eps, scale, gamma, entropy,
                   symmetric, polar):
    outs = _fake(x[None], y[None], None, None, spectral, regularization, eps, polar)
    return outs[0].new_empty(()), *outs


def _contrast_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], *output[1:], *inputs[2:4])  # x and y, so that a second derivative is refused
    ctx.mark_non_differentiable(*output[1:])


def _contrast_backward(ctx, backend, grad, *_):
    return *call("gw_contrast_backward", backend, grad, *ctx.saved_tensors), *[None] * 12


def _contrast_flops(x, y, x_mask, y_mask, positives, ignored, spectral, regularization, eps, *others):
    """Beside the distances, for each pair in its row and in its column: logit, two exponentials, sums and shares."""
    symmetric, polar = others[-2:]
    return (_flops((1, *x), (1, *y), None, None, spectral, regularization, eps, polar)
            + (16 if symmetric else 8) * x[0]**2)


# gaussian_w2 and the loss over it in one call, where a backend has that: what surrounds small batches takes longest.
# scale: logits over distances, 1 / tau or less that; positives: the diagonal where not given.
define("gw_contrast", "(Tensor x, Tensor y, Tensor? x_mask, Tensor? y_mask, Tensor? positives, Tensor? ignored, "
       "str spectral, float regularization, float eps, float scale, float gamma, str entropy, bool symmetric, "
       "bool polar) -> (" + ", ".join(["Tensor"] * 11) + ")", fake=_fake_contrast, flops=_contrast_flops,
       backward=_contrast_backward, setup_context=_contrast_setup, seen=1)
define("gw_contrast_backward", "(Tensor grad, Tensor x, Tensor y, Tensor grad_distance, Tensor grad_x_entropy, "
       "Tensor grad_y_entropy, Tensor x_mean, Tensor y_mean, Tensor x_factor, Tensor y_factor, Tensor x_inverse, "
       "Tensor y_inverse, Tensor polar, Tensor? x_mask, Tensor? y_mask) -> (Tensor, Tensor)",
       fake=lambda grad, x, y, *_: (torch.empty_like(x), torch.empty_like(y)),
       flops=lambda grad, x, y, gd, gx, gy, *saved: _backward_flops(gd, gx, gy, (1, *x), (1, *y), *saved))
