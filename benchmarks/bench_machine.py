"""What the machine itself can do, to which `icf bench report` compares.

    pytest benchmarks/bench_machine.py --benchmark-only

Bytes per second of a copy that fits no cache, read and written, and float32 operations per second of a matrix product.
"""
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COPIED, ORDER = (2**30, 8192) if DEVICE == "cuda" else (2**28, 2048)


def synchronise():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("what", ["copy", "matmul"])
def bench_machine(benchmark, what):
    if what == "copy":
        source = torch.ones(COPIED // 4, device=DEVICE)
        target, done = torch.empty_like(source), 2 * COPIED
        benchmark.pedantic(lambda: (target.copy_(source), synchronise()), rounds=10, warmup_rounds=2)
    else:
        x, done = torch.randn(ORDER, ORDER, device=DEVICE), 2 * ORDER**3
        benchmark.pedantic(lambda: (x @ x, synchronise()), rounds=10, warmup_rounds=2)
    benchmark.group = f"machine-{what}"
    unit = "bytes" if what == "copy" else "flops"
    benchmark.extra_info.update(device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
                                threads=torch.get_num_threads(), torch=torch.__version__, dtype="float32",
                                **{f"{what}_{unit}_per_s": done / benchmark.stats.stats.median})
