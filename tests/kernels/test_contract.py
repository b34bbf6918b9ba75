"""Every operator of every room is held to the same contract; a new room is covered without a new test."""
import shutil
import subprocess
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from icf_kernels._common.backend import INTERPRET
from icf_kernels._common.library import kernel
from icf_kernels._common.testing import (
    TARGETS,
    Calls,
    assert_as_accurate,
    forward_backward,
    map_differentiable,
    module,
    operator_function,
    operators,
    require_grad,
    results,
    why_not,
)

CSRC = Path(__file__).parents[2] / "csrc"
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may use, by architecture
every_target = pytest.mark.parametrize("device, backend", TARGETS, ids=map("-".join, TARGETS))
every_operator = pytest.mark.parametrize("room, op", [pytest.param(room, op, id=op) for room, op in operators()])
every_case = pytest.mark.parametrize("room, op, shape, dtype", [
    pytest.param(room, op, shape, dtype, id=f"{op}-{'x'.join(map(str, shape))}-{str(dtype)[6:]}")
    for room, op in operators() for cases in [module(room, "cases").CASES[op]]
    for shape in cases.shapes for dtype in cases.dtypes])
every_differentiable_operator = pytest.mark.parametrize("room, op", [
    pytest.param(room, op, id=op) for room, op in operators() if module(room, "cases").CASES[op].differentiable])


def prepare(room, op, device, backend, dtype, shape=None):
    """The function on one backend and its arguments; skips where it cannot run, and says why."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    cases = module(room, "cases").CASES[op]
    args = cases.make_inputs(shape or cases.shapes[0], dtype, device)
    if reason := why_not(room, op, backend, args):
        pytest.skip(reason)
    return operator_function(room, op, "api", backend=backend), args


@every_target
@every_case
def test_forward_and_backward_match_reference(room, op, shape, dtype, device, backend):
    function, args = prepare(room, op, device, backend, dtype, shape)
    plain = operator_function(room, op, "reference")
    exact = map_differentiable(torch.Tensor.double, args)
    assert_as_accurate(*(forward_backward(f, a, dtype) for f, a in [(function, args), (plain, args), (plain, exact)]))


@every_target
@every_operator
def test_strides_do_not_matter(room, op, device, backend):
    function, args = prepare(room, op, device, backend, torch.float32)
    strided = map_differentiable(lambda a: torch.stack([a, a], -1)[..., 0], args)
    torch.testing.assert_close(*(forward_backward(function, a, torch.float32) for a in (strided, args)))


@every_target
@every_differentiable_operator
def test_gradients_by_finite_differences(room, op, device, backend):
    function, args = prepare(room, op, device, backend, torch.float64)
    fast = backend == "triton" and device == "cpu"  # interpreted, a call takes seconds: one random direction instead
    assert torch.autograd.gradcheck(function, require_grad(args)[0], fast_mode=fast)
    with suppress(NotImplementedError):  # the second derivative is right or refused
        assert torch.autograd.gradgradcheck(function, require_grad(args)[0], fast_mode=fast)


@every_target
@every_differentiable_operator
def test_what_was_changed_before_backward_is_noticed(room, op, device, backend):
    """A gradient is that of the values that forward has seen, or refused."""
    function, args = prepare(room, op, device, backend, torch.float64)

    def gradients(place):
        moved, leaves = require_grad(args)
        inner = map_differentiable(lambda a: a * 1, moved)
        outs = [out * 1 for out in results(function, inner) if out.is_floating_point()]
        if place is not None:
            with torch.no_grad():
                inner[place].add_(0.5)
        return torch.autograd.grad(sum(out.square().sum() for out in outs), leaves)

    exact = gradients(None)
    for place in [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()]:
        try:
            torch.testing.assert_close(gradients(place), exact)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)


@every_target
@every_operator
def test_registration(room, op, device, backend):
    function, args = prepare(room, op, device, backend, torch.float32)
    with Calls() as calls:
        forward_backward(function, args, torch.float32)
    for operator, arguments in calls:
        torch.library.opcheck(operator, map_differentiable(torch.Tensor.detach, arguments))
    if backend != "reference" and module(room, "cases").CASES[op].differentiable:
        assert calls[0][0] == kernel(op, backend)
        torch.library.opcheck(calls[0][0], require_grad(calls[0][1])[0])


@every_target
@every_operator
def test_compiles_without_graph_break(room, op, device, backend):
    function, args = prepare(room, op, device, backend, torch.float32)
    torch.compiler.reset()  # one limit of compilations counts for all tests
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(forward_backward(f, args, torch.float32) for f in (compiled, function)))


@pytest.mark.skipif(INTERPRET, reason="the interpreter has taken the kernels' place")
@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("room", sorted({r for r, _ in operators() if find_spec(f"icf_kernels.{r}.triton")}))
def test_triton_compiles_without_gpu(room, arch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    for function, signature, constants in module(room, "triton").AOT:
        signature = {**signature, **dict.fromkeys(constants, "constexpr")}
        source = triton.compiler.ASTSource(fn=function, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
        assert compiled.asm["cubin"] and compiled.metadata.shared <= SHARED_MEMORY[arch]


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize("source", [pytest.param(s, id=s.stem) for s in sorted(CSRC.glob("*/*_cuda.cu"))])
def test_cuda_compiles_without_gpu(source, tmp_path):
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in SHARED_MEMORY]
    macros = ["-DUSE_CUDA", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags = ["-std=c++20", "--expt-relaxed-constexpr", "--threads=0", *archs, *macros,
             *(f"-I{p}" for p in (CSRC, *include_paths()))]
    subprocess.run(["nvcc", "-c", source, "-o", tmp_path / "out.o", *flags], check=True)
