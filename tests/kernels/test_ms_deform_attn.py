"""What is particular to deformable attention: geometry, the outside, layouts, types, threads, other projects' calls."""
import ctypes
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear

from icf.ops import MSDeformAttn, ms_deform_attn, ms_deform_attn_fused
from icf_kernels._common.backend import CUDA_DEVICE, INTERPRET
from icf_kernels._common.testing import (
    LOOSER,
    Calls,
    assert_as_accurate,
    forward_backward,
    map_differentiable,
    module,
    operator_function,
    require_grad,
    why_not,
)
from icf_kernels.ms_deform_attn import reference
from icf_kernels.ms_deform_attn.cases import by_grid_sample, composed, make_inputs

SIZES = [(6, 5), (3, 4), (2, 2)]
S = sum(h * w for h, w in SIZES)
DEVICES = {"cuda": CUDA_DEVICE, "cpp": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu",
           "reference": "cpu"}


@pytest.fixture(params=DEVICES)
def backend(request):
    if DEVICES[request.param] == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if reason := why_not("ms_deform_attn", "ms_deform_attn", request.param,
                         inputs(torch.float32, DEVICES[request.param])):
        pytest.skip(reason)
    return request.param


def inputs(dtype=torch.float32, device="cpu", D=8, points="apart", fused=False):
    return make_inputs((2, 7, 2, D, 3, *sum(SIZES, ()), points), dtype, device, fused)


def needs(backend, dtype):
    if reason := why_not("ms_deform_attn", "ms_deform_attn", backend, inputs(dtype, DEVICES[backend])):
        pytest.skip(reason)


def test_definition_agrees_with_grid_sample():
    args = inputs(torch.float64)
    torch.testing.assert_close(*(forward_backward(f, args, torch.float64)
                                 for f in (reference.ms_deform_attn, by_grid_sample)))


@pytest.mark.parametrize("points", ["apart", "boxes"])
def test_fused_is_plain_on_composed_inputs(backend, points):
    needs(backend, torch.float64)
    args = inputs(torch.float64, DEVICES[backend], points=points, fused=True)
    torch.testing.assert_close(*(forward_backward(f, args, torch.float64) for f in (
        lambda *a: ms_deform_attn_fused(*a, backend=backend), lambda *a: by_grid_sample(*composed(*a)))))


@pytest.mark.parametrize("D", [2, 30, 32, 64, 71, 1025, 2048, 3096])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_gradients_at_any_head_size(backend, D, fused):
    needs(backend, torch.float64)
    args = make_inputs((1, 2, 2, D, 2, 3, 2, 2, 1, "apart"), torch.float64, DEVICES[backend], fused)
    function = ms_deform_attn_fused if fused else ms_deform_attn
    assert torch.autograd.gradcheck(lambda *a: function(*a, backend=backend), require_grad(args)[0], fast_mode=True)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_float32_error_is_at_most_1e_6(backend, fused):
    if backend == "reference" or INTERPRET:
        pytest.skip("rounds pixel coordinates, for lack of a fused multiply-add")
    args = make_inputs((2, 77, 8, 32, 4, 28, 28, 14, 14, 7, 7, "uniform"), torch.float32, DEVICES[backend], fused)
    function, truth = ((ms_deform_attn_fused, reference.ms_deform_attn_fused) if fused else
                       (ms_deform_attn, reference.ms_deform_attn))
    exact = truth(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
    assert (function(*args, backend=backend) - exact).abs().max() <= LOOSER * 1e-6 * exact.abs().max()


@pytest.mark.parametrize("far", [float("nan"), float("inf"), -float("inf"), 1e30, -3.0, 5.0, 2.0**31, -(2.0**63)])
def test_what_is_outside_counts_as_zero(backend, far):
    value, _, _, locations, weights = inputs(device=DEVICES[backend])
    padded = torch.full((2, S + 20, 2, 8), float("nan"), device=value.device)  # what lies around value is poison
    padded[:, 10:-10] = value
    inside = locations.clone()
    locations[:, 1, :, 1, :, 0] = far
    locations[:, 2, :, 0, 2, 1] = far
    silent = weights.clone()
    silent[:, 1, :, 1] = 0
    silent[:, 2, :, 0, 2] = 0

    def grads(value, locations, weights):
        return forward_backward(lambda *a: ms_deform_attn(a[0], SIZES, None, *a[1:], backend=backend),
                                (value, locations, weights), torch.float32)

    out, grad_value, grad_locations, grad_weights = grads(padded[:, 10:-10], locations, weights)
    expected = grads(value, inside, silent)
    torch.testing.assert_close((out, grad_value), tuple(expected[:2]))
    assert not grad_locations[:, 1, :, 1].any() and not grad_weights[:, 2, :, 0, 2].any()
    assert all(tensor.isfinite().all() for tensor in (grad_locations, grad_weights))


SAMPLE_ON_HOST = """
#include "ms_deform_attn/ms_deform_attn_math.h"
using namespace icf::msda;
extern "C" {
// in: raw coordinates, reference points, box sizes, extents, all (x, y); out: pixels, fractions, four weights
void sample(const double* in, double P, int32_t start, double* out, int32_t* rows) {
  const Axis<double> x = axis_of_offset(in[6], in[2], in[4] > 0 ? box_scale(in[6], in[4], P) : 1);
  const Axis<double> y = axis_of_offset(in[7], in[3], in[5] > 0 ? box_scale(in[7], in[5], P) : 1);
  const double floor_x = whole_pixel(in[0], x.scale, x.base), left = floor_x + x.cell;
  const double floor_y = whole_pixel(in[1], y.scale, y.base), top = floor_y + y.cell;
  const bool touches = touches_map(left, in[6]) & touches_map(top, in[7]);
  const int32_t column = touches ? int32_t(left) : 0, line = touches ? int32_t(top) : 0;
  corner_rows(touches, column, line, int32_t(in[6]), int32_t(in[7]), start, rows);
  out[0] = left, out[1] = top;
  out[2] = fraction_of_pixel(in[0], x.scale, x.base, floor_x);
  out[3] = fraction_of_pixel(in[1], y.scale, y.base, floor_y);
  corner_weights(out[2], out[3], 1.0, out[4], out[5], out[6], out[7]);
}
// in: four dot products, fractions, weight; out: gradients
void gradient(const double* in, double* out) {
  sample_gradient(in[0], in[1], in[2], in[3], in[4], in[5], in[6], out[0], out[1], out[2]);
}
// of two logits: weights, and the gradients where that of the first weight is one
void softmax_of_two(const double* logits, double* out) {
  const double largest = std::fmax(logits[0], logits[1]);
  const double sum = softmax_weight(logits[0], largest, 1.0) + softmax_weight(logits[1], largest, 1.0);
  for (int i = 0; i < 2; ++i) out[i] = softmax_weight(logits[i], largest, 1 / sum);
  for (int i = 0; i < 2; ++i) out[2 + i] = logit_gradient(out[i], i == 0 ? 1.0 : 0.0, out[0]);
}
}
"""


@pytest.fixture(scope="module")
def device_arithmetic(tmp_path_factory):
    """What the threads of the CUDA kernels compute, as a library for the host."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    library = tmp_path_factory.mktemp("host") / "sample.so"
    csrc = Path(__file__).parents[2] / "csrc"
    subprocess.run(["g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{csrc}", "-x", "c++", "-", "-o", library],
                   input=SAMPLE_ON_HOST, text=True, check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


H, W, START = 5, 7, 11  # of a map and its first row in value


def sample_on_host(library, raw, point=(0.4, 0.7), box=(0.0, 0.0)):
    given = torch.tensor([*raw, *point, *box, W, H], dtype=torch.float64)
    out, rows = torch.empty(8, dtype=torch.float64), torch.empty(4, dtype=torch.int32)
    library.sample(pointer(given), ctypes.c_double(3), START, pointer(out), pointer(rows))
    return out, rows.tolist()


@pytest.mark.parametrize("box", [(0.0, 0.0), (0.3, 0.6)], ids=["points", "boxes"])
def test_device_arithmetic_of_a_sample(device_arithmetic, box):
    scale = (box[0] * W / 6, box[1] * H / 6) if box[0] else (1, 1)
    for left in range(-3, W + 2):
        for top in range(-3, H + 2):
            x, y = left + 0.25, top + 0.625
            raw = (x + 0.5 - 0.4 * W) / scale[0], (y + 0.5 - 0.7 * H) / scale[1]
            out, rows = sample_on_host(device_arithmetic, raw, box=box)
            inside = [START + v * W + u if 0 <= u < W and 0 <= v < H else -1
                      for v in (top, top + 1) for u in (left, left + 1)]
            assert rows == inside
            expected = [left, top, 0.25, 0.625, 0.75 * 0.375, 0.25 * 0.375, 0.75 * 0.625, 0.25 * 0.625]
            torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("far", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
def test_device_arithmetic_reads_nothing_far_away(device_arithmetic, far):
    for raw, point in (((far, 0), (0.4, 0.7)), ((0, far), (0.4, 0.7)), ((0, 0), (far, 0.7)), ((0, 0), (0.4, far))):
        assert sample_on_host(device_arithmetic, raw, point)[1] == [-1] * 4


def test_device_arithmetic_of_gradients(device_arithmetic):
    def value(corners, s, t, a):
        return a * ((1 - t) * ((1 - s) * corners[0] + s * corners[1]) + t * ((1 - s) * corners[2] + s * corners[3]))

    given = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = torch.empty(3, dtype=torch.float64)
    device_arithmetic.gradient(pointer(given), pointer(out))
    leaves = [z.clone().requires_grad_() for z in given[4:]]
    torch.testing.assert_close(out, torch.stack(torch.autograd.grad(value(given[:4], *leaves), leaves)))
    logits, out = given[:2].clone().requires_grad_(), torch.empty(4, dtype=torch.float64)
    device_arithmetic.softmax_of_two(pointer(given), pointer(out))
    weights = logits.softmax(0)
    torch.testing.assert_close(out, torch.cat([weights.detach(), *torch.autograd.grad(weights[0], logits)]))


def test_infinite_pixels_reach_only_their_neighbours(backend):
    device = DEVICES[backend]
    value = torch.ones(1, 9, 1, 4, device=device)
    value[:, 0] = float("inf")  # pixel (0, 0) of a 3 x 3 map
    locations = torch.tensor([[2.5, 2.5], [-0.9, -0.9], [1.4, 0.4]], device=device).view(1, 3, 1, 1, 1, 2) / 3
    out = ms_deform_attn(value, [(3, 3)], None, locations, torch.ones(1, 3, 1, 1, 1, device=device), backend=backend)
    assert out[0, 0].eq(1).all() and out[0, 1].eq(0).all() and out[0, 2].isinf().all()


def test_pixel_centres_and_edges(backend):
    """At the centre of a pixel the sample is the pixel, a pixel outside of the map it is zero, half way it is half."""
    device = DEVICES[backend]
    value = torch.arange(1.0, 13, device=device).view(1, 12, 1, 1)  # 3 x 4
    x, y = torch.meshgrid(torch.arange(-1.0, 5, device=device), torch.arange(-1.0, 4, device=device), indexing="xy")
    for shift, share in ((0, 1), (0.5, 0.5)):
        locations = torch.stack([(x + shift + 0.5) / 4, (y + 0.5) / 3], -1).view(1, -1, 1, 1, 1, 2)
        weights = torch.ones(1, 30, 1, 1, 1, device=device)
        out = ms_deform_attn(value, [(3, 4)], None, locations, weights, backend=backend)
        image = torch.zeros(5, 7, device=device)
        image[1:4, 1:5] = value.view(3, 4)
        expected = share * image[:, :6] + (1 - share) * image[:, 1:]
        torch.testing.assert_close(out.view(5, 6), expected, rtol=1e-6, atol=1e-5)


def test_slices_of_one_linear_layer_are_not_copied():
    M, L, P = 2, 3, 3
    n = M * L * P
    query = torch.randn(2, 7, 16)
    merged = linear(query, torch.randn(3 * n, 16))  # [B, Q, 2n + n]
    value = torch.randn(2, S, 40)[..., :16].unflatten(-1, (M, 8))
    args = value, SIZES, torch.rand(1, 7, 1, 2), merged[..., :2 * n], merged[..., 2 * n:]
    with Calls() as calls:
        out = ms_deform_attn_fused(*args, backend="cpp")
    given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
    (_, received), = calls
    assert {t.untyped_storage().data_ptr() for t in received if isinstance(t, torch.Tensor)} == given
    torch.testing.assert_close(out, ms_deform_attn_fused(*args, backend="reference"))


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_coordinates_may_be_more_precise_than_value(backend, low):
    needs(backend, low)
    value, _, _, locations, weights = inputs(low, DEVICES[backend])
    args = value, SIZES, None, *(t.float() + 1e-3 * torch.rand_like(t.float()) for t in (locations, weights))
    got, plain, exact = (forward_backward(f, a, low) for f, a in (
        (lambda *a: ms_deform_attn(*a, backend=backend), args), (reference.ms_deform_attn, args),
        (reference.ms_deform_attn, [a.double() if isinstance(a, torch.Tensor) else a for a in args])))
    assert [t.dtype for t in got] == [low, low, torch.float32, torch.float32]
    assert_as_accurate(got, plain, exact)


def test_float64_anywhere_computes_in_float64():
    value, _, _, locations, weights = inputs(torch.float64)
    out = ms_deform_attn(value.float(), SIZES, None, locations, weights.float())
    assert out.dtype == torch.float32
    exact = reference.ms_deform_attn(value.float().double(), SIZES, None, locations, weights.float().double())
    torch.testing.assert_close(out, exact.float(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_few_points_on_large_maps(backend, fused, dtype):
    """As a decoder's queries; the C++ kernels sample them where value lies, without a copy of it."""
    needs(backend, dtype)
    name = "ms_deform_attn_fused" if fused else "ms_deform_attn"
    args = make_inputs((2, 21, 3, 12, 2, 30, 25, 9, 8, "apart"), dtype, DEVICES[backend], fused)
    exact = forward_backward(operator_function("ms_deform_attn", name, "reference"),
                             map_differentiable(torch.Tensor.double, args), dtype)
    plain, got = (forward_backward(operator_function("ms_deform_attn", name, "api", backend=which), args, dtype)
                  for which in ("reference", backend))
    assert_as_accurate(got, plain, exact)


def test_same_bits_for_any_number_of_threads():
    args, results, threads = inputs(points="uniform", fused=True), [], torch.get_num_threads()
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            results.append(forward_backward(lambda *a: ms_deform_attn_fused(*a, backend="cpp"), args, torch.float32))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=0, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_more_threads_than_heads_share_the_queries_of_a_head(fused):
    name = "ms_deform_attn_fused" if fused else "ms_deform_attn"
    args = make_inputs((1, 1100, 2, 12, 2, 6, 5, 3, 4, "apart"), torch.float64, "cpu", fused)
    exact = forward_backward(operator_function("ms_deform_attn", name, "reference"), args, torch.float64)
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(False)
    try:
        for number in (4, 7):
            torch.set_num_threads(number)
            cpp = operator_function("ms_deform_attn", name, "api", backend="cpp")
            shared = forward_backward(cpp, args, torch.float64)
            torch.testing.assert_close(shared, exact, rtol=1e-9, atol=1e-12)
    finally:
        torch.set_num_threads(threads)


def test_same_bits_in_deterministic_mode(backend):
    args = inputs(device=DEVICES[backend], points="uniform", fused=True)
    runs = [forward_backward(lambda *a: ms_deform_attn_fused(*a, backend=backend), args, torch.float32)
            for _ in range(3)]
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)
    torch.testing.assert_close(runs[0], runs[2], rtol=0, atol=0)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_gradients_where_determinism_is_not_asked_for(backend, fused):
    """On a map so large that CUDA adds atomically."""
    args = make_inputs((2, 9, 1, 8, 2, 50, 60, "apart"), torch.float32, DEVICES[backend], fused)
    name = "ms_deform_attn_fused" if fused else "ms_deform_attn"
    runs = []
    for deterministic in (True, False):
        torch.use_deterministic_algorithms(deterministic)
        runs.append(forward_backward(operator_function("ms_deform_attn", name, "api", backend=backend), args,
                                     torch.float32))
    torch.testing.assert_close(*runs)


def test_images_may_be_more_than_2_to_the_31_elements_apart(tmp_path):
    far = 2**31 + 8
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=far + S * 16, dtype=torch.bfloat16)
    value, *rest = inputs(torch.bfloat16)
    apart = storage.as_strided(value.shape, (far, 16, 8, 1))
    apart.copy_(value)
    torch.testing.assert_close(ms_deform_attn(apart, *rest), ms_deform_attn(value, *rest), rtol=0, atol=0)


def test_calls_of_other_projects_are_understood():
    value, sizes, _, locations, weights = inputs()
    expected = ms_deform_attn(value, sizes, None, locations, weights)
    shapes, starts = torch.tensor(sizes), torch.tensor([0, 30, 42])
    for call in ((value, shapes, starts, locations, weights, 64), (value, shapes, starts, locations, weights),
                 (value, sizes, [0, 30, 42], locations, weights, 1)):
        torch.testing.assert_close(ms_deform_attn(*call), expected, rtol=0, atol=0)


def shaped(*shape, **options):
    return torch.zeros(shape, **options)


@pytest.mark.parametrize("change, message", [
    (dict(value=shaped(2, S, 16)), r"value must be \[B, S, M, D\].*got \[2, 46, 16\]"),
    (dict(value=shaped(2, S, 2, 8, dtype=torch.int32)), "value must be floating point.*got torch.int32"),
    (dict(spatial_shapes=[(6, 5), (3, 4)]), "spatial_shapes must be .*46 pixels.*together 42"),
    (dict(spatial_shapes=[(-6, -5), (3, 4), (2, 2)]), "spatial_shapes must be"),
    (dict(spatial_shapes=shaped(3, 3, dtype=torch.int64)), r"spatial_shapes must be integers \[L, 2\]"),
    (dict(level_start_index=[0, 30, 40]), r"level_start_index must be the running sum.*, got \[0, 30, 40\]"),
    (dict(sampling_locations=shaped(2, 7, 2, 2, 3, 2)), r"sampling_locations must be \[B, Q, M, L, P, 2\]"),
    (dict(attention_weights=shaped(2, 7, 2, 3, 4)), r"attention_weights must be .*2, 3, 3\], got \[2, 7, 2, 3, 4\]"),
    (dict(attention_weights=shaped(2, 7, 2, 3, 3, device="meta")), "attention_weights must be .* on .* on meta"),
    (dict(backend="fastest"), "backend must be one of"),
])
def test_errors_name_the_argument_and_what_came(change, message):
    names = "value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights"
    with pytest.raises(ValueError, match=f"(?s)ms_deform_attn: {message}"):
        ms_deform_attn(**{**dict(zip(names, inputs(), strict=True)), **change})


@pytest.mark.parametrize("name, wrong", [
    ("reference_points", shaped(2, 7, 2, 2)), ("sampling_offsets", shaped(2, 7, 35)),
    ("attention_logits", shaped(2, 6, 18))])
def test_errors_of_the_fused_form(name, wrong):
    names = "value", "spatial_shapes", "reference_points", "sampling_offsets", "attention_logits"
    with pytest.raises(ValueError, match=f"ms_deform_attn_fused: {name} must be .* got"):
        ms_deform_attn_fused(**{**dict(zip(names, inputs(fused=True), strict=True)), name: wrong})


def layer_inputs():
    return torch.randn(2, 7, 32), torch.rand(2, 7, 1, 2), torch.randn(2, S, 32), SIZES


def test_layer_loads_weights_of_transformers_and_agrees():
    detr = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    config = detr.DeformableDetrConfig(d_model=32, encoder_attention_heads=4, num_feature_levels=3, encoder_n_points=4)
    theirs = detr.DeformableDetrMultiscaleDeformableAttention(config, 4, 4)
    nn.init.normal_(theirs.sampling_offsets.weight, std=0.1)
    nn.init.normal_(theirs.attention_weights.weight)
    ours = MSDeformAttn(32, 3, 4, 4)
    ours.load_state_dict(theirs.state_dict())
    query, points, memory, sizes = layer_inputs()
    mask = torch.rand(2, S) > 0.2
    expected, _ = theirs(query, encoder_hidden_states=memory, attention_mask=mask, spatial_shapes=torch.tensor(sizes),
                         reference_points=points.expand(-1, -1, 3, -1), spatial_shapes_list=sizes)
    torch.testing.assert_close(ours(query, points, memory, sizes, None, ~mask), expected, rtol=1e-5, atol=1e-6)


def test_layer_starts_like_deformable_detr():
    layer = MSDeformAttn(32, 3, 8, 2)
    offsets = layer.sampling_offsets.bias.view(8, 3, 2, 2)
    torch.testing.assert_close(offsets[1, 0], torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
    torch.testing.assert_close(offsets[2, 2], torch.tensor([[0.0, 1.0], [0.0, 2.0]]))
    with pytest.raises(ValueError, match="d_model must be a multiple of n_heads, got 30 and 8"):
        MSDeformAttn(30, 3, 8, 2)


def test_autocast_keeps_to_the_low_type():
    layer, args = MSDeformAttn(32, 3, 4, 4), layer_inputs()
    expected = layer(*args)
    with torch.autocast("cpu", torch.bfloat16), Calls() as calls:
        out = layer(*args)
    (_, received), = calls
    assert out.dtype == torch.bfloat16
    assert [t.dtype for t in received if isinstance(t, torch.Tensor)] == [torch.bfloat16, torch.float32,
                                                                         torch.bfloat16, torch.bfloat16]
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)


def test_layer_compiles_and_exports():
    layer, args = MSDeformAttn(32, 3, 4, 4), layer_inputs()
    expected = layer(*args)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(*args), expected)
    torch.testing.assert_close(torch.export.export(layer, args).module()(*args), expected)


def test_shapes_in_a_tensor_compile_once_for_all_sizes():
    value, _, _, locations, weights = inputs()
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def attend(value, locations, weights, shapes):
        return ms_deform_attn(value, shapes, None, locations, weights)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for sizes in (SIZES, [(5, 6), (4, 3), (1, 4)]):
        args = value, locations, weights, torch.tensor(sizes)
        torch.testing.assert_close(*(forward_backward(f, args, torch.float32) for f in (compiled, attend)))
    assert counter.frame_count == 1
    with pytest.raises(RuntimeError, match="ms_deform_attn: spatial_shapes must be .*the pixels of value"):
        compiled(value, locations, weights, torch.tensor([(5, 6), (4, 3), (2, 4)]))


class Reference(nn.Module):
    def forward(self, *args):
        return ms_deform_attn_fused(args[0], SIZES, *args[1:], backend="reference")


def test_definition_exports_to_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    value, _, *rest = inputs(fused=True)
    args = value, *rest
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Reference(), args, str(tmp_path / "op.onnx"), dynamo=True)
    session = runtime.InferenceSession(str(tmp_path / "op.onnx"))
    feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), args, strict=True)}
    torch.testing.assert_close(torch.from_numpy(session.run(None, feeds)[0]), Reference()(*args), rtol=1e-5, atol=1e-5)


def test_definition_exports_with_shapes_of_its_own():
    value, _, *rest = inputs(fused=True)
    program = torch.export.export(Reference(), (value, *rest))
    assert not any(node.target.namespace == "icf" for node in program.graph.nodes if node.op == "call_function"
                   and hasattr(node.target, "namespace"))
    torch.testing.assert_close(program.module()(value, *rest), Reference()(value, *rest))


def test_module_is_found_where_users_look():
    assert module("ms_deform_attn", "api").ms_deform_attn is ms_deform_attn
