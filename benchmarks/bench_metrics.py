"""Scores of AVSS (71 classes) and of binary masks: pytest benchmarks/bench_metrics.py --benchmark-only -s

`seconds_per_10000_frames` in the extra information follows from the median round. The model is not part of it.
"""
import pytest
import torch

from icf.engine.masks import class_map
from icf.engine.metrics import FScore, Jaccard, PixelScores, SemanticScores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FRAMES, CLASSES, SIZE = 40, 71, 224
CLIP = torch.arange(FRAMES, device=DEVICE) // 10


def measure(benchmark, group, step):
    def synchronised():
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = group
    benchmark.pedantic(synchronised, rounds=10, warmup_rounds=2)
    seconds = benchmark.stats.stats.median / FRAMES
    benchmark.extra_info.update(device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
                                threads=torch.get_num_threads(), torch=torch.__version__, frames=FRAMES,
                                frames_per_second=round(1 / seconds), seconds_per_10000_frames=round(1e4 * seconds, 1))
    print(f"\n{benchmark.name}: {1e4 * seconds:.1f} s for 10,000 frames, {torch.get_num_threads()} threads, {DEVICE}")


@pytest.mark.parametrize("mode", ["from_scores", "from_class_maps"])
def bench_semantic(benchmark, mode):
    """J, F, mIoU, FDR in all modes; from class scores [C,H,W] with their arg max, or from class maps."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    target = torch.randint(0, CLASSES, (FRAMES, SIZE, SIZE), generator=generator, device=DEVICE, dtype=torch.uint8)
    scores = torch.rand(FRAMES, CLASSES, SIZE, SIZE, generator=generator, device=DEVICE)
    prediction = class_map(scores)
    metrics = SemanticScores(4, CLASSES).to(DEVICE), PixelScores(4, CLASSES).to(DEVICE)

    def step():
        classes = class_map(scores) if mode == "from_scores" else prediction
        for metric in metrics:
            metric.update(classes, target, CLIP)

    measure(benchmark, "metrics-semantic", step)


def bench_binary(benchmark):
    """J in all modes and the F curves over 255 thresholds of a probability map [H,W]."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    probability = torch.rand(FRAMES, SIZE, SIZE, generator=generator, device=DEVICE)
    target = (torch.rand(FRAMES, SIZE, SIZE, generator=generator, device=DEVICE) < 0.2).to(torch.uint8)
    metrics = Jaccard(4).to(DEVICE), FScore(4).to(DEVICE), PixelScores(4, 2).to(DEVICE)

    def step():
        metrics[0].update(probability, target, CLIP)
        metrics[1].update(probability, target, CLIP)
        metrics[2].update(probability > 0.5, target, CLIP)

    measure(benchmark, "metrics-binary", step)
