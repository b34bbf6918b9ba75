"""Inputs for tests and benchmarks."""
import torch

from .._common.testing import Cases

SEED = 2**40 + 7  # both words of the key matter


def make_blend(shape, dtype, device):
    """`shape` is that of ratio, the width, and options in words; where ratio has 16 candidates, z is shared by them."""
    *rows, d, noise, restore_norm = shape
    generator = torch.Generator().manual_seed(0)
    z = torch.randn([1 if size == 16 else size for size in rows] + [d], generator=generator, dtype=torch.float64)
    ratio = 0.05 + 0.9 * torch.rand(rows, generator=generator, dtype=torch.float64)
    if noise == "given":
        noise = torch.randint(-9, 10, (*rows, d), generator=generator).to(device)  # no gradient is asked of integers
    return z.to(device, dtype), ratio.to(device, dtype), noise, SEED, restore_norm == "norm"


def make_vectors(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype),)


def make_reference_row(shape, dtype, device):
    """`shape` is that of z and the number of directions."""
    *shape, k = shape
    return *make_vectors(shape, dtype, device), k, SEED, "hadamard"


CASES = {
    "orthogonal_blend": Cases(
        make_blend, keywords=("noise", "seed", "restore_norm"),
        shapes=[(3, 5, "gaussian", "unit"), (3, 5, "rademacher", "norm"), (7, 32, "given", "unit"),
                (0, 8, "gaussian", "unit"), (1, 16, 2, 32, "gaussian", "norm"), (3, 130, "rademacher", "unit"),
                (2, 3, 257, "gaussian", "norm"), (4, 2, "given", "norm"), (3, 1500, "gaussian", "unit")],
        benchmarks={"model-5120x32-16-candidates": (8, 16, 5, 8, 32, "gaussian", "norm"),
                    "tokens-120x256": (120, 256, "gaussian", "unit"), "4096x256": (4096, 256, "gaussian", "unit"),
                    "4096x256-rademacher": (4096, 256, "rademacher", "unit"),
                    "4096x1024": (4096, 1024, "gaussian", "unit")}),
    "gram_schmidt": Cases(
        make_vectors,
        shapes=[(2, 3, 5), (1, 7), (4, 17, 33), (2, 2, 6, 64), (0, 3, 4), (2, 0, 4), (2, 24, 48), (1, 20, 300)],
        benchmarks={"128x8x256": (128, 8, 256), "1024x16x256": (1024, 16, 256), "128x64x64": (128, 64, 64)}),
    "orthogonal_directions": Cases(
        make_reference_row, keywords=("seed", "kind"), differentiable=False,
        shapes=[(3, 8, 7), (2, 2, 1), (2, 3, 64, 9), (1, 256, 32), (0, 8, 3), (2, 16, 0), (1, 2048, 3)],
        benchmarks={"1024x32x256": (1024, 256, 32), "128x64x1024": (128, 1024, 64)}),
}
