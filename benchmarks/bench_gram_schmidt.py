"""Orthogonal noise against what one would write otherwise: pytest benchmarks/bench_gram_schmidt.py --benchmark-only -s

Versions run in turn, in one process; the ratio of the medians is printed and kept, next to the floor: the time to read
the inputs and write the results, measured by a copy of as many bytes. A call that takes turns finds the caches full of
what the others left there; calls below a millisecond are also timed five at a time ("in a row"), as in a tight loop.
OMP_NUM_THREADS=1 measures one thread.
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


def take_turns(versions, calls, seconds=0.8):
    """Median time of a call of each version, the first round left out."""
    times = {name: [] for name in versions}
    end = time.perf_counter() + seconds
    while len(times["floor"]) < 4 or (time.perf_counter() < end and len(times["floor"]) < 200):
        for name, version in versions.items():
            synchronise()
            start = time.perf_counter()
            for _ in range(calls):
                version()
            synchronise()
            times[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def compare(benchmark, group, versions, floor_bytes):
    """Median times of `versions`, a dict of functions, the product first; the benchmark itself times the product."""
    source = torch.empty(floor_bytes // 8, dtype=torch.float32, device=DEVICE)  # a copy reads and writes each byte
    target = torch.empty_like(source)
    versions = {**versions, "floor": lambda: target.copy_(source)}
    ours, *others = versions
    medians = {"in turn": take_turns(versions, 1)}
    if medians["in turn"][ours] < 1e-3:
        medians["in a row"] = take_turns(versions, 5)
    ratios = {how: {name: round(times[name] / times[ours], 2) for name in others} for how, times in medians.items()}
    microseconds = {how: {name: round(1e6 * t, 1) for name, t in times.items()} for how, times in medians.items()}
    benchmark.group = group
    benchmark.extra_info.update(device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", ratios=ratios,
                                threads=torch.get_num_threads(), torch=torch.__version__, microseconds=microseconds)
    for how, of_others in ratios.items():
        print(f"\n{group}, {how}: {microseconds[how][ours]:.0f} us; "
              + ", ".join(f"{name} {ratio} x" for name, ratio in of_others.items()), end="")
    benchmark.pedantic(lambda: (versions[ours](), synchronise()), rounds=3)
    return medians["in turn"][ours], ratios["in turn"]


def eager_blend(z, ratio, noise):
    unit = z / z.norm(dim=-1, keepdim=True)
    u = noise - (noise * unit).sum(-1, keepdim=True) * unit
    return (1 - ratio).sqrt()[..., None] * unit + ratio.sqrt()[..., None] * u / u.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows, d", [(120, 256), (4096, 256), (4096, 1024), (16384, 256), (5120, 32)])
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


SETS = [(4096, 8, 64), (8, 4, 256), (128, 8, 256), (1024, 16, 256), (1024, 32, 256), (4096, 32, 256), (1024, 64, 256),
        (1024, 16, 1024), (128, 64, 1024)]  # the table that the median is of
SMALL = [(8, 1, 64), (4096, 1, 64), (128, 64, 64)]
QR_RATIOS = {}


@pytest.mark.parametrize("batch, n, d", SMALL + SETS)
def bench_set(benchmark, batch, n, d):
    x = torch.randn(batch, n, d, device=DEVICE)
    _, ratios = compare(benchmark, f"gram_schmidt-{batch}x{n}x{d}",
                        {"auto": lambda: gram_schmidt(x), "cgs2": lambda: gram_schmidt(x, method="cgs2"),
                         "torch.linalg.qr": lambda: torch.linalg.qr(x.mT)}, 2 * x.numel() * 4)
    QR_RATIOS[batch, n, d] = ratios["torch.linalg.qr"]
    if QR_RATIOS.keys() >= set(SETS):
        print(f"\ntorch.linalg.qr, median of the table: {statistics.median(QR_RATIOS[size] for size in SETS)} x")


DIRECTIONS = {}  # k -> seconds


@pytest.mark.parametrize("k", [4, 8, 16, 32, 64, 128])
def bench_directions(benchmark, k):
    z = torch.randn(1024, 256, device=DEVICE)
    DIRECTIONS[k], _ = compare(benchmark, f"directions-1024x256-{k}",
                               {"hadamard": lambda: orthogonal_directions(z, k, kind="hadamard"),
                                "haar": lambda: orthogonal_directions(z, k),
                                "torch.linalg.qr": lambda: torch.linalg.qr(
                                    torch.cat([z[:, None], torch.randn(1024, k, 256, device=DEVICE)], 1).mT)},
                               1024 * 256 * k * 4)
    print("\nhadamard, ns per element as k grows: "
          + ", ".join(f"{k}: {1e9 * t / (1024 * 256 * k):.2f}" for k, t in DIRECTIONS.items()))
