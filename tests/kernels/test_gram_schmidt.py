"""What is particular to orthogonal noise: geometry, the noise itself, degenerate rows, rank, accuracy."""
import math

import pytest
import torch

from icf.ops import gram_schmidt, orthogonal_blend, orthogonal_directions
from icf_kernels._common.testing import TARGETS, why_not
from icf_kernels.gram_schmidt import philox_noise, reference

every_target = pytest.mark.parametrize("target", TARGETS, ids=map("-".join, TARGETS))


def on(target, op, dtype=torch.float32):
    """The device and backend of a target; skips where it cannot run `op`, and says why."""
    device, backend = target
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if reason := why_not("gram_schmidt", op, backend, (torch.empty(1, 2, dtype=dtype, device=device),)):
        pytest.skip(reason)
    return device, backend


def randn(*shape, seed=0, device="cpu", dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def gradients(function, *leaves):
    """The result for leaves that require gradients, and the gradients for a fixed incoming one."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, torch.arange(out.numel()).cos().view_as(out).to(out))


# Noise


def test_philox_known_answer():
    assert [hex(w) for w in reference.philox(*[torch.tensor(0)] * 5)] == [
        "0x5f6fb709", "0xd893f64", "0x4f121f81", "0x4f730a48"]  # 7 rounds, key and counter 0


@every_target
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("seed", [0, 2**40 + 7, -1])
def test_one_seed_is_the_same_noise_everywhere(target, kind, seed):
    device, backend = on(target, "philox_noise")
    noise = philox_noise((2, 5, 700), torch.tensor(seed, device=device), kind, backend=backend).cpu()
    expected = reference.philox_noise((2, 5, 700), torch.tensor(seed), kind)
    torch.testing.assert_close(noise.double(), expected, rtol=0, atol=1e-6 if kind == "gaussian" else 0)


def test_noise_statistics():
    n, d = 10000, 64
    x = philox_noise((n, d), 3).double()
    assert x.isfinite().all()
    assert x.mean().abs() < 5 / math.sqrt(n * d) and (x.var() - 1).abs() < 5 * math.sqrt(2 / (n * d))
    assert ((x**4).mean() - 3).abs() < 0.05 and (x**3).mean().abs() < 0.03
    assert (x.T @ x / n - torch.eye(d)).abs().max() < 6 / math.sqrt(n)  # isotropy: columns do not correlate
    assert 4.5 < x.abs().max() < 5.8  # tails as a normal's; 5.77 is the largest value there is
    rows = x[:200] @ x[200:400].T / d
    assert rows.abs().max() < 6.5 / math.sqrt(d)
    other = philox_noise((n, d), 4).double()
    assert (x * other).mean().abs() < 5 / math.sqrt(n * d)
    signs = philox_noise((n, d), 3, "rademacher").double()
    assert set(signs.unique().tolist()) == {-1, 1} and signs.mean().abs() < 5 / math.sqrt(n * d)
    assert (signs.T @ signs / n - torch.eye(d)).abs().max() < 6 / math.sqrt(n)


def test_normals_have_the_right_distribution():
    x = philox_noise((500, 1000), 11).double().flatten().sort().values
    uniform = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    grid = (torch.arange(len(x)) + 0.5) / len(x)
    assert (uniform - grid).abs().max() < 2 / math.sqrt(len(x))  # Kolmogorov-Smirnov


@every_target
def test_draws(target):
    """Equal seeds repeat, generators reproduce, seeds may be tensors, and each output row has noise of its own."""
    device, backend = on(target, "orthogonal_blend")
    z = randn(1, 40, device=device).expand(6, 40)

    def blend(**options):
        return orthogonal_blend(z, 1.0, backend=backend, **options)

    first = blend(seed=5)
    assert torch.equal(first, blend(seed=torch.tensor(5, device=device)))
    assert not torch.equal(first, blend(seed=6))
    assert not torch.equal(first, blend(seed=5 + 2**32))
    assert not torch.equal(blend(), blend())
    drawn = [blend(generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert (first @ first.T - torch.eye(6, device=device)).abs().max() < 0.8


# orthogonal_blend


@every_target
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("d", [2, 3, 32, 257, 1000])
def test_blend_geometry(target, d, noise, dtype, tol):
    device, backend = on(target, "orthogonal_blend", dtype)
    z, ratio = randn(40, d, device=device, dtype=dtype), torch.linspace(0, 1, 40, device=device, dtype=torch.float64)
    ratio[1:-1] = ratio[1:-1].to(torch.float32)
    out = orthogonal_blend(z, ratio, noise=noise, seed=3, backend=backend).double()
    torch.testing.assert_close(out.norm(dim=-1), torch.ones_like(ratio), atol=tol, rtol=0)
    torch.testing.assert_close((out * unit(z.double())).sum(-1), (1 - ratio).sqrt(), atol=tol, rtol=0)
    restored = orthogonal_blend(z, ratio, noise=noise, seed=3, restore_norm=True, backend=backend).double()
    torch.testing.assert_close(restored.norm(dim=-1), z.double().norm(dim=-1), atol=0, rtol=2 * tol)
    torch.testing.assert_close(unit(restored), out, atol=2 * tol, rtol=0)


@every_target
def test_blend_limits(target):
    """Ratio 0 is z/|z|, 1 is orthogonal to it; beyond, it is clamped; at and beyond the ends it has no gradient."""
    device, backend = on(target, "orthogonal_blend")
    z, ratio = randn(6, 64, device=device), torch.tensor([0.0, 1.0, -0.5, 1.5, 1e-4, 0.9999], device=device)
    out, _, grad = gradients(lambda z, r: orthogonal_blend(z, r, seed=1, backend=backend), z, ratio)
    torch.testing.assert_close(out[[0, 2]], unit(z)[[0, 2]], rtol=3e-7, atol=0)
    assert (out * unit(z)).sum(-1)[[1, 3]].abs().max() < 3e-7
    assert (grad[:4] == 0).all() and (grad[4:] != 0).all() and grad.isfinite().all()


@every_target
@pytest.mark.parametrize("restore_norm", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e4, 1e30])
def test_blend_at_any_scale(target, scale, restore_norm):
    device, backend = on(target, "orthogonal_blend")
    z, ratio = randn(5, 48, device=device), torch.full((5,), 0.3, device=device)
    out, grad, grad_ratio = gradients(
        lambda z, r: orthogonal_blend(z, r, seed=1, restore_norm=restore_norm, backend=backend), z * scale, ratio)
    expected = gradients(
        lambda z, r: orthogonal_blend(z, r, seed=1, restore_norm=restore_norm, backend=backend), z, ratio)
    size = scale if restore_norm else 1
    torch.testing.assert_close(out / size, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad * (scale / size), expected[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_ratio / size, expected[2], rtol=1e-5, atol=1e-6)


@every_target
def test_blend_of_degenerate_rows(target):
    device, backend = on(target, "orthogonal_blend")
    z, noise, ratio = randn(5, 32), randn(5, 32, seed=1), torch.full((5,), 0.25)
    z[0] = 0  # no direction: noise alone
    noise[1] = -2 * z[1]  # no part orthogonal to z
    noise[2] = 0
    z[3, 7] = math.nan
    z, noise, ratio = z.to(device), noise.to(device), ratio.to(device)
    out, grad, grad_ratio = gradients(lambda z, r: orthogonal_blend(z, r, noise=noise, backend=backend), z, ratio)
    torch.testing.assert_close(out[0], 0.5 * unit(noise[0]))
    torch.testing.assert_close(out[1:3], math.sqrt(0.75) * unit(z[1:3]), rtol=1e-5, atol=1e-6)
    assert (grad[0] == 0).all() and grad[[1, 2, 4]].isfinite().all() and grad_ratio[[0, 1, 2, 4]].isfinite().all()
    assert out[3].isnan().all() and grad[3].isnan().all()
    torch.testing.assert_close(out[4], orthogonal_blend(z[4:], ratio[4:], noise=noise[4:], backend=backend)[0])


@every_target
def test_noise_almost_parallel_to_z(target):
    """The projection cancels all but a thousandth of the noise; what is left is still orthogonal."""
    device, backend = on(target, "orthogonal_blend")
    z = randn(20, 64, device=device)
    noise = 3 * z + 0.003 * randn(20, 64, seed=1, device=device)
    out = orthogonal_blend(z, 1.0, noise=noise, backend=backend).double()
    exact = orthogonal_blend(z.double(), 1.0, noise=noise.double(), backend="reference")
    assert (out * unit(z.double())).sum(-1).abs().max() < 1e-6
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-3)


@every_target
@pytest.mark.parametrize("shape", [(2, 1, 2, 32), (1, 32), (32,), (2, 1, 1, 32), (1, 3, 1, 32)])
def test_rows_shared_by_candidates(target, shape):
    """Broadcast or expanded rows of z give what their copies give, and sum the gradients."""
    device, backend = on(target, "orthogonal_blend")
    rows = (2, 3, 2)
    z = randn(*shape, device=device)
    ratio = 0.1 + 0.8 * torch.rand(rows, generator=torch.Generator().manual_seed(2)).to(device)

    def blend(z, r):
        return orthogonal_blend(z, r, seed=9, restore_norm=True, backend=backend)

    out, *grads = gradients(blend, z, ratio)
    expected, *expected_grads = gradients(lambda z, r: blend(z.expand(*rows, 32).clone(), r), z, ratio)
    expanded, *expanded_grads = gradients(lambda z, r: blend(z.expand(*rows, 32), r), z, ratio)
    assert torch.equal(out, expected) and torch.equal(expanded, expected)
    for got, same, true in zip(grads, expanded_grads, expected_grads, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(same, true, rtol=1e-5, atol=1e-5)


@every_target
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_backward_draws_the_noise_of_the_forward(target, kind):
    device, backend = on(target, "orthogonal_blend")
    z, ratio, seed = randn(9, 130, device=device), torch.full((9,), 0.4, device=device), torch.tensor(77)
    noise = reference.philox_noise((9, 130), seed, kind).to(device)
    drawn = gradients(lambda z, r: orthogonal_blend(z, r, noise=kind, seed=77, backend=backend), z, ratio)
    given = gradients(lambda z, r: orthogonal_blend(z, r, noise=noise, backend=backend), z, ratio)
    for a, b in zip(drawn, given, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_directions_of_the_noise_are_isotropic():
    z = randn(1, 32)
    u = orthogonal_blend(z.expand(20000, 32), 1.0, seed=1).double()
    complement = torch.eye(32, dtype=torch.float64) - unit(z.double()).T @ unit(z.double())
    assert (u.T @ u * 31 / 20000 - complement).abs().max() < 6 / math.sqrt(20000)
    assert u.mean(0).abs().max() < 6 / math.sqrt(32 * 20000)


def test_same_bits_for_any_number_of_threads():
    z, ratio = randn(300, 64), torch.full((300,), 0.4)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gradients(lambda z, r: orthogonal_blend(z, r, seed=1), z, ratio))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_captured_graph_reads_the_seed_anew(backend):
    z, seed = randn(50, 64, device="cuda"), torch.tensor(1, device="cuda")
    orthogonal_blend(z, 0.5, seed=seed, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = orthogonal_blend(z, 0.5, seed=seed, backend=backend)
    seed.fill_(2)
    graph.replay()
    torch.testing.assert_close(out, orthogonal_blend(z, 0.5, seed=2, backend=backend))


# gram_schmidt


def make_rows(kind, n, d):
    """Rows of a given condition number (graded), or with a dependent second half."""
    x = randn(4, n, d, dtype=torch.float64)
    if kind == "duplicated":
        x[:, n // 2:] = x[:, :n - n // 2]
    elif kind == "combinations":
        x[:, n // 2:] = randn(4, n - n // 2, n // 2, seed=1, dtype=torch.float64) @ x[:, :n // 2]
    elif kind == "zero":
        x[:, ::2] = 0
    elif kind != "gaussian":
        left = torch.linalg.qr(randn(4, n, n, seed=1, dtype=torch.float64))[0]
        grades = float(kind) ** (-torch.arange(n, dtype=torch.float64) / (n - 1))
        x = left * grades @ torch.linalg.qr(x.mT)[0].mT
    return x


@every_target
@pytest.mark.parametrize("method", ["auto", "cgs2"])
@pytest.mark.parametrize("n, d", [(16, 64), (30, 256), (32, 32)])
@pytest.mark.parametrize("kind", ["gaussian", "3e2", "1e4", "1e6", "duplicated", "combinations", "zero"])
def test_accuracy(target, kind, n, d, method):
    device, backend = on(target, "gram_schmidt")
    x = make_rows(kind, n, d).to(device, torch.float32)
    q, rank = gram_schmidt(x, method=method, return_rank=True, backend=backend)
    dependent = kind in ("duplicated", "combinations", "zero")
    assert (rank == (n // 2 if dependent else n)).all()
    q, x = q.double(), x.double()
    kept = (q != 0).any(-1)
    assert (q @ q.mT - torch.diag_embed(kept.double())).abs().max() < 1e-6
    factor = x @ q.mT
    assert (factor @ q - x).abs().max() < 3e-6 * x.abs().max()  # the same span
    assert factor.triu(1).abs().max() < 2e-6 * x.norm(dim=-1).max()
    assert (factor.diagonal(dim1=-2, dim2=-1)[kept] > 0).all()


@every_target
def test_cgs_is_for_independent_rows(target):
    """The methods differ where they should: one projection is not enough for ill-conditioned rows."""
    device, backend = on(target, "gram_schmidt")
    errors = {}
    for method in ("auto", "cgs"):
        q = gram_schmidt(make_rows("1e4", 16, 64).to(device, torch.float32), method=method, backend=backend).double()
        errors[method] = (q @ q.mT - torch.eye(16, device=device)).abs().max()
    assert errors["auto"] < 1e-6 and errors["cgs"] > 1e-3


@every_target
@pytest.mark.parametrize("n, d", [(1, 3), (7, 7), (5, 40)])
def test_is_qr_with_a_positive_diagonal(target, n, d):
    device, backend = on(target, "gram_schmidt", torch.float64)
    x = randn(3, n, d, device=device, dtype=torch.float64)
    q, r = torch.linalg.qr(x.mT)
    expected = (q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]).mT
    torch.testing.assert_close(gram_schmidt(x, backend=backend), expected, rtol=0, atol=1e-11)


@every_target
def test_more_rows_than_dimensions(target):
    device, backend = on(target, "gram_schmidt")
    q, rank = gram_schmidt(randn(2, 9, 6, device=device), return_rank=True, backend=backend)
    assert rank.tolist() == [6, 6] and (q[:, 6:] == 0).all()


@every_target
@pytest.mark.parametrize("kind", ["gaussian", "1e6", "duplicated"])
def test_against_removes_a_span(target, kind):
    device, backend = on(target, "gram_schmidt")
    basis, x = make_rows(kind, 14, 64).to(device, torch.float32), randn(4, 8, 64, seed=5, device=device)
    q, rank = gram_schmidt(x, against=basis, return_rank=True, backend=backend)
    assert (rank == 8).all() and q.shape == x.shape
    assert (q.double() @ q.double().mT - torch.eye(8, device=device)).abs().max() < 1e-6
    assert (unit(basis.double()) @ q.double().mT).abs().max() < 1e-6
    inside, rank = gram_schmidt(basis[:, :3], against=basis, return_rank=True, backend=backend)
    assert (rank == 0).all() and (inside == 0).all()
    shared = gram_schmidt(x, against=basis[0], backend=backend)
    torch.testing.assert_close(shared, gram_schmidt(x, against=basis[:1].expand(4, -1, -1), backend=backend))


@every_target
def test_gradients_reach_against_unless_detached(target):
    device, backend = on(target, "gram_schmidt", torch.float64)
    basis = randn(2, 3, 8, device=device, dtype=torch.float64).requires_grad_()
    x = randn(2, 2, 8, seed=1, device=device, dtype=torch.float64).requires_grad_()
    leaves = [basis, x]
    assert torch.autograd.gradcheck(lambda b, x: gram_schmidt(x, against=b, backend=backend), leaves)
    out = gram_schmidt(x, against=basis, detach_basis=True, backend=backend)
    grads = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
    assert grads[0] is None and grads[1].abs().max() > 0


@every_target
def test_dropped_rows_have_no_part_in_gradients(target):
    device, backend = on(target, "gram_schmidt", torch.float64)
    x = randn(2, 6, 9, device=device, dtype=torch.float64)
    kept = [0, 1, 3, 5]
    x[:, 2], x[:, 4] = 3 * x[:, 0] - x[:, 1], 0

    def loss_of(q):
        return (q * randn(2, 4, 9, seed=3, device=device, dtype=torch.float64)).sum()

    leaf, rest = x.clone().requires_grad_(), x[:, kept].clone().requires_grad_()
    grad, = torch.autograd.grad(loss_of(gram_schmidt(leaf, backend=backend)[:, kept]), leaf)
    expected, = torch.autograd.grad(loss_of(gram_schmidt(rest, backend="reference")), rest)
    torch.testing.assert_close(grad[:, kept], expected, rtol=0, atol=1e-11)
    assert (grad[:, [2, 4]] == 0).all()


@every_target
def test_rows_of_any_scale(target):
    device, backend = on(target, "gram_schmidt")
    x, scale = randn(2, 5, 20, device=device), torch.tensor([1e-30, 1.0, 1e30, 1e-6, 1e4], device=device)[:, None]
    torch.testing.assert_close(*(gram_schmidt(v, backend=backend) for v in (x * scale, x)), rtol=0, atol=1e-6)
    grads = [gradients(lambda x: gram_schmidt(x, backend=backend), v)[1] for v in (x * scale, x)]
    torch.testing.assert_close(grads[0] * scale, grads[1], rtol=1e-4, atol=1e-5)


@every_target
def test_nan_stays_in_its_matrix_and_shows(target):
    device, backend = on(target, "gram_schmidt")
    x = randn(3, 4, 16, device=device)
    x[1, 2, 3] = math.nan
    q = gram_schmidt(x, backend=backend)
    assert q[1, 2:].isnan().all() and q[[0, 2]].isfinite().all() and q[1, :2].isfinite().all()


# orthogonal_directions


@every_target
@pytest.mark.parametrize("kind, d, k", [
    ("haar", 2, 1), ("haar", 33, 32), ("haar", 100, 7), ("hadamard", 2, 1), ("hadamard", 4, 3), ("hadamard", 64, 8),
    ("hadamard", 256, 255), ("hadamard", 2048, 5)])
def test_directions_are_orthonormal_and_orthogonal_to_z(target, kind, d, k):
    device, backend = on(target, "orthogonal_directions" if kind == "hadamard" else "gram_schmidt")
    z = randn(3, 2, d, device=device)
    z[0, 0] = 0
    r = orthogonal_directions(z, k, kind=kind, seed=4, backend=backend).double()
    assert r.shape == (3, 2, k, d)
    assert (r @ r.mT - torch.eye(k, device=device)).abs().max() < 1e-6
    assert (r @ unit(z.double() + (z == 0))[..., None]).abs()[1:].max() < 1e-6


@every_target
@pytest.mark.parametrize("sign", [1, -1])
def test_hadamard_directions_for_a_row_of_the_matrix(target, sign):
    """z may be the very row that is reflected, or its negative: the sign of the reflector keeps it well defined."""
    device, backend = on(target, "orthogonal_directions")
    first, step = (w.item() for w in reference.philox(*map(torch.tensor, (6, 0, 0, 0, 1)))[:2])
    columns = torch.arange(32)
    parity = torch.tensor([bin(first % 32 & j).count("1") % 2 for j in columns.tolist()])
    z = sign * (1 - 2 * parity) * philox_noise((1, 32), 6, "rademacher")[0]
    r = orthogonal_directions(z.to(device), 31, kind="hadamard", seed=6, backend=backend).double()
    assert (r @ r.mT - torch.eye(31, device=device)).abs().max() < 1e-6 and (r @ z.to(r)).abs().max() < 1e-5


@pytest.mark.parametrize("kind, tol", [("haar", 0.05), ("hadamard", 0.1)])  # the choice of sign favours some a little
def test_directions_cover_the_complement(kind, tol):
    z = randn(1, 16)
    r = orthogonal_directions(z.expand(20000, 16), 2, kind=kind, seed=1).double()[:, 1]
    complement = torch.eye(16, dtype=torch.float64) - unit(z.double()).T @ unit(z.double())
    assert (r.T @ r * 15 / 20000 - complement).abs().max() < tol
    assert r.mean(0).abs().max() < 0.012


# Arguments


@pytest.mark.parametrize("call, message", [
    (lambda x: orthogonal_blend(x[:, :1], 0.5), "orthogonal_blend: z must be .* d >= 2"),
    (lambda x: orthogonal_blend(x.long(), 0.5), "got .*int64"),
    (lambda x: orthogonal_blend(x, x), "ratio must broadcast with the batch dimensions of z"),
    (lambda x: orthogonal_blend(x, torch.ones(4, dtype=torch.int64)), "ratio must be floating point"),
    (lambda x: orthogonal_blend(x, 0.5, noise="uniform"), "noise must be a tensor or one of"),
    (lambda x: orthogonal_blend(x, 0.5, noise=x[:, :3]), "noise to the result"),
    (lambda x: orthogonal_blend(x, 0.5, seed=torch.zeros(2, dtype=torch.int64)), "seed must be an integer or"),
    (lambda x: orthogonal_blend(x, 0.5, backend="fast"), "backend must be one of"),
    (lambda x: gram_schmidt(x[0]), r"vectors must be \[\*, n, d\]"),
    (lambda x: gram_schmidt(x, method="qr"), "method must be one of"),
    (lambda x: gram_schmidt(x, rank_tol=-1), "rank_tol must be in"),
    (lambda x: gram_schmidt(x, against=x[:, :3]), "against must be"),
    (lambda x: gram_schmidt(x.expand(3, 4, 6), against=x.expand(2, 4, 6)), "the batch dimensions must broadcast"),
    (lambda x: orthogonal_directions(x, 6), r"k must be in \[0, d - 1\]"),
    (lambda x: orthogonal_directions(x, 2, kind="hadamard"), "needs d to be a power of two, got 6"),
    (lambda x: orthogonal_directions(x, 2, kind="qr"), "kind must be"),
])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(randn(4, 6))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_every_row_of_an_expanded_tensor_gets_its_own_gradient(backend):
    z = torch.randn(1, 8, requires_grad=True).expand(3, 8)
    if reason := why_not("gram_schmidt", "orthogonal_blend", backend, (z,)):
        pytest.skip(reason)
    given = torch.randn(3, 8)
    own, = torch.autograd.grad(orthogonal_blend(z, 0.5, noise=given, backend=backend).cos().sum(), z)
    copy = z.detach().clone().requires_grad_()
    expected, = torch.autograd.grad(orthogonal_blend(copy, 0.5, noise=given, backend=backend).cos().sum(), copy)
    torch.testing.assert_close(own, expected)
