"""Operators in compiled and exported programs: torch.export, symbolic sizes, AOTInductor, ONNX."""
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

from icf.ops import MSDeformAttn, ms_deform_attn, ms_deform_attn_fused
from icf_kernels._common.testing import forward_backward, module, operator_function, operators, results

every_operator = pytest.mark.parametrize("room, op", [pytest.param(room, op, id=op) for room, op in operators()])
modes = pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
SIZES = [(6, 10), (3, 5)]
OTHER_SIZES = [(5, 12), (5, 3)]  # as many pixels
BATCH, QUERIES = Dim("batch", max=64), Dim("queries", max=999)
H1, W1, H2, W2 = (Dim(name, min=2, max=64) for name in ("h1", "w1", "h2", "w2"))
ANY = {"query": {0: BATCH, 1: QUERIES}, "points": {0: BATCH, 1: QUERIES},
       "maps": ({0: BATCH, 2: H1, 3: W1}, {0: BATCH, 2: H2, 3: W2})}  # what may differ from the inputs of an export


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class OfMaps(nn.Module):
    """A layer whose sizes are those of its maps, as a detector computes them."""

    def __init__(self):
        super().__init__()
        self.layer = MSDeformAttn(32, 2, 4, 3)
        nn.init.normal_(self.layer.sampling_offsets.weight, std=0.1)
        nn.init.normal_(self.layer.attention_weights.weight)

    def forward(self, query, points, *maps):
        pixels = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
        return self.layer(query, points, pixels, [m.shape[-2:] for m in maps])


def inputs(B, Q, sizes):
    return torch.randn(B, Q, 32), torch.rand(B, Q, 2, 2), *(torch.randn(B, 32, h, w) for h, w in sizes)


def case(room, op):
    cases = module(room, "cases").CASES[op]
    return operator_function(room, op, "api"), cases.make_inputs(cases.shapes[0], torch.float32, "cpu")


@modes
@every_operator
def test_exported_operators_give_the_same(room, op, strict):
    function, args = case(room, op)
    program = export(Function(function), tuple(args), strict=strict)
    torch.testing.assert_close(tuple(results(program.module(), args)), tuple(results(function, args)))


@every_operator
def test_compiled_for_any_size(room, op):
    """Within seconds: where lists of whole symbolic shapes were compared, all their combinations were gone through."""
    function, cases = operator_function(room, op, "api"), module(room, "cases").CASES[op]
    args = cases.make_inputs(cases.shapes[1], torch.float32, "cpu")
    torch.compiler.reset()
    compiled = torch.compile(function, dynamic=True, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(forward_backward(f, args, torch.float32) for f in (compiled, function)))


@modes
def test_exported_for_any_batch_and_size_of_maps(strict):
    model = OfMaps()
    program = export(model, inputs(4, 7, SIZES), strict=strict, dynamic_shapes=ANY)
    other = inputs(2, 9, [(8, 4), (7, 3)])
    torch.testing.assert_close(program.module()(*other), model(*other))


def test_compiled_once_for_any_size_of_maps():
    torch.compiler.reset()
    model, counter = OfMaps(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=counter)
    for args in (inputs(7, 11, [(6, 10), (3, 5)]), inputs(5, 9, [(8, 12), (4, 6)])):
        torch.testing.assert_close(compiled(*args), model(*args))
    assert counter.frame_count == 1


@modes
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_exported_with_sizes_as_a_tensor(strict, fused):
    """The sizes are read when the program runs, and those that do not fit are refused then."""
    function = ms_deform_attn_fused if fused else ms_deform_attn
    cases = module("ms_deform_attn", "cases").CASES[function.__name__]
    value, _, *rest = cases.make_inputs((2, 7, 2, 8, 3, *sum(SIZES, ()), "apart"), torch.float32, "cpu")
    shapes = ({1: Dim("pixels", min=4, max=9999)}, *[None] * (1 + len(rest)))
    program = export(Function(function), (value, torch.tensor(SIZES), *rest), strict=strict,
                     dynamic_shapes=(shapes,)).module()
    for sizes in (SIZES, OTHER_SIZES, [(6, 9), (4, 2)]):
        part = value[:, :sum(h * w for h, w in sizes)]
        torch.testing.assert_close(program(part, torch.tensor(sizes), *rest), function(part, sizes, *rest))
    with pytest.raises(RuntimeError, match="(?i)eq|spatial_shapes must be"):
        program(value, torch.tensor([(6, 10), (3, 4)]), *rest)


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_aot_inductor(tmp_path):
    """All operators as one program, as a compilation takes 5 to 40 s."""
    functions, arguments = zip(*(case(room, op) for room, op in operators()), strict=True)

    def together(arguments):
        return [out for f, args in zip(functions, arguments, strict=True) for out in results(f, args)]

    program = export(Function(together), (arguments,))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "operators.pt2"))
    torch.testing.assert_close(list(torch._inductor.aoti_load_package(package)(arguments)), together(arguments))


class OfTensor(nn.Module):
    """The layer with the sizes as a tensor."""

    def __init__(self):
        super().__init__()
        self.layer = OfMaps().layer

    def forward(self, query, points, pixels, sizes):
        return self.layer(query, points, pixels, sizes)


def assert_onnx_gives_the_same(model, seen, others, path, **options):
    """Exports with the inputs `seen`, after a run with them, and runs with `others`, in onnxruntime and in PyTorch."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model.eval()(*seen)
    torch.onnx.export(model, seen, path, verbose=False, **options)
    session = runtime.InferenceSession(path)
    for args in (seen, *others):
        feed = {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)}
        actual = torch.from_numpy(session.run(None, feed)[0])
        torch.testing.assert_close(actual, model(*args).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_onnx_by_the_old_exporter(tmp_path):
    assert_onnx_gives_the_same(OfMaps(), inputs(2, 7, SIZES), [], tmp_path / "layer.onnx", dynamo=False)


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_any_batch_and_size_of_maps(tmp_path):
    assert_onnx_gives_the_same(OfMaps(), inputs(4, 7, SIZES), [inputs(2, 9, [(8, 4), (7, 3)])],
                               tmp_path / "layer.onnx", dynamo=True, dynamic_shapes=ANY)


@pytest.mark.filterwarnings("ignore")
def test_onnx_with_sizes_as_a_tensor(tmp_path):
    query, points, *maps = inputs(2, 7, SIZES)
    pixels = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
    seen, other = ((query, points, pixels, torch.tensor(sizes)) for sizes in (SIZES, OTHER_SIZES))
    assert_onnx_gives_the_same(OfTensor(), seen, [other], tmp_path / "layer.onnx", dynamo=True)


class OfFixedSizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = OfMaps().layer

    def forward(self, query, points, pixels):
        return self.layer(query, points, pixels, SIZES)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_needs_no_operator_of_ours(tmp_path):
    query, points, *maps = inputs(2, 7, SIZES)
    model, args = OfFixedSizes().eval(), (query, points, torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1))
    with torch.no_grad():
        expected = model(*args)
        torch.jit.trace(model, args).save(tmp_path / "layer.pt")
        loaded = torch.jit.load(tmp_path / "layer.pt")
        torch.testing.assert_close(loaded(*args), expected)
    assert "icf::" not in str(loaded.inlined_graph)
