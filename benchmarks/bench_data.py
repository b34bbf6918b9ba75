"""Reading clips, from disk and from memory, and the log-mel front end: pytest benchmarks/bench_data.py --benchmark-only

The number that counts is `clips_per_s` of a loader with two workers, in `extra_info` of the saved results and printed.
"""
import pytest
import torch
from PIL import Image

from icf.config import DataConfig
from icf.data import build_dataset, collate, toy
from icf.data.audio import log_mel_examples, resample
from icf.data.avsbench import read_index

SIZES = {"s4": (224, 224), "ms3": (224, 224), "avss": (320, 180), "avss-720p": (1280, 720)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    toy.generate(root, "tiny", clips=(24, 1, 1), progress=False)
    large = tmp_path_factory.mktemp("large")
    toy.generate(large, "tiny", clips=(24, 1, 1), subsets=("avss",), progress=False)
    for record in read_index(large / "AVSBench_semantic", "avss"):
        for path in (*record.frames, *record.masks[:record.labelled]):
            with Image.open(path) as image:
                enlarged = image.resize(SIZES["avss-720p"], Image.Resampling.NEAREST)
            enlarged.save(path, quality=95)
    return {"avss-720p": large}, root


def load(root, case, **settings):
    subset, frames = case.partition("-")[0], 10 if case.startswith("avss") else 5
    return build_dataset(DataConfig(root=root[0].get(case, root[1]), subset=subset, frames=frames, **settings), "train")


@pytest.mark.parametrize("source", ["disk", "memory"])
@pytest.mark.parametrize("size", [96, 224])
@pytest.mark.parametrize("case", SIZES)
def bench_clip(benchmark, root, case, size, source):
    dataset = load(root, case, size=size, cache=source == "memory")
    places = iter(list(range(len(dataset))) * 100)
    for place in range(len(dataset)):
        dataset[place]
    benchmark.pedantic(lambda: dataset[next(places)], rounds=2 * len(dataset))


@pytest.mark.parametrize("augmentation", ["none", "combo"])
@pytest.mark.parametrize("case", ["s4", "avss-720p"])
def bench_loader(benchmark, root, case, augmentation):
    dataset = load(root, case, cache=False, augmentation=augmentation)
    loader = torch.utils.data.DataLoader(dataset, 4, num_workers=2, collate_fn=collate, persistent_workers=True)
    benchmark.pedantic(lambda: [None for _ in loader], rounds=5, warmup_rounds=1)
    benchmark.extra_info["clips_per_s"] = len(dataset) / benchmark.stats["median"]
    print(f"\n{case}, augmentation {augmentation}: {benchmark.extra_info['clips_per_s']:.0f} clips/s")


@pytest.mark.parametrize("seconds", [5, 10])
def bench_log_mel(benchmark, seconds):
    benchmark(log_mel_examples, torch.randn(16000 * seconds) * 0.1)


@pytest.mark.parametrize("rate", [44100, 48000])
def bench_resample(benchmark, rate):
    benchmark(resample, torch.randn(rate * 5) * 0.1, rate)
