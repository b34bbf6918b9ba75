"""Prediction on a video, from the file to masks and overlay: pytest benchmarks/bench_predict.py --benchmark-only -s

The number that counts is `video_s_per_s`, seconds of video per second, in `extra_info` of the results and printed.
Weights are random: what is found does not change what it costs.
"""
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from icf.config import build_config, config_parser
from icf.data.video import write_video
from icf.engine.predict import predict
from icf.model.build import build_model

CONFIGS = Path(__file__).parents[1] / "configs"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS, FPS, HEIGHT, WIDTH = 10, 25, 360, 640


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Blocks of noise that move under white noise."""
    path = tmp_path_factory.mktemp("video") / "noise.mp4"
    generator = np.random.default_rng(0)
    soundfile.write(path.with_suffix(".wav"), generator.uniform(-0.3, 0.3, SECONDS * 16000), 16000)
    blocks = generator.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    frames = ((Fraction(i, FPS), np.roll(blocks, (i, 2 * i), (0, 1))) for i in range(SECONDS * FPS))
    write_video(path, frames, Fraction(FPS), Fraction(1, 1000), path.with_suffix(".wav"))
    return path


@pytest.mark.parametrize("amp", ["no", "bf16"])
@pytest.mark.parametrize("preset", ["toy-s4", "s4-pvt"])
def bench_predict(benchmark, video, tmp_path, preset, amp):
    parser = config_parser(exit_on_error=False)
    cfg = build_config(parser, parser.parse_args([
        "--config", str(CONFIGS / f"{preset}.yaml"), "--model.visual.weights", "none",
        "--model.audio.weights", "none"]))
    model = build_model(cfg, pretrained=False, inference=True)
    benchmark.group = f"predict-{preset}"
    benchmark.pedantic(predict, (model, cfg, video, tmp_path), {"device": DEVICE, "amp": amp, "progress": False},
                       rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
                                threads=torch.get_num_threads(), torch=torch.__version__, amp=amp,
                                video_s_per_s=round(SECONDS / benchmark.stats.stats.median, 2))
    print(f"\n{preset}, amp {amp}: {benchmark.extra_info['video_s_per_s']} s of video per second")
