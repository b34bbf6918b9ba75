"""The whole contrastive loss, forward and backward: pytest benchmarks/bench_gw_contrast.py --benchmark-only -s

Against what else computes it: the dense form of POT (`ot`, if installed) and with singular values of root products, and
the low-rank form with torch.linalg.svd. All versions of a size take turns in one process; the dense ones, a thousand
times slower, once or twice. extra_info gives the median ratio of each to ours, the growth of peak memory, and the
floor: matrix products and rotations in FLOP. The growth with B and d is printed last.
"""
import math
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from icf.ops import gaussian_wasserstein, gw_contrast

SIZES = [(8, 5, 256), (128, 5, 256), (8, 10, 256), (32, 10, 256), (128, 10, 256), (512, 10, 256),
         (32, 10, 128), (32, 10, 512), (32, 10, 1024)]
SWEEPS = 6.4  # of Jacobi on random 9 x 9 matrices, eight to a vector


class NuclearNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrix):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        kept = s > max(matrix.shape[-2:]) * torch.finfo(s.dtype).eps * s[..., :1]
        ctx.save_for_backward((u * kept[..., None, :]) @ v)
        return s.sum(-1)

    @staticmethod
    def backward(ctx, grad):
        return grad[..., None, None] * ctx.saved_tensors[0]


def helmert(x):
    T = x.shape[1]
    k = torch.arange(1, T, dtype=x.dtype)[:, None]
    rows = ((torch.arange(T) < k).to(x.dtype) - k * (torch.arange(T) == k)) / (k * (k + 1) * T).sqrt()
    return rows @ (x - x[:, :1])


def low_rank(x, y):
    (X, x_mean), (Y, y_mean) = ((helmert(z), z.mean(1)) for z in (x, y))
    (B, m, d), n = X.shape, Y.shape[1]
    cross = (X.reshape(B * m, d) @ Y.reshape(B * n, d).mT).view(B, m, B, n).transpose(1, 2).contiguous()
    squares = [mean.square().sum(-1) + z.square().sum((1, 2)) for mean, z in ((x_mean, X), (y_mean, Y))]
    distance = squares[0][:, None] + squares[1] - 2 * x_mean @ y_mean.mT - 2 * NuclearNorm.apply(cross)
    entropy = [torch.linalg.cholesky(z @ z.mT / 1e-2 + torch.eye(z.shape[1])).diagonal(dim1=1, dim2=2).log().sum(1)
               / z.shape[1] for z in (X, Y)]
    return distance + 0.1 * (entropy[0][:, None] + entropy[1])


def dense(x, y):
    """By POT: batched d x d square roots, eps added as it must be for a gradient."""
    from ot.gaussian import bures_wasserstein_distance
    parts = []
    for z in (x, y):
        mean = z.mean(1)
        centred = (z - mean[:, None]) / math.sqrt(z.shape[1])
        parts.append((mean, centred.mT @ centred + 1e-3 * torch.eye(z.shape[2])))
    (x_mean, x_cov), (y_mean, y_cov) = parts
    distance = bures_wasserstein_distance(x_mean, y_mean, x_cov, y_cov, paired=False) ** 2
    entropy = [torch.linalg.slogdet(cov)[1] / 2 for cov in (x_cov, y_cov)]
    return distance + 0.1 * (entropy[0][:, None] + entropy[1])


def root(cov):
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.clamp(min=1e-12).sqrt()[:, None] @ vectors.mT


def dense_singular_values(x, y):
    """One root per sample, then singular values of d x d products; values alone, its gradient is not finite."""
    parts = []
    for z in (x, y):
        centred = (z - z.mean(1, keepdim=True)) / math.sqrt(z.shape[1])
        parts.append((z.mean(1), centred.mT @ centred))
    (x_mean, x_cov), (y_mean, y_cov) = parts
    trace = [cov.diagonal(dim1=1, dim2=2).sum(1) for cov in (x_cov, y_cov)]
    cross = torch.linalg.svdvals(root(x_cov)[:, None] @ root(y_cov)).sum(-1)
    return torch.cdist(x_mean, y_mean).square() + trace[0][:, None] + trace[1] - 2 * cross


def info_nce(distance):
    logits = -distance / 0.2
    own = logits.diagonal()
    return ((torch.logsumexp(logits, 1) - own).mean() + (torch.logsumexp(logits, 0) - own).mean()) / 2


def frames(B, T, d, seed):
    generator = torch.Generator().manual_seed(seed)
    clips = torch.randn(B, 1, d, generator=generator)
    return normalize(clips + 0.7 * torch.randn(B, T, d, generator=generator), dim=-1)


def floor(B, T, d):
    n = T - 1
    rotations = SWEEPS * n * (n - 1) / 2 * (2 * n + 12 * n + 25)  # each: a product, two columns of A and V, an angle
    return dict(gemm_gflop=6 * (B * n) ** 2 * d / 1e9, rotation_gflop=B * B * rotations / 1e9)


def seconds(function, x, y, gradient=True):
    leaves = [z.clone().requires_grad_(gradient) for z in (x, y)]
    start = time.perf_counter()
    loss = function(*leaves)
    if gradient:
        loss.sum().backward()
    return time.perf_counter() - start


def peak_mb():
    """Of this process; getrusage would count what the process that started it held, too."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def print_memory(B, T, d):
    """MB by which the peak of a fresh process grows over its first call of this size."""
    seconds(gw_contrast, frames(8, T, d, 1), frames(8, T, d, 2))
    x, y = frames(B, T, d, 1), frames(B, T, d, 2)
    before = peak_mb()
    seconds(gw_contrast, x, y)
    print(peak_mb() - before)


def peers_of(B, T, d):
    """name -> (function, whether it is differentiated, rounds)"""
    peers = {}
    if B <= 128:
        peers["low rank, torch.linalg.svd"] = lambda x, y: info_nce(low_rank(x, y)), True, 15 if B < 128 else 5
    if B == 8:
        peers["dense singular values, forward"] = lambda x, y: info_nce(dense_singular_values(x, y)), False, 2
    if B * d <= 32 * 256 and d == 256 and find_spec("ot"):
        peers["POT"] = lambda x, y: info_nce(dense(x, y)), True, 2 if B == 8 else 1
    return peers


OURS = {}  # (B, T, d) -> seconds


@pytest.mark.parametrize("B, T, d", SIZES)
def bench_whole_loss(benchmark, B, T, d):
    x, y = frames(B, T, d, 1), frames(B, T, d, 2)
    ratios = {}
    for name, (peer, gradient, rounds) in peers_of(B, T, d).items():
        seconds(gw_contrast, x, y, gradient)
        calls = 1 if rounds > 2 else 9  # of ours to one of a peer that is too slow for many rounds
        pairs = [(seconds(peer, x, y, gradient),
                  statistics.median(seconds(gw_contrast, x, y, gradient) for _ in range(calls))) for _ in range(rounds)]
        ratios[name] = round(statistics.median(theirs / ours for theirs, ours in pairs), 1)
    OURS[B, T, d] = statistics.median(seconds(gw_contrast, x, y) for _ in range(10 if B <= 128 else 5))
    if B >= 128:
        memory = subprocess.check_output([sys.executable, "-P", __file__, *map(str, (B, T, d))])
        benchmark.extra_info["peak_memory_growth_mb"] = round(float(memory), 1)
    benchmark.group = f"gw_contrast, B={B}, T={T}, d={d}"
    benchmark.extra_info.update(ratios=ratios, threads=torch.get_num_threads(), torch=torch.__version__,
                                dtype="float32", **floor(B, T, d))
    print(f"\n{benchmark.group}: {1e3 * OURS[B, T, d]:.2f} ms; {benchmark.extra_info}")
    benchmark.pedantic(lambda: seconds(gw_contrast, x, y), rounds=3)
    if len(OURS) == len(SIZES):
        for what, i, fixed in (("B", 0, (10, 256)), ("d", 2, (32, 10))):
            sizes = sorted(size for size in OURS if size[:i] + size[i + 1:] == fixed)
            print(f"us per pair as {what} grows: "
                  + ", ".join(f"{size[i]}: {1e6 * OURS[size] / size[0] ** 2:.2f}" for size in sizes))


@pytest.mark.parametrize("d", [64, 512])
@pytest.mark.parametrize("function, Tx, Ty", [
    *[(gaussian_wasserstein, T, T) for T in (48, 64, 96, 200)], (gaussian_wasserstein, 10, 400),
    *[(gw_contrast, 10, T) for T in (80, 128, 200)]])  # with entropies, of each side by itself
def bench_frames(benchmark, function, Tx, Ty, d):
    """Clips of many frames, 4 against 4: where plain PyTorch begins to be faster than the C++ kernel."""
    x, y = frames(4, Tx, d, 1), frames(4, Ty, d, 2)
    versions = {name: partial(function, backend=name) for name in ("cpp", "reference")}
    pairs = [{name: seconds(version, x, y) for name, version in versions.items()} for _ in range(4)][1:]
    medians = {name: statistics.median(pair[name] for pair in pairs) for name in versions}
    benchmark.group = f"{function.__name__}, T={Tx} and {Ty}, d={d}"
    benchmark.extra_info.update(milliseconds={name: round(1e3 * s, 2) for name, s in medians.items()},
                                threads=torch.get_num_threads(), torch=torch.__version__, dtype="float32")
    print(f"\n{benchmark.group}: {benchmark.extra_info['milliseconds']}")
    benchmark.pedantic(lambda: seconds(function, x, y), rounds=2)


if __name__ == "__main__":
    print_memory(*map(int, sys.argv[1:]))
