"""A whole training step, forward, backward and optimiser: pytest benchmarks/bench_train_step.py --benchmark-only -s

Four versions take turns on one model: `fast`, the operators as chosen automatically; `reference`, all of them by their
definitions in plain PyTorch; `grid_sample`, the same with deformable attention as Deformable DETR composes it, which is
faster than its definition; `dense contrast`, `grid_sample` with the contrast as the paper prints it, on d x d
covariances by torch.linalg, as one would write the method down without this package. `extra_info` keeps the median
ratio of each to ours, what memory grows by, and what every part and operator takes.

The second benchmark finds the share of the training objective at the paper's sizes, where a whole step is too large for
a small machine: its parts run at their full size, the rest for one clip, and counts as often as there are clips.
"""
import statistics
import time
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
import yaml

from icf.cli import preset_file
from icf.config import Config
from icf.objective.objective import ICFObjective
from icf.studies.profile import OPERATORS, OPTIMIZER, PARTS, Step, breakdown, peak_memory, ranges, trace
from icf_kernels._common.backend import use_backend
from icf_kernels._common.testing import map_differentiable
from icf_kernels.gw_contrast import api
from icf_kernels.gw_contrast.reference import dense_gaussian_entropy, dense_gaussian_wasserstein
from icf_kernels.ms_deform_attn import reference as deformable
from icf_kernels.ms_deform_attn.cases import by_grid_sample, composed

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SMALL = {"visual": {"name": "pvt_v2_b0", "weights": "none"}, "audio": {"weights": "none"}}
FULL = {"visual": {"name": "pvt_v2_b5", "weights": "none"}, "audio": {"weights": "none"}}
TEXT = {"mit": {"frame": "hash", "video": "hash", "audio": "hash"}}  # towers that need no file
ON_GPU = {"model": FULL, "objective": TEXT, "train": {"amp": "bf16"}}
COMPILED = {**ON_GPU, "train": {**ON_GPU["train"], "compile": "inductor"}}
STEPS = {"toy": ("toy-s4", {}),
         "s4": ("s4-pvt", ON_GPU if CUDA else {"model": SMALL, "objective": TEXT, "train": {"batch": 2}}),
         **({"s4-compiled": ("s4-pvt", COMPILED)} if CUDA else {})}
ROUNDS = {"toy": 7, "s4": 2, "s4-compiled": 7}  # those of s4 take 35 seconds on two cores
PARTS_OF_OBJECTIVE = {"MIT": "read", "SC": "imagine", "CDCL": "contrast"}


def configuration(preset, changes):
    with open(preset_file(preset)) as file:
        values = yaml.safe_load(file)
    return Config.from_dict(merge(values, changes))


def merge(values, changes):
    return {**values, **{key: merge(values.get(key, {}), change) if isinstance(change, dict) else change
                         for key, change in changes.items()}}


def dense_w2(x, y, x_mask=None, y_mask=None, spectral="plain", regularization=1e-2, eps=1e-2, *, backend=None):
    """`gaussian_w2` as printed, for clips without padding; eps is in every covariance, so that roots have gradients."""
    distances = torch.stack([dense_gaussian_wasserstein(a, b, eps) for a, b in zip(x.float(), y.float(), strict=True)])
    return distances, *(dense_gaussian_entropy(z.float().flatten(0, 1), eps).view(z.shape[:2]) for z in (x, y))


def attend_by_grid_sample(*args):
    """In float32, as Deformable DETR's runs under autocast."""
    return by_grid_sample(*composed(*map_differentiable(torch.Tensor.float, args))).to(args[0].dtype)


GRID_SAMPLE, DENSE = (deformable, "ms_deform_attn_fused", attend_by_grid_sample), (api, "gaussian_w2", dense_w2)
VERSIONS = {"fast": (), "reference": (), "grid_sample": (GRID_SAMPLE,), "dense contrast": (GRID_SAMPLE, DENSE)}


@contextmanager
def version(name):
    with use_backend("auto" if name == "fast" else "reference"), ExitStack() as stack:
        for replaced in VERSIONS[name]:
            stack.enter_context(patch.object(*replaced))
        yield


def in_turn(step, rounds, versions):
    """What memory grows by in each version, in a round that warms up, and its seconds in each of the others."""
    step()  # the optimiser allocates its state
    memory, seconds = {}, {name: [] for name in versions}
    for name in versions:
        with version(name):
            memory[name] = peak_memory(step, torch.device(DEVICE))
    for _ in range(rounds):
        for name in versions:
            with version(name):
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
    return seconds, memory


def compare(seconds):
    """Median seconds of each version, and the median over rounds of how many times longer than ours it took."""
    ratios = {name: [t / f for t, f in zip(times, seconds["fast"], strict=True)] for name, times in seconds.items()}
    return dict(seconds={name: statistics.median(times) for name, times in seconds.items()},
                times_fast={name: round(statistics.median(ratios[name]), 2) for name in ratios if name != "fast"})


def milliseconds(spent):
    return {name: [round(1e3 * value, 2) for value in pair] for name, pair in spent.items()}


def machine():
    return dict(device=torch.cuda.get_device_name() if CUDA else "cpu", threads=torch.get_num_threads(),
                torch=torch.__version__)


@pytest.mark.parametrize("case", STEPS)
def bench_train_step(benchmark, case):
    cfg = configuration(*STEPS[case])
    step, parts, operators = Step(cfg), {}, {}
    compiled = cfg.train.compile != "no"
    seconds, memory = in_turn(step, ROUNDS[case], [*VERSIONS][:2] if compiled else VERSIONS)
    for name in () if compiled else VERSIONS:  # compiled code has no parts
        with version(name), ranges(PARTS, step.model), ranges(OPERATORS):
            traced = trace(step, warmup=0)
        parts[name], operators[name] = (milliseconds(breakdown(traced, names)) for names in (PARTS, OPERATORS))
    compared = compare(seconds)
    benchmark.group = f"train_step-{case}"
    benchmark.extra_info.update(
        **machine(), **compared, parts=parts, operators=operators, dtype=cfg.train.amp.replace("no", "float32"),
        encoder=cfg.model.visual.name, clips=cfg.train.batch, frames=cfg.data.frames, size=cfg.data.size,
        clips_per_s={name: round(cfg.train.batch / t, 2) for name, t in compared["seconds"].items()},
        peak_memory_growth_mb={name: grown and round(grown / 1e6, 1) for name, grown in memory.items()})
    print(f"\n{benchmark.group}: {1e3 * compared['seconds']['fast']:.0f} ms; " +
          ", ".join(f"{name} {ratio} x" for name, ratio in compared["times_fast"].items()))
    benchmark.pedantic(step, rounds=3 if case == "toy" else 1)


def objective_step(cfg):
    """Forward and backward of the objective alone, on random features of the sizes that PVT-v2 and the decoder give."""
    torch.manual_seed(0)
    generator = torch.Generator(DEVICE).manual_seed(1)
    clips, dim = (cfg.train.batch, cfg.data.frames), cfg.model.decoder.dim
    objective = ICFObjective(dim, dim, cfg.objective, map_dims=(320, 512), sound_dim=128, attended=("segment",))
    objective.to(DEVICE)
    features = [torch.randn(*clips, *shape, generator=generator, device=DEVICE, requires_grad=True) for shape in (
        (dim, 56, 56), (dim,), (320, 14, 14), (512, 7, 7), (128,))]

    def step():
        visual, audio, *maps, sound = features
        objective(visual, audio, maps=maps, sound=sound)["total"].backward()
        if CUDA:
            torch.cuda.synchronize()

    return objective, step


def bench_share_of_objective(benchmark):
    """PVT-v2-b5, B = 8, T = 5, d = 256: what MIT, SC and CDCL take of the step. Text towers are not the paper's."""
    cfg = configuration("s4-pvt", {"model": FULL, "objective": TEXT})
    objective, step = objective_step(cfg)
    versions = [name for name in VERSIONS if name != "grid_sample"]  # no deformable attention here
    (seconds, _), parts = in_turn(step, 1, versions), {}
    for name in versions:
        with version(name), ranges(PARTS_OF_OBJECTIVE, objective):
            parts[name] = breakdown(trace(step, warmup=0), PARTS_OF_OBJECTIVE)
    clips, cfg.train.batch = cfg.train.batch, 1
    whole = Step(cfg)
    with ranges(PARTS, whole.model):
        spent = breakdown(trace(whole), PARTS)
    others = sum((1 if name == OPTIMIZER else clips) * s.total for name, s in spent.items()
                 if name not in PARTS_OF_OBJECTIVE)
    share = {name: {part: round(own[part].total / (others + sum(own[p].total for p in PARTS_OF_OBJECTIVE)), 4)
                    for part in PARTS_OF_OBJECTIVE} for name, own in parts.items()}
    benchmark.group = "share_of_objective"
    benchmark.extra_info.update(**machine(), **compare(seconds), share=share, others_seconds=round(others, 3),
                                parts={name: milliseconds(own) for name, own in parts.items()}, dtype="float32",
                                encoder=cfg.model.visual.name, clips=clips, frames=cfg.data.frames, size=cfg.data.size)
    print(f"\n{benchmark.group}: " + "; ".join(
        f"{name} " + ", ".join(f"{part} {s:.1%}" for part, s in shares.items()) for name, shares in share.items()))
    benchmark.pedantic(step, rounds=1)
