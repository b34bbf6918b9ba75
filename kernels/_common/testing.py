"""What the tests and benchmarks of all rooms share."""
import importlib
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .backend import CUDA_DEVICE, EMULATED, rooms

# What is watched by sanitizers, emulated, or compiled for the oldest x86-64, sums without vectors or multiply-adds, and
# so less exactly.
PLAIN_BUILD = re.compile(r"-fsanitize|the compiler's default target")
LOOSER = 4 if EMULATED or PLAIN_BUILD.search(getattr(sys.modules.get("icf_kernels._C"), "built_with", "")) else 1

# What to test operators on: the device of the tensors, and the backend.
TARGETS = [("cpu", "reference"), ("cpu", "cpp"), ("cpu", "triton"), (CUDA_DEVICE, "cuda"), ("cuda", "triton")]


class Cases(NamedTuple):
    """What to try an operator on. `shapes` and the values of `benchmarks` are what `make_inputs` makes of them."""

    make_inputs: Callable  # (shape, dtype, device) -> arguments, the same numbers on every device
    shapes: list  # the first, a small one, is also differentiated numerically
    benchmarks: dict
    dtypes: tuple = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    keywords: tuple = ()  # names of the last arguments, where the function takes them by name only
    differentiable: bool = True  # False for results that are constants


def module(room, name):
    return importlib.import_module(f"icf_kernels.{room}.{name}")


def operators():
    """The operators of all rooms, as (room, operator)."""
    return [(room, op) for room in rooms() for op in module(room, "cases").CASES]


def operator_function(room, op, name, **options):
    """An operator as in one of the room's modules, `api` or `reference`, taking the arguments that its cases make."""
    keywords, target = module(room, "cases").CASES[op].keywords, getattr(module(room, name), op)

    def call(*args):
        first = len(args) - len(keywords)
        return target(*args[:first], **dict(zip(keywords, args[first:], strict=True)), **options)

    return call


def why_not(room, op, backend, args):
    """Why a backend cannot run these arguments here, '' if it can."""
    ok, reason = module(room, "ops").CAN_RUN[backend](op, *args)
    return "" if ok else reason


def map_differentiable(change, args):
    return [change(a) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def require_grad(args):
    """The arguments anew, what is differentiable of them as leaves, and the list of those leaves."""
    args = map_differentiable(lambda a: a.detach().requires_grad_(), args)
    return args, [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]


def results(function, args):
    outs = function(*args)
    return outs if isinstance(outs, tuple) else (outs,)


def forward_backward(function, args, dtype):
    """Results and gradients. The incoming gradients are rounded to `dtype`, whatever the arguments' own."""
    args, leaves = require_grad(args)
    outs = results(function, args)
    differentiable = [o for o in outs if o.requires_grad]
    if not differentiable:
        return list(outs)
    grads = [torch.arange(o.numel(), device=o.device).cos().view_as(o).to(dtype).to(o) for o in differentiable]
    return [*outs, *torch.autograd.grad(differentiable, leaves, grads, materialize_grads=True)]


def assert_as_accurate(actual, plain, exact):
    """`actual` may be off from `exact`, in float64, twice as far as `plain`, PyTorch in the dtype of `actual`.

    In float64 these two are one, rounding errors included, so more is left to another order of summation.
    """
    for got, same, true in zip(actual, plain, exact, strict=True):
        assert (got.shape, got.dtype, got.device) == (same.shape, same.dtype, same.device)
        if got.numel():
            error, plain_error = (got - true).abs().max(), (same - true).abs().max()
            rounding = (64 if got.dtype == torch.float64 else 8) * torch.finfo(got.dtype).eps
            assert error <= 2 * plain_error + rounding * true.abs().max(), (error, plain_error)


class Calls(TorchDispatchMode, list):
    """Collects the calls of our operators, in a forward and its backward, as (operator, arguments)."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "icf":
            self.append((function, args))
        return function(*args, **kwargs or {})
