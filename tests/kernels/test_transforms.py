"""Every function under every transform of torch.func and in forward mode: the definition's value, or an error with the
way out; never a tangent lost without a word."""
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.autograd.functional import hessian as autograd_hessian
from torch.autograd.functional import jacobian
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from icf_kernels._common import backend as backends
from icf_kernels._common.testing import module, operator_function, operators, require_grad, results
from icf_kernels.gw_contrast import api as contrast


def _wasserstein(x, y, **options):
    return contrast.gaussian_wasserstein(x[0], y[0], **options)


def _divergence(x, y, **options):
    return contrast.gaussian_wasserstein(x[0], y[0], spectral="entropic", pairs="zip", **options)


def _entropy(x, y, **options):
    return contrast.gaussian_entropy(x[0], per_dof=False, **options) + contrast.gaussian_entropy(y[0], **options)


def _contrast(x, y, **options):
    return contrast.gw_contrast(x[0], y[0], "diag", **options)


def _text_contrast(x, y, **options):
    return contrast.gw_text_contrast(x[0], y[0], torch.stack([x[0], y[0].roll(1, 0)], 1), **options)


# Functions made of operators, of the tensors that gaussian_w2 takes; contrast_positives has no derivative.
COMPOSED = {"gaussian_wasserstein": _wasserstein, "sinkhorn_divergence": _divergence, "gaussian_entropy": _entropy,
            "gw_contrast": _contrast, "gw_text_contrast": _text_contrast}
CONSTANT = {op for room, op in operators() if not module(room, "cases").CASES[op].differentiable}
FUNCTIONS = [*(op for _, op in operators()), *COMPOSED]


def prepare(name, backend=None):
    """The function from one vector, all its differentiable arguments, to one vector, all its results; and a point."""
    room, op = next(((room, op) for room, op in operators() if op == name), ("gw_contrast", "gaussian_w2"))
    cases = module(room, "cases").CASES[op]
    args = cases.make_inputs(cases.shapes[0], torch.float64, "cpu")
    if name in COMPOSED:
        args, function = args[:2], lambda *tensors: COMPOSED[name](*tensors, backend=backend)
    else:
        function = operator_function(room, op, "api", backend=backend)
    leaves = require_grad(args)[1]

    def of_vector(vector):
        parts = iter(part.view_as(leaf) for part, leaf in zip(vector.split([x.numel() for x in leaves]), leaves,
                                                              strict=True))
        moved = [next(parts) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        return torch.cat([out.reshape(-1) for out in results(function, moved) if out.is_floating_point()])

    return of_vector, torch.cat([leaf.detach().flatten() for leaf in leaves])


@cache
def by_definition(name):
    """The point, a direction there and weights of the results; value, Jacobian and Hessian of the weighted sum, all
    from gradients of gradients of the definition."""
    function, x = prepare(name, "reference")
    y, generator = function(x), torch.Generator().manual_seed(1)
    d, w = (torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (x, y))
    return x, d, w, y, jacobian(function, x), autograd_hessian(lambda x: function(x) @ w, x)


class Holder(torch.nn.Module):
    def __init__(self, function, x):
        super().__init__()
        self.function, self.x = function, torch.nn.Parameter(x)

    def forward(self, weights):
        return self.function(self.x) @ weights


def _forward_ad(f, x, d, w):
    with forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, d)))
        return torch.zeros_like(y) if tangent is None else tangent


def _through_functional_call(f, x, d, w):
    return grad(lambda x: functional_call(Holder(f, x.detach()), {"x": x}, (w,)))(x)


# What each transform makes of f at x, along d, its results weighted by w; and the same of f(x), Jacobian and Hessian.
TRANSFORMS = {
    "jvp": (lambda f, x, d, w: jvp(f, (x,), (d,))[1], lambda y, J, H, d, w: J @ d),
    "linearize": (lambda f, x, d, w: linearize(f, x)[1](d), lambda y, J, H, d, w: J @ d),
    "forward_ad": (_forward_ad, lambda y, J, H, d, w: J @ d),
    "jacfwd": (lambda f, x, d, w: jacfwd(f)(x), lambda y, J, H, d, w: J),
    "jacrev": (lambda f, x, d, w: jacrev(f)(x), lambda y, J, H, d, w: J),
    "vjp": (lambda f, x, d, w: vjp(f, x)[1](w)[0], lambda y, J, H, d, w: w @ J),
    "grad": (lambda f, x, d, w: grad(lambda x: f(x) @ w)(x), lambda y, J, H, d, w: w @ J),
    "functional_call": (_through_functional_call, lambda y, J, H, d, w: w @ J),
    "vmap": (lambda f, x, d, w: vmap(f)(x.expand(2, -1)), lambda y, J, H, d, w: y.expand(2, -1)),
    "vmap(grad)": (lambda f, x, d, w: vmap(grad(lambda x: f(x) @ w))(x.expand(2, -1)),
                   lambda y, J, H, d, w: (w @ J).expand(2, -1)),
    "functionalize": (lambda f, x, d, w: functionalize(f)(x), lambda y, J, H, d, w: y),
    "hessian": (lambda f, x, d, w: hessian(lambda x: f(x) @ w)(x), lambda y, J, H, d, w: H),
}

every_function = pytest.mark.parametrize("name", FUNCTIONS)
needs_cpp = pytest.mark.skipif(bool(backends.PROBLEM["_C"]), reason=f"icf_kernels._C {backends.PROBLEM['_C']}")
pytestmark = pytest.mark.filterwarnings("ignore:.*runs in plain PyTorch")


@pytest.mark.parametrize("transform", TRANSFORMS)
@every_function
def test_automatic_choice_gives_the_value_of_the_definition(name, transform):
    (x, d, w, *exact), (run, expected) = by_definition(name), TRANSFORMS[transform]
    torch.testing.assert_close(run(prepare(name)[0], x, d, w), expected(*exact, d, w), rtol=1e-9, atol=1e-9)


@needs_cpp
@pytest.mark.parametrize("transform", TRANSFORMS)
@every_function
def test_a_request_for_a_kernel_says_what_has_the_rule(name, transform):
    """What is constant to a transform may run on the kernel all the same."""
    (x, d, w, *exact), (run, expected) = by_definition(name), TRANSFORMS[transform]
    try:
        result = run(prepare(name, "cpp")[0], x, d, w)
    except RuntimeError as error:
        assert "backend 'cpp' was requested, but kernels have no" in str(error)
        assert "backend='reference'" in str(error)
    else:
        assert name in CONSTANT
        torch.testing.assert_close(result, expected(*exact, d, w), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted({*FUNCTIONS} - CONSTANT))
def test_forward_mode_by_finite_differences(name):
    (function, x), h = prepare(name), 1e-6
    d = by_definition(name)[1]
    _, tangent = jvp(function, (x,), (d,))
    torch.testing.assert_close(tangent, (function(x + h * d) - function(x - h * d)) / (2 * h), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3])
@every_function
def test_gradients_of_gradients_are_right_or_refused(name, order):
    """Of a nonlinear function of the results, so that every way back to the arguments counts."""
    def derivative(backend):
        function, x = prepare(name, backend)
        value = function(x.requires_grad_()).pow(3).sum()
        for _ in range(order):
            if not value.requires_grad:
                return value
            gradient, = torch.autograd.grad(value, x, create_graph=True)
            value = (gradient * torch.arange(len(x)).cos()).sum()
        return value

    expected = derivative("reference")
    try:
        torch.testing.assert_close(derivative(None), expected, rtol=1e-8, atol=1e-8)
    except NotImplementedError as error:
        assert order > 1 and "backend='reference'" in str(error)
        assert any(f"icf::{op}_backward.cpp" in str(error) for op in backends.IMPLEMENTED)


@needs_cpp
@pytest.mark.parametrize("name", sorted({*FUNCTIONS} - CONSTANT))
def test_a_backward_of_kernels_takes_batches_and_refuses_tangents(name):
    function, x = prepare(name, "cpp")
    y = function(x.requires_grad_())
    grads = torch.randn(len(y), 3, dtype=y.dtype)  # the batch last, so that no gradient of it is contiguous

    def backward(grad):
        return torch.autograd.grad(y, x, grad, retain_graph=True)[0]

    torch.testing.assert_close(vmap(backward, in_dims=1)(grads), torch.stack([backward(g) for g in grads.unbind(1)]))
    ones = torch.ones_like(y)
    for lost in (lambda: jvp(backward, (ones,), (ones,)), lambda: vmap(grad(lambda g: backward(g).sum()))(grads.mT)):
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative.*backend='reference'"):
            lost()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="backend='reference'"):
        backward(forward_ad.make_dual(ones, ones))


@needs_cpp
@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap", "forward_ad"])
def test_a_compiled_function_is_no_exception(transform):
    (x, d, w, *exact), (run, expected) = by_definition("gaussian_w2"), TRANSFORMS[transform]
    function = prepare("gaussian_w2")[0]
    torch.compiler.reset()
    compiled = torch.compile(lambda x: run(function, x, d, w), backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected(*exact, d, w), rtol=1e-9, atol=1e-9)


@needs_cpp
def test_without_a_tangent_or_a_transform_kernels_run():
    """An open level of forward mode, or a module called by functional_call, changes nothing by itself."""
    function, x = prepare("gram_schmidt", "cpp")
    with forward_ad.dual_level():
        torch.testing.assert_close(function(x), by_definition("gram_schmidt")[3])
    holder, w = Holder(function, x), by_definition("gram_schmidt")[2]
    torch.testing.assert_close(functional_call(holder, {"x": 2 * x}, (w,)), by_definition("gram_schmidt")[3] @ w)


def test_a_group_is_gathered_with_gradients_alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x = torch.randn(3, 2, 4)
        with pytest.raises(RuntimeError, match="gw_contrast: .*need group=None"):
            jvp(lambda x: contrast.gw_contrast(x, x, group=dist.group.WORLD), (x,), (x,))
    finally:
        dist.destroy_process_group()
