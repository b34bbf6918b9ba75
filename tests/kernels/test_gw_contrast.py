"""The Gaussian-Wasserstein contrast: against the printed definition, at its degenerate inputs, in several processes."""
import ctypes
import math
import multiprocessing
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import normalize

from icf.ops import contrast_positives, gaussian_entropy, gaussian_wasserstein, gw_contrast, gw_text_contrast
from icf_kernels._common import backend as backends
from icf_kernels._common.backend import PROBLEM
from icf_kernels._common.testing import LOOSER, TARGETS, Calls, why_not
from icf_kernels.gw_contrast.reference import dense_gaussian_entropy, dense_gaussian_wasserstein

SPECTRAL = ("plain", "smooth", "entropic", "eps")
EYE = torch.eye(4, dtype=torch.float64)


def skip_unless_can_run(backend, device, x, spectral="plain"):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    args = *[x[None].to(device)] * 2, None, None, spectral, 1.0, 0.0
    if reason := why_not("gw_contrast", "gaussian_w2", backend, args):
        pytest.skip(reason)


every_backend = pytest.mark.parametrize("device, backend", TARGETS)


def frames(B, T, d, seed=0, dtype=torch.float64, spread=0.7):
    """Unit frames [B, T, d] that scatter around the mean of their clip."""
    generator = torch.Generator().manual_seed(seed)
    clips = torch.randn(B, 1, d, generator=generator, dtype=torch.float64)
    x = clips + spread * torch.randn(B, T, d, generator=generator, dtype=torch.float64)
    return normalize(x, dim=-1).to(dtype)


def value_and_gradients(function, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    weights = torch.arange(out.numel(), dtype=out.dtype, device=out.device).cos().view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def assert_relative(actual, expected, tolerance):
    for got, true in zip(actual, expected, strict=True):
        assert (got.double() - true.double()).norm() <= tolerance * true.double().norm(), (got, true)


@pytest.mark.parametrize("eps", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("Tx, Ty", [(5, 5), (4, 9), (10, 3), (1, 5), (4, 1)])
def test_matches_printed_distance_and_entropy(Tx, Ty, eps):
    x, y = frames(3, Tx, 48, 1), frames(2, Ty, 48, 2)
    assert_relative(value_and_gradients(partial(gaussian_wasserstein, spectral="eps", regularization=eps), x, y),
                    value_and_gradients(lambda x, y: dense_gaussian_wasserstein(x, y, eps), x, y), 1e-9)
    assert_relative(value_and_gradients(partial(gaussian_entropy, eps=eps, per_dof=False), y),
                    value_and_gradients(lambda y: dense_gaussian_entropy(y, eps), y), 1e-9)


@every_backend
def test_matches_nuclear_norm_of_dense_roots(device, backend):
    x, y = frames(3, 5, 32, 1), frames(4, 7, 32, 2)
    skip_unless_can_run(backend, device, x.float())
    def root(z):
        values, vectors = torch.linalg.eigh(torch.cov(z.mT, correction=0))
        return vectors * values.clamp(min=0).sqrt() @ vectors.mT
    expected = torch.stack([torch.stack([
        (a.mean(0) - b.mean(0)).square().sum() + a.var(0, correction=0).sum() + b.var(0, correction=0).sum()
        - 2 * torch.linalg.matrix_norm(root(a) @ root(b), "nuc") for b in y]) for a in x])
    single = backend == "triton"
    x, y = (z.to(device, torch.float32 if single else torch.float64) for z in (x, y))
    assert_relative([gaussian_wasserstein(x, y, backend=backend).cpu()], [expected], 1e-6 if single else 1e-9)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("spectral", SPECTRAL)
@pytest.mark.parametrize("Tx, Ty", [(4, 4), (3, 5), (6, 3)])
def test_gradient_in_every_spectral_mode(Tx, Ty, spectral, backend):
    x, y = frames(2, Tx, 7, 1), frames(3, Ty, 7, 2)
    skip_unless_can_run(backend, "cpu", x, spectral)
    function = partial(gaussian_wasserstein, spectral=spectral, regularization=0.05, backend=backend)
    assert torch.autograd.gradcheck(function, (x.requires_grad_(), y.requires_grad_()), fast_mode=True)


@every_backend
@pytest.mark.parametrize("T", [5, 10])
def test_accuracy_in_float32(T, device, backend):
    if backend == "triton" and device == "cpu" and T > 6:
        pytest.skip("slow in the interpreter")
    x, y = frames(3, T, 256, 1), frames(3, T, 256, 2)
    skip_unless_can_run(backend, device, x.float())
    single = [z.to(device).cpu() for z in value_and_gradients(
        partial(gaussian_wasserstein, backend=backend), *(z.float().to(device) for z in (x, y)))]
    rounded = [z.float().double() for z in (x, y)]
    double = value_and_gradients(partial(gaussian_wasserstein, backend="reference"), *rounded)
    traces = [z.var(1, correction=0).sum(-1) for z in rounded]
    assert ((single[0] - double[0]).abs() <= LOOSER * 1e-6 * (traces[0][:, None] + traces[1])).all()
    assert_relative(single[1:], double[1:], 1e-5)


@every_backend
@pytest.mark.parametrize("T", [2, 3, 4, 6, 8, 11, 15, 16, 31])
def test_any_number_of_frames(T, device, backend):
    if backend == "triton" and device == "cpu" and T > 6:
        pytest.skip("slow in the interpreter")
    x, y = frames(3, T, 40, 1, torch.float32), frames(3, max(T - 1, 2), 40, 2, torch.float32)  # 9 pairs fill no vector
    skip_unless_can_run(backend, device, x)
    actual = value_and_gradients(partial(gaussian_wasserstein, backend=backend), x.to(device), y.to(device))
    expected = value_and_gradients(partial(gaussian_wasserstein, backend="reference"), x.double(), y.double())
    assert_relative([z.cpu() for z in actual], expected, 2e-5)


@every_backend
@pytest.mark.parametrize("scale", [1e-8, 1e-6, 1.0, 1e4])
def test_scale(scale, device, backend):
    x, y = frames(3, 5, 16, 1, torch.float32), frames(3, 5, 16, 2, torch.float32)
    skip_unless_can_run(backend, device, x)
    function = partial(gaussian_wasserstein, backend=backend)
    one = value_and_gradients(function, x.to(device), y.to(device))
    scaled = value_and_gradients(function, x.to(device) * scale, y.to(device) * scale)
    assert_relative(scaled, [one[0] * scale**2, one[1] * scale, one[2] * scale], 3e-6)


@every_backend
def test_static_clip_gets_no_gradient_on_its_deviations(device, backend):
    x, y = frames(2, 1, 32, 1, torch.float32).expand(-1, 5, -1), frames(3, 5, 32, 2, torch.float32)
    skip_unless_can_run(backend, device, x)
    distance, grad_x, grad_y = (z.cpu() for z in value_and_gradients(
        partial(gaussian_wasserstein, backend=backend), x.to(device), y.to(device)))
    mean = y.mean(1)
    expected = (x[:, 0][:, None] - mean).square().sum(-1) + (y - mean[:, None]).square().sum(-1).mean(1)
    torch.testing.assert_close(distance, expected)
    assert (grad_x - grad_x[:, :1]).abs().max() <= 1e-7
    assert gaussian_entropy(x.to(device), backend=backend).abs().max() == 0


@every_backend
@pytest.mark.parametrize("spectral", ["smooth", "entropic"])
def test_static_clip_beside_a_large_regularization(spectral, device, backend):
    x, y = frames(2, 1, 32, 1, torch.float32).expand(-1, 5, -1), frames(3, 5, 32, 2, torch.float32)
    skip_unless_can_run(backend, device, x, spectral)
    function = partial(gaussian_wasserstein, spectral=spectral, regularization=10)
    actual = value_and_gradients(partial(function, backend=backend), x.to(device), y.to(device))
    expected = value_and_gradients(partial(function, backend="reference"), x.double(), y.double())
    torch.testing.assert_close([z.cpu().double() for z in actual], list(expected), rtol=1e-5, atol=1e-5)


@every_backend
@pytest.mark.parametrize("case", ["identical", "zero", "rank 1", "near duplicates", "two distinct frames"])
def test_degenerate_clips(case, device, backend):
    y = frames(3, 5, 32, 1, torch.float32)
    skip_unless_can_run(backend, device, y)
    steps = torch.tensor([0.0, 1.0, 0.3, -0.4, 0.7])[:, None]
    x = {"identical": y, "zero": torch.zeros_like(y), "rank 1": y[:, :1] + steps * y[:, 1:2],
         "near duplicates": y[:, :1] + 1e-4 * frames(3, 5, 32, 2, torch.float32),
         "two distinct frames": y[:, [0, 1, 0, 1, 1]]}[case]
    function = partial(gaussian_wasserstein, backend=backend)
    actual = [z.cpu() for z in value_and_gradients(function, x.to(device), y.to(device))]
    assert all(z.isfinite().all() for z in actual)
    exact = gaussian_wasserstein(x.double(), y.double(), backend="reference")
    traces = [z.double().var(1, correction=0).sum(-1) for z in (x, y)]
    assert ((actual[0] - exact).abs() <= 2e-6 * (traces[0][:, None] + traces[1]) + 1e-7).all()
    if case == "identical":
        assert actual[0].diagonal().abs().max() <= 1e-6 and actual[1].norm() > 0


LACKING = ("each frame twice", "low rank", "dead features", "graded")


def without_full_rank(kind, x):
    _, T, d = x.shape
    return {"each frame twice": x[:, :T // 2].repeat_interleave(2, 1), "low rank": x[:, :, :2] @ x[:, :2],
            "dead features": x * (torch.arange(d) < 3), "graded": x * 10.0 ** -torch.arange(T)[:, None]}[kind]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("T, d, seeds", [(12, 8, 12), (10, 256, 12), (20, 64, 6), (32, 96, 3), (64, 40, 1)])
@pytest.mark.parametrize("kind", LACKING)
def test_frames_without_full_rank(kind, T, d, seeds, dtype, device, backend):
    """Columns of which nothing is left end as they are, in value and in gradient."""
    x, y = frames(seeds, T, d, 8, dtype), frames(seeds, T, d, 9, dtype)
    skip_unless_can_run(backend, device, x)
    if backend == "triton" and device == "cpu" and T > 12:
        pytest.skip("slow in the interpreter")
    x = without_full_rank(kind, x)
    function = partial(gaussian_wasserstein, backend=backend)
    actual = [z.cpu() for z in value_and_gradients(function, x.to(device), y.to(device))]
    assert all(z.isfinite().all() for z in actual)
    exact = gaussian_wasserstein(x.double(), y.double(), backend="reference")
    traces = [z.double().var(1, correction=0).sum(-1) for z in (x, y)]
    tolerance = 3e-14 if dtype == torch.float64 else 2e-6
    assert ((actual[0] - exact).abs() <= tolerance * (traces[0][:, None] + traces[1]) + 1e-30).all()


@pytest.mark.parametrize("T, d", [(12, 8), (20, 64), (32, 96), (64, 40)])
@pytest.mark.parametrize("function", [gaussian_wasserstein, partial(gw_contrast, tau=5.0)])  # the latter is one call
@pytest.mark.parametrize("kind", LACKING)
def test_gradient_without_full_rank(kind, function, T, d):
    """The plain one is finite; the smooth one is the definition's, as where rounding leaves a singular value does not
    matter to it."""
    x, y = without_full_rank(kind, frames(12, T, d, 8)), frames(12, T, d, 9)
    skip_unless_can_run("cpp", "cpu", x, "smooth")
    plain = value_and_gradients(partial(function, backend="cpp"), x, y)
    assert all(z.isfinite().all() for z in plain)
    assert_relative(plain[:1], [function(x, y, backend="reference")], 1e-12)
    assert_relative(*(value_and_gradients(partial(function, spectral="smooth", backend=backend), x, y)
                      for backend in ("cpp", "reference")), 1e-11)


@pytest.mark.skipif(bool(PROBLEM["_C"]), reason=PROBLEM["_C"])
@pytest.mark.parametrize("function, Tx, Ty, taken", [
    (gaussian_wasserstein, 64, 64, "cpp"), (gaussian_wasserstein, 65, 66, "reference"),
    (gaussian_wasserstein, 3, 129, "cpp"), (gaussian_wasserstein, 129, 64, "cpp"),  # the shorter side's columns turn
    (gw_contrast, 64, 128, "cpp"), (gw_contrast, 3, 129, "reference"), (gw_contrast, 129, 3, "reference"),
    (partial(gw_contrast, entropy="none"), 3, 129, "cpp")])
def test_many_frames_are_computed_by_what_is_faster(function, Tx, Ty, taken, monkeypatch):
    monkeypatch.setattr(backends, "_told", set())
    x, y = frames(2, Tx, 16, 1, torch.float32), frames(2, Ty, 16, 2, torch.float32)
    with Calls() as calls, warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is missing
        automatic = function(x, y)
        assert bool(calls) == (taken == "cpp")
        asked = function(x, y, backend="cpp")
        assert calls
    torch.testing.assert_close(automatic, asked, rtol=1e-5, atol=1e-4)


@every_backend
def test_masked_frames_do_not_count(device, backend):
    x, y = frames(3, 6, 24, 1, torch.float32), frames(2, 5, 24, 2, torch.float32)
    skip_unless_can_run(backend, device, x)
    x_mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    y_mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0]], dtype=torch.bool)
    padded = [z.masked_fill(~m[..., None], math.nan).to(device) for z, m in ((x, x_mask), (y, y_mask))]
    masks = dict(x_mask=x_mask.to(device), y_mask=y_mask.to(device))
    distance, grad_x, _ = (z.cpu() for z in value_and_gradients(
        partial(gaussian_wasserstein, backend=backend, **masks), *padded))
    entropy = gaussian_entropy(padded[0], mask=masks["x_mask"], backend=backend).cpu()
    for i in range(3):
        alone = x[i : i + 1, x_mask[i]]
        torch.testing.assert_close(entropy[i : i + 1], gaussian_entropy(alone, backend="reference"))
        for j in range(2):
            expected = gaussian_wasserstein(alone, y[j : j + 1, y_mask[j]], backend="reference")
            torch.testing.assert_close(distance[i : i + 1, j : j + 1], expected)
    assert (grad_x[~x_mask] == 0).all() and grad_x.isfinite().all()
    nobody = dict(masks, x_mask=torch.zeros_like(masks["x_mask"]))
    origin = torch.zeros_like(x[:1, :1]).to(device)
    origin = gaussian_wasserstein(origin, padded[1], y_mask=masks["y_mask"], backend=backend)
    torch.testing.assert_close(gaussian_wasserstein(*padded, **nobody, backend=backend), origin.expand(3, -1))


@every_backend
def test_nan_stays_with_its_own_pairs(device, backend):
    x, y = frames(3, 4, 16, 1, torch.float32), frames(4, 3, 16, 2, torch.float32)
    skip_unless_can_run(backend, device, x)
    bad_x, bad_y = x.clone(), y.clone()
    bad_x[1, 2, 3], bad_y[2, 0, 0] = math.nan, math.inf
    bad = torch.zeros(3, 4, dtype=torch.bool)
    bad[1], bad[:, 2] = True, True
    clean = gaussian_wasserstein(x.to(device), y.to(device), backend=backend).cpu()
    inputs = [z.to(device).requires_grad_() for z in (bad_x, bad_y)]
    distance = gaussian_wasserstein(*inputs, backend=backend)
    assert torch.equal(distance.isfinite().cpu(), ~bad)
    torch.testing.assert_close(distance.cpu()[~bad], clean[~bad])
    if backend != "reference":  # pairs left out of a loss do not spoil its gradient
        grad_x, _ = torch.autograd.grad(torch.where(bad.to(device), 0, distance).sum(), inputs)
        assert torch.equal(grad_x.isfinite().all(-1).all(-1).cpu(), torch.tensor([True, True, True]))
        grad_x, _ = torch.autograd.grad(gaussian_wasserstein(*inputs, backend=backend)[:, 0].sum(), inputs)
        assert torch.equal(grad_x.isfinite().all(-1).all(-1).cpu(), torch.tensor([True, False, True]))


@every_backend
def test_invariances(device, backend):
    x, y = frames(3, 5, 16, 1, torch.float32), frames(2, 7, 16, 2, torch.float32)
    skip_unless_can_run(backend, device, x)
    x, y = x.to(device), y.to(device)
    function = partial(gaussian_wasserstein, backend=backend)
    distance = function(x, y)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3)))[0].to(device)
    for same in (function(x @ turn, y @ turn), function(x.flip(1), y), function(x + 3, y + 3), function(y, x).mT,
                 function(x[:, torch.tensor([0, 1, 2, 3, 4] * 2)], y)):
        torch.testing.assert_close(same, distance, atol=2e-6, rtol=1e-5)
    zipped = function(x[:2], y, pairs="zip")
    torch.testing.assert_close(zipped, distance[:2].diagonal())


PAIR_ON_HOST = """
#include "gw_contrast/gw_contrast_math.h"
using namespace icf::gw;
typedef float V64 __attribute__((vector_size(64)));
template <int ROWS, int COLS, bool RING, typename V>
void run(const float* in, float* out, float* value) {  // in, out: [ROWS * COLS, lanes]
  V a[ROWS * COLS], v[COLS * COLS], norm[2 * COLS + 1];
  std::memcpy(a, in, sizeof a);
  const V sum = spectral_sum<ROWS, COLS, RING, V>(a, v, norm, ROWS, COLS, true, Spectral::plain, 0.f, V{});
  std::memcpy(out, a, sizeof a);
  std::memcpy(value, &sum, sizeof sum);
}
extern "C" {
void ring_9x9(const float* in, float* out, float* value) { run<9, 9, true, float>(in, out, value); }
void ring_4x4(const float* in, float* out, float* value) { run<4, 4, true, float>(in, out, value); }
void wide_9x9(const float* in, float* out, float* value) { run<9, 9, false, V64>(in, out, value); }
void pair(int round, int table, int players, int* p, int* q) { tournament_pair(round, table, players, *p, *q); }
}
"""


def test_arithmetic_of_other_machines_on_this_one(tmp_path):
    """What a CUDA thread computes in registers, the widest SIMD vector, and the rounds of a CUDA warp."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    csrc = Path(__file__).parents[2] / "csrc"
    command = ["g++", "-std=c++20", "-O1", "-Wno-psabi", "-shared", "-fPIC", f"-I{csrc}", "-x", "c++", "-"]
    subprocess.run([*command, "-o", tmp_path / "pair.so"], input=PAIR_ON_HOST, text=True, check=True)
    library = ctypes.CDLL(str(tmp_path / "pair.so"))
    for name, n, lanes in (("ring_9x9", 9, 1), ("ring_4x4", 4, 1), ("wide_9x9", 9, 16)):
        matrix = torch.randn(n, n, lanes, generator=torch.Generator().manual_seed(0))  # columns first
        out, value = torch.empty_like(matrix), torch.empty(lanes)
        getattr(library, name)(*(ctypes.c_void_p(z.data_ptr()) for z in (matrix, out, value)))
        u, s, vh = torch.linalg.svd(matrix.permute(2, 1, 0).double(), full_matrices=False)
        torch.testing.assert_close(value.double(), 2 * s.sum(-1), rtol=1e-6, atol=0)
        torch.testing.assert_close(out.permute(2, 1, 0).double(), 2 * u @ vh, rtol=0, atol=2e-5)
    for players in (2, 4, 10, 30, 48):
        met = set()
        for round in range(players - 1):
            p, q = ctypes.c_int(), ctypes.c_int()
            tables = []
            for table in range(players // 2):
                library.pair(round, table, players, ctypes.byref(p), ctypes.byref(q))
                tables += [p.value, q.value]
                met.add((p.value, q.value))
            assert len(set(tables)) == players  # disjoint: lanes do not collide
        assert met == {(p, q) for p in range(players) for q in range(p + 1, players)}


def test_spectral_modes_differ_as_documented():
    x, y = frames(4, 5, 32, 1), frames(4, 5, 32, 2)
    plain = gaussian_wasserstein(x, y)
    for spectral in SPECTRAL[1:]:
        near, far = (gaussian_wasserstein(x, y, spectral=spectral, regularization=r) for r in (1e-7, 1e-2))
        assert (near - plain).abs().max() < 1e-3 < (far - plain).abs().max()
    assert gaussian_wasserstein(x, x, spectral="entropic").diagonal().abs().max() < 1e-12


FULL_RANK = [(5, 4), (40, 12), (20, 6)]  # more frames than dimensions


@pytest.mark.parametrize("T, d", FULL_RANK)
def test_is_the_frechet_distance_of_scipys_roots(T, d):
    """As FID is computed: by the square root of the product of the covariances."""
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is the oracle")
    x, y = frames(2, T, d, 1), frames(2, T, d, 2)
    for i in range(2):
        for j in range(2):
            a, b = x[i].numpy(), y[j].numpy()
            cov_a, cov_b = (z.T @ z / T for z in (a - a.mean(0), b - b.mean(0)))
            root = linalg.sqrtm(cov_a @ cov_b).real.trace()
            expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + (cov_a + cov_b).trace() - 2 * root
            assert gaussian_wasserstein(x, y)[i, j].item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("T, d", FULL_RANK[1:])
def test_is_the_bures_wasserstein_distance_of_pot(T, d):
    ot = pytest.importorskip("ot", reason="POT, an optional oracle, is not installed")
    x, y = frames(1, T, d, 1), frames(1, T, d, 2)
    (ma, ca), (mb, cb) = ((z[0].mean(0), torch.cov(z[0].T, correction=0)) for z in (x, y))
    found = gaussian_wasserstein(x, y).item()
    assert found == pytest.approx(float(ot.gaussian.bures_wasserstein_distance(ma, mb, ca, cb)) ** 2, rel=1e-7)


def test_published_values():
    v, a = EYE[None, [0, 1]], EYE[None, [0, 0]]
    torch.testing.assert_close(gaussian_entropy(v), torch.tensor([1.9659128], dtype=torch.float64))
    assert gaussian_entropy(a).item() == 0
    for other, expected in ((a, 1), (EYE[None, [2, 3]], 2), (v.flip(1), 0)):
        torch.testing.assert_close(gaussian_wasserstein(v, other).item(), float(expected))


def test_published_losses():
    p = (0.55 / math.sqrt(2) + math.sqrt(0.55**2 / 2 + 5 * 0.24875)) / 2.5
    plane = torch.tensor([[0, 0], [p, p / 2 - 0.55 / math.sqrt(2) + math.sqrt(2)],  # two x, then two y
                          [math.sqrt(0.5), 0], [0, math.sqrt(2)]], dtype=torch.float64)
    x, y = plane[:2, None], plane[2:, None]  # point masses
    torch.testing.assert_close(gaussian_wasserstein(x, y), torch.tensor([[0.5, 2], [1.8, 0.4]], dtype=torch.float64))
    one_way = [gw_contrast(x, y, symmetric=False).item(), gw_contrast(y, x, symmetric=False).item()]
    assert one_way == pytest.approx([7.3220e-4, 9.1886e-4], rel=1e-4)
    assert gw_contrast(x, y).item() == pytest.approx(sum(one_way) / 2, rel=1e-12)
    line = torch.tensor([0, 0.5, 0.9, 1.5], dtype=torch.float64).sqrt()[:, None]
    weights = (1 - torch.tensor([[0.7, 0.8]], dtype=torch.float64)).sqrt()
    loss = gw_text_contrast(line[None, :1], line[None, 1:2], line[None, 2:, None], weights / weights.sum())
    assert loss.item() == pytest.approx(0.0746733, rel=1e-6)


@pytest.mark.parametrize("entropy", ["in_distance", "regularizer", "none"])
@pytest.mark.parametrize("sign", ["similarity", "paper"])
@pytest.mark.filterwarnings("ignore:gw_contrast. sign='paper'")
def test_loss_equals_its_formula(entropy, sign):
    x, y = frames(5, 4, 16, 1), frames(5, 4, 16, 2)
    generator = torch.Generator().manual_seed(0)
    positives = torch.eye(5, dtype=torch.bool) | (torch.rand(5, 5, generator=generator) < 0.2)
    ignored = torch.rand(5, 5, generator=generator) < 0.2
    distance, h_x, h_y = gaussian_wasserstein(x, y), gaussian_entropy(x), gaussian_entropy(y)
    if entropy == "in_distance":
        distance = distance + 0.3 * (h_x[:, None] + h_y)
    share = (distance / (0.5 if sign == "paper" else -0.5)).exp()
    count = (positives | ~ignored).double()
    rows = ((share * count).sum(1) / (share * positives).sum(1)).log().mean()
    columns = ((share * count).sum(0) / (share * positives).sum(0)).log().mean()
    extra = 0.3 * torch.cat([h_x, h_y]).mean() if entropy == "regularizer" else 0
    options = dict(ignored=ignored, tau=0.5, gamma=0.3, entropy=entropy, sign=sign)
    torch.testing.assert_close(gw_contrast(x, y, positives, **options), (rows + columns) / 2 + extra)
    torch.testing.assert_close(gw_contrast(x, y, positives, **options, symmetric=False), rows + extra)


def test_text_loss_equals_its_formula():
    x, z, c = frames(3, 4, 16, 1), frames(3, 6, 16, 2), frames(6, 5, 16, 3).view(3, 2, 5, 16)
    weights = torch.tensor([[0.3, 0.7], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64, requires_grad=True)
    own = gaussian_wasserstein(x, z, pairs="zip") + 0.1 * gaussian_entropy(z)
    others = gaussian_wasserstein(x, c.flatten(0, 1)).view(3, 3, 2)[range(3), range(3)]
    others = others + 0.1 * gaussian_entropy(c.flatten(0, 1)).view(3, 2)
    expected = (1 + (weights * ((own[:, None] - others) / 0.2).exp()).sum(1)).log().mean()
    loss = gw_text_contrast(x, z, c, weights)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(total, weights)[0][[0, 2]] for total in (loss, expected)))
    assert gw_text_contrast(x, z, c[:, :0]).item() == 0


def test_rows_without_negatives_are_exactly_zero():
    x, y = frames(3, 4, 8, 1), frames(3, 4, 8, 2)
    everything = torch.ones(3, 3, dtype=torch.bool)
    for positives, ignored in ((everything, None), (torch.eye(3, dtype=torch.bool), everything)):
        loss, grad_x, grad_y = value_and_gradients(lambda x, y: gw_contrast(x, y, positives, ignored=ignored), x, y)  # noqa: B023
        assert loss == 0 and not grad_x.any() and not grad_y.any()


def test_large_distances_do_not_overflow():
    x, y = 16 * frames(4, 5, 8, 1, torch.float32), -16 * frames(4, 5, 8, 2, torch.float32)
    assert gaussian_wasserstein(x, y).max() > 500
    assert all(z.isfinite().all() for z in value_and_gradients(lambda x, y: gw_contrast(x, y, tau=0.02), x, y))


def test_printed_sign_drives_positives_apart_and_warns():
    x, y = frames(4, 5, 16, 1), frames(4, 5, 16, 2)
    steps = {}
    for sign in ("similarity", "paper"):
        moved = x.clone().requires_grad_()
        if sign == "paper":
            with pytest.warns(UserWarning, match="drives positives apart"):
                loss = gw_contrast(moved, y, sign=sign)
        else:
            loss = gw_contrast(moved, y, sign=sign)
        moved = x - 0.1 * torch.autograd.grad(loss, moved)[0]
        steps[sign] = (gaussian_wasserstein(moved, y) - gaussian_wasserstein(x, y)).diagonal().mean()
    assert steps["similarity"] < 0 < steps["paper"]


def test_entropy_of_the_anchor_cancels_in_distance():
    x, y = frames(4, 5, 16, 1), frames(4, 5, 16, 2)
    grad_x = value_and_gradients(partial(gw_contrast, symmetric=False), x, y)[1]
    weights = torch.softmax(-(gaussian_wasserstein(x, y) + 0.1 * gaussian_entropy(y)) / 0.2, 1)
    by_hand = x.clone().requires_grad_()
    share = (torch.eye(4) - weights) / 0.2 / 4
    expected = torch.autograd.grad((gaussian_wasserstein(by_hand, y) * share).sum(), by_hand)[0]  # without dh/dx
    torch.testing.assert_close(grad_x, expected)


def test_positives():
    anchors = torch.tensor([[1, 0], [1, 0.2], [1, 1], [0, 1]], dtype=torch.float64)
    own = torch.eye(4, dtype=torch.bool)
    assert torch.equal(contrast_positives(anchors, "diag")[0], own)
    threshold, nothing = contrast_positives(anchors, "threshold", theta=0.8)
    assert nothing is None and threshold.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    band, ignored = contrast_positives(anchors, "band", theta=0.8, theta_low=0.5)
    assert torch.equal(band, threshold) and ignored.nonzero().tolist() == [[0, 2], [2, 0], [2, 3], [3, 2]]
    assert contrast_positives(anchors, "topk", k=1)[0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0],
                                                                          [0, 0, 1, 1]]
    labels = contrast_positives(torch.tensor([3, 1, 3, 2]), "labels")[0]
    assert (labels ^ own).nonzero().tolist() == [[0, 2], [2, 0]]
    x, y = frames(4, 5, 16, 1), frames(4, 5, 16, 2)
    for mode in ("threshold", "band", "topk"):
        positives, ignored = contrast_positives(anchors, mode)
        by_hand = gw_contrast(x, y, positives, ignored=ignored)
        torch.testing.assert_close(gw_contrast(x, y, mode, anchors=anchors), by_hand)


def test_lower_precision_and_autocast_compute_in_float32():
    x, y = frames(3, 5, 64, 1, torch.bfloat16), frames(3, 5, 64, 2, torch.bfloat16)
    expected = value_and_gradients(gw_contrast, x.float(), y.float())
    with torch.autocast("cpu", torch.bfloat16):
        actual = value_and_gradients(gw_contrast, x.float(), y.float())
    assert_relative(actual, expected, 1e-5)
    assert_relative(value_and_gradients(gw_contrast, x, y), expected, 4e-3)  # gradients rounded to bfloat16
    assert gaussian_wasserstein(x, y.float()).dtype == torch.float32
    assert torch.autograd.grad(gaussian_wasserstein(x.requires_grad_(), y).sum(), x)[0].dtype == torch.bfloat16


def test_native_second_derivative_is_refused():
    x = frames(2, 3, 8)
    skip_unless_can_run("cpp", "cpu", x)
    x.requires_grad_()
    grad, = torch.autograd.grad(gaussian_wasserstein(x, x.detach() + 1, backend="cpp").sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("call, message", [
    (lambda x: gaussian_wasserstein(x, x[..., :5]), "N and d alike"),
    (lambda x: gaussian_wasserstein(x, x[:2], pairs="zip"), "as many x as y, got 'zip' for 3 and 2"),
    (lambda x: gaussian_wasserstein(x, x, x_mask=torch.ones(3, 4)), "x_mask must be bool"),
    (lambda x: gaussian_wasserstein(x, x, spectral="sharp"), "spectral must be one of"),
    (lambda x: gaussian_wasserstein(x.int(), x), "must be floating point"),
    (lambda x: gaussian_entropy(x, eps=0), "eps above 0"),
    (lambda x: gw_contrast(x, x, torch.ones(2, 2, dtype=torch.bool)), r"positives must be bool and \(3, 3\)"),
    (lambda x: gw_contrast(x, x, "threshold"), "needs anchors"),
    (lambda x: gw_contrast(x, x, sign="minus"), "sign must be"),
    (lambda x: gw_contrast(x, x, entropy="both"), "entropy one of"),
    (lambda x: gw_text_contrast(x, x, x), r"\[B, K, Tc, d\]"),
    (lambda x: contrast_positives(x[:, 0], "near"), "mode must be"),
])
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(frames(3, 4, 8))


def contrast_in_processes(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=4)
    torch.set_num_threads(1)
    groups = {2: dist.new_group([0, 1]), 4: dist.group.WORLD}
    for size, group in groups.items():
        if rank >= size:
            continue
        x, y, mask, anchors, options = contrast_problem(size)
        own = slice(rank * 2, rank * 2 + 2)
        leaves = [z[own].clone().requires_grad_() for z in (x, y)]
        loss = gw_contrast(*leaves, x_mask=mask[own], anchors=anchors[own], group=group, **options)
        torch.save([loss.detach(), *torch.autograd.grad(loss, leaves)], f"{path}/{size}-{rank}.pt")
    for case, shape in UNEVEN.items():
        x = torch.ones(shape if rank == 3 else (2, 4, 16))
        with pytest.raises(ValueError) as error:
            gw_contrast(x, x, group=dist.group.WORLD)
        Path(f"{path}/{case}-{rank}.txt").write_text(str(error.value))
    dist.destroy_process_group()


UNEVEN = {"fewer-samples": (1, 4, 16), "no-samples": (0, 4, 16), "more-frames": (2, 5, 16)}  # on the last of four


def fork_contrasts(path):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=contrast_in_processes, args=(rank, path)) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit([process.exitcode for process in processes] != [0] * 4)


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory):
    """What four processes wrote, forked from a fresh one, as importing torch four times would take longer than that."""
    path = tmp_path_factory.mktemp("processes")
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['fork_contrasts'](sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, __file__, path], check=True, timeout=300)
    return path


def contrast_problem(processes):
    B = 2 * processes
    mask = torch.ones(B, 4, dtype=torch.bool)
    mask[::3, 3] = False
    anchors = frames(B, 1, 2, 3)[:, 0]
    return frames(B, 4, 16, 1), frames(B, 5, 16, 2), mask, anchors, dict(positives="band", theta=0.9, theta_low=0.5)


def test_processes_together_equal_one_process(four_processes):
    for size in (2, 4):
        x, y, mask, anchors, options = contrast_problem(size)
        leaves = [z.clone().requires_grad_() for z in (x, y)]
        loss = gw_contrast(*leaves, x_mask=mask, anchors=anchors, **options)
        expected = [loss.detach(), *torch.autograd.grad(loss, leaves)]
        parts = [torch.load(four_processes / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)]
        for value, *_ in parts:
            torch.testing.assert_close(value, expected[0], atol=0, rtol=1e-12)
        for k in (1, 2):  # the mean over processes, as DDP forms it
            together = torch.cat([part[k] for part in parts]) / size
            assert (together - expected[k]).abs().max() <= 1e-12 * expected[k].abs().max()


@pytest.mark.parametrize("case", UNEVEN)
def test_every_process_raises_where_shapes_differ(four_processes, case):
    messages = {Path(four_processes / f"{case}-{rank}.txt").read_text() for rank in range(4)}
    assert len(messages) == 1 and f"{UNEVEN[case]} and {UNEVEN[case]} on process 3" in messages.pop()
