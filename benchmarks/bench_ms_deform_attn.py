"""Deformable attention against others, interleaved in one process, with the floor of bytes and operations.

    pytest benchmarks/bench_ms_deform_attn.py --benchmark-only -s

Ours is what the automatic choice takes; bench_kernels.py times every backend, the definition among them.
`extra_info` holds sizes, the median seconds of every implementation, and how many times longer it takes than ours.
"""
import statistics
import time

import pytest
import torch

from icf.ops import ms_deform_attn, ms_deform_attn_fused
from icf_kernels._common.testing import require_grad
from icf_kernels.ms_deform_attn import ops
from icf_kernels.ms_deform_attn.cases import BENCHMARKS, by_grid_sample, make_inputs

try:
    from torch_ms_deform_attn import ms_deform_attn as peer  # pip install torch-ms-deform-attn
except ImportError:
    peer = None

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 5, 30  # at least, and at most
SECONDS = 5  # within which rounds are added


def implementations(shape):
    value, sizes, _, locations, weights = plain = make_inputs(shape, torch.float32, DEVICE)
    low = make_inputs(shape, torch.bfloat16, DEVICE)
    runs = {"ours": (ms_deform_attn, plain), "ours, bfloat16": (ms_deform_attn, low),
            "ours, bfloat16 value": (ms_deform_attn, (low[0], *plain[1:])),
            "ours, fused": (ms_deform_attn_fused, make_inputs(shape, torch.float32, DEVICE, fused=True)),
            "grid_sample": (by_grid_sample, plain)}
    if peer is not None:
        shapes = torch.tensor(sizes, device=DEVICE)
        starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
        runs["torch-ms-deform-attn"] = (lambda v, _, __, xy, a: peer(v, shapes, starts, xy, a), plain)
    return runs


def floor(shape, mode, width=4):
    """Bytes that must be moved and operations that must be done: each tensor once, of value what samples can touch."""
    B, Q, M, D, P, *sizes, _ = shape
    S, L = sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True)), len(sizes) // 2
    samples, shapes = B * Q * M * L * P, ((B, S, M, D), sizes, (B, Q, M, L, P, 2), (B, Q, M, L, P))
    value, out, points = B * S * M * D * width, B * Q * M * D * width, 3 * samples * width
    touched = min(value, 4 * samples * D * width)
    forward = {"bytes": touched + points + out, "flops": ops.flops("ms_deform_attn", *shapes)}
    backward = {"bytes": touched + value + 2 * points + out,
                "flops": ops.backward_flops("ms_deform_attn", (B, Q, M * D), *shapes, False)}
    return forward if mode == "forward" else {key: forward[key] + backward[key] for key in forward}


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
@pytest.mark.parametrize("case", BENCHMARKS)
def bench_against_others(benchmark, case, mode):
    def step(function, args):
        if mode == "forward":
            function(*args)
        else:
            args, leaves = require_grad(args)
            out = function(*args)
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    runs = implementations(BENCHMARKS[case])
    seconds = {name: [] for name in runs}
    end = time.perf_counter() + SECONDS
    while len(seconds["ours"]) <= ROUNDS[0] or (time.perf_counter() < end and len(seconds["ours"]) <= ROUNDS[1]):
        for name, run in runs.items():
            if seconds[name] and seconds[name][0] > SECONDS / 2:
                continue  # once is enough
            started = time.perf_counter()
            step(*run)
            seconds[name].append(time.perf_counter() - started)  # the first warms up
    median = {name: statistics.median(times[1:] or times) for name, times in seconds.items()}
    least, (B, Q, M, D, P, *sizes, points) = floor(BENCHMARKS[case], mode), BENCHMARKS[case]
    benchmark.group = f"ms_deform_attn-{case}-{mode}"
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", threads=torch.get_num_threads(),
        torch=torch.__version__, dtype="float32", floor=least, seconds=median,
        rounds=len(seconds["ours"]) - 1, sizes=dict(B=B, Q=Q, M=M, D=D, P=P, levels=sizes, points=points),
        times_ours={name: round(time / median["ours"], 2) for name, time in median.items()},
        gbytes_per_s=round(least["bytes"] / median["ours"] / 1e9, 2),
        gflops_per_s=round(least["flops"] / median["ours"] / 1e9, 2))
    print(f"\n{case} {mode}: " + ", ".join(f"{name} {1e3 * t:.1f} ms ({t / median['ours']:.2f}x)"
                                           for name, t in median.items()))
    benchmark.pedantic(step, runs["ours"], rounds=ROUNDS[0])
