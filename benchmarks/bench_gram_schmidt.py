"""Orthogonal noise against what one would write otherwise: pytest benchmarks/bench_gram_schmidt.py --benchmark-only -s

Versions run in turn, in one process; the ratio of the medians is printed and kept, next to the floor: the time to read
the inputs and write the results, measured by a copy of as many bytes. OMP_NUM_THREADS=1 measures one thread.
"""
import statistics
import time

import pytest
import torch

from icf.ops import gram_schmidt, orthogonal_blend, orthogonal_directions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def synchronise():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def compare(benchmark, group, versions, floor_bytes):
    """Median times of `versions`, a dict of functions, the product first; the benchmark itself times the product."""
    source = torch.empty(floor_bytes // 8, dtype=torch.float32, device=DEVICE)  # a copy reads and writes each byte
    target = torch.empty_like(source)
    versions = {**versions, "floor": lambda: target.copy_(source)}
    times = {name: [] for name in versions}
    spent = -time.perf_counter()
    while len(times["floor"]) < 5 or (spent + time.perf_counter() < 2 and len(times["floor"]) < 200):
        for name, version in versions.items():
            synchronise()
            start = time.perf_counter()
            version()
            synchronise()
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(t[1:]) for name, t in times.items()}
    ours, *others = versions
    ratios = {name: round(median[name] / median[ours], 2) for name in others}
    benchmark.group = group
    benchmark.extra_info.update(device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", ratios=ratios,
                                threads=torch.get_num_threads(), torch=torch.__version__,
                                microseconds={name: round(1e6 * t, 1) for name, t in median.items()})
    print(f"\n{group}: {1e6 * median[ours]:.0f} us; " + ", ".join(f"{name} {r} x" for name, r in ratios.items()))
    benchmark.pedantic(lambda: (versions[ours](), synchronise()), rounds=3)


def eager_blend(z, ratio, noise):
    unit = z / z.norm(dim=-1, keepdim=True)
    u = noise - (noise * unit).sum(-1, keepdim=True) * unit
    return (1 - ratio).sqrt()[..., None] * unit + ratio.sqrt()[..., None] * u / u.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows, d", [(120, 256), (4096, 256), (4096, 1024), (65536, 256), (5120, 32)])
def bench_blend(benchmark, rows, d, dtype, noise):
    """Forward and backward, noise drawn in both; the floor reads z twice and the gradient, and writes two results."""
    z = torch.randn(rows, d, device=DEVICE).to(dtype).requires_grad_()
    ratio = (0.05 + 0.9 * torch.rand(rows, device=DEVICE)).requires_grad_()
    grad = torch.randn(rows, d, device=DEVICE).to(dtype)

    def eager():
        drawn = torch.randn(rows, d, device=DEVICE)
        if noise == "rademacher":
            drawn = drawn.sign()
        torch.autograd.grad(eager_blend(z.float(), ratio, drawn).to(dtype), (z, ratio), grad)

    def fused():
        torch.autograd.grad(orthogonal_blend(z, ratio, noise=noise), (z, ratio), grad)

    compare(benchmark, f"blend-{noise}-{rows}x{d}-{str(dtype)[6:]}", {"fused": fused, "eager": eager},
            5 * z.numel() * z.element_size())


SETS = [(4096, 1, 64), (4096, 8, 64), (8, 4, 256), (128, 8, 256), (1024, 16, 256), (1024, 32, 256), (4096, 32, 256),
        (1024, 64, 256), (1024, 16, 1024), (128, 64, 1024), (128, 64, 64), (8, 1, 64)]


@pytest.mark.parametrize("batch, n, d", SETS)
def bench_set(benchmark, batch, n, d):
    x = torch.randn(batch, n, d, device=DEVICE)
    compare(benchmark, f"gram_schmidt-{batch}x{n}x{d}",
            {"auto": lambda: gram_schmidt(x), "cgs2": lambda: gram_schmidt(x, method="cgs2"),
             "torch.linalg.qr": lambda: torch.linalg.qr(x.mT)}, 2 * x.numel() * 4)


@pytest.mark.parametrize("k", [4, 8, 16, 32, 64])  # the time of hadamard grows linearly
def bench_directions(benchmark, k):
    z = torch.randn(1024, 256, device=DEVICE)
    compare(benchmark, f"directions-1024x256-{k}",
            {"hadamard": lambda: orthogonal_directions(z, k, kind="hadamard"),
             "haar": lambda: orthogonal_directions(z, k),
             "torch.linalg.qr": lambda: torch.linalg.qr(
                 torch.cat([z[:, None], torch.randn(1024, k, 256, device=DEVICE)], 1).mT)}, 1024 * 256 * k * 4)
