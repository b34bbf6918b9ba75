"""Inputs for tests and benchmarks."""
import torch

from .._common.testing import Cases


def make_inputs(shape, dtype, device):
    """Unit frames that scatter around the mean of their clip; `spectral` may end in "-masked", with frames left out."""
    N, Bx, Tx, By, Ty, d, spectral = shape
    generator = torch.Generator().manual_seed(0)

    def frames(B, T):
        clips = torch.randn(N, B, 1, d, generator=generator, dtype=torch.float64)
        x = clips + 0.7 * torch.randn(N, B, T, d, generator=generator, dtype=torch.float64)
        mask = torch.rand(N, B, T, generator=generator) < 0.7
        mask[..., -1] = True
        return torch.nn.functional.normalize(x, dim=-1).to(device, dtype), mask.to(device)

    (x, x_mask), (y, y_mask) = frames(Bx, Tx), frames(By, Ty)
    spectral, _, masked = spectral.partition("-")
    return x, y, x_mask if masked else None, y_mask if masked else None, spectral, 1e-2, 1e-2


CASES = {"gaussian_w2": Cases(
    make_inputs,
    shapes=[(1, 2, 3, 2, 3, 4, "plain"), (1, 3, 5, 2, 4, 8, "smooth"), (2, 1, 3, 4, 3, 7, "entropic"),
            (1, 2, 5, 3, 5, 16, "plain-masked"), (3, 1, 4, 1, 6, 17, "plain-masked"), (1, 3, 10, 3, 10, 64, "plain"),
            (1, 2, 1, 3, 4, 16, "plain"), (1, 2, 2, 9, 2, 3, "plain"), (1, 2, 4, 0, 5, 8, "plain")],
    benchmarks={"batch 8, T 5": (1, 8, 5, 8, 5, 256, "plain"), "batch 8, T 10": (1, 8, 10, 8, 10, 256, "plain"),
                "batch 32, T 10": (1, 32, 10, 32, 10, 256, "plain"),
                "batch 128, T 10": (1, 128, 10, 128, 10, 256, "plain"),
                "batch 128, T 10, smooth": (1, 128, 10, 128, 10, 256, "smooth"),
                "batch 32, T 30": (1, 32, 30, 32, 30, 256, "plain"),
                "text, batch 32, T 10 and 15, K 8": (32, 1, 10, 9, 15, 256, "plain")})}
