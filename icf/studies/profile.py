"""Where a training step spends its time: its parts and operators, forward and backward, as torch.profiler sees them."""
from __future__ import annotations

import ctypes
import gc
import gzip
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.autograd import DeviceType
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.profiler import ProfilerActivity, record_function

from icf.config import Config
from icf.data import Batch
from icf.engine.train import compile_model, parameter_groups, train_step
from icf.files import write_atomic
from icf.model.icf import ICF

PARTS = {"visual encoder": "visual.forward", "audio encoder": "audio.forward", "visual context": "context.forward",
         "MIT": "objective.read", "SC": "objective.imagine", "pixel decoder": "pixel_decoder.forward",
         "decoder": "decoder.forward", "loss": "_losses", "CDCL": "objective.contrast"}
"""The stages of `ICF._step`, and the method of the model that each is."""

OPERATORS = {"ms_deform_attn": "icf_kernels.ms_deform_attn.api.ms_deform_attn_fused",
             "orthogonal_blend": "icf.objective.sc.orthogonal_blend", "gw_contrast": "icf.objective.cdcl.gw_contrast",
             "gw_text_contrast": "icf.objective.cdcl.gw_text_contrast"}
"""The operators of the step, on whatever backend, and the name under which their caller finds each."""

WHOLE, OPTIMIZER, REST = "step", "optimiser", "rest"
BACKWARD = "autograd::engine::evaluate_function"


class Step:
    """A training step, as `icf train` takes it, on random clips of the size that the configuration gives.

    Args:
        cfg: sizes, model and recipe. Weights of the encoders are random; those of text towers are needed.
        device: cpu, cuda, ..; by default an accelerator if there is one.
    """

    def __init__(self, cfg: Config, device: str | None = None):
        on_cpu = torch.device(device).type == "cpu" if device else not torch.accelerator.is_available()
        self.accelerator, self.cfg = Accelerator(cpu=on_cpu, mixed_precision=cfg.train.amp), cfg
        set_seed(cfg.train.seed)
        model = ICF(cfg.model, cfg.loss, cfg.objective, pretrained=False).train()
        compile_model(model, cfg.train)
        optimizer = AdamW(parameter_groups(model, cfg.train), fused=self.device.type in ("cpu", "cuda"))
        schedule = LambdaLR(optimizer, lambda step: 1.0)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)
        self.batch = random_batch(cfg).to(self.device)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def __call__(self) -> dict[str, Tensor]:
        """The losses of one step, once the device has finished it."""
        with record_function(WHOLE):
            losses = train_step(self.accelerator, self.model, [self.batch], self.optimizer, self.schedule,
                                self.cfg.train.clip)
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
        return losses


def random_batch(cfg: Config) -> Batch:
    """`train.batch` clips of noise, as long and as large as `data` says, with blocky random masks where S4 has
    labels (the first frame), or everywhere."""
    generator = torch.Generator().manual_seed(cfg.train.seed)
    clips, size = (cfg.train.batch, cfg.data.frames), cfg.data.size
    every = torch.ones(clips, dtype=torch.bool)
    first = cfg.data.supervision == "first" or (cfg.data.supervision == "auto" and cfg.data.subset == "s4")
    labelled = every & (torch.arange(cfg.data.frames) < (1 if first else cfg.data.frames))
    masks = torch.randint(0, max(2, cfg.model.classes), (*clips, 4, 4), generator=generator, dtype=torch.uint8)
    masks = masks.repeat_interleave(size // 4, 2).repeat_interleave(size // 4, 3)
    frames = torch.randint(0, 256, (*clips, 3, size, size), generator=generator, dtype=torch.uint8)
    log_mel = torch.randn(*clips, 1, 96, 64, generator=generator)
    return Batch(frames, log_mel, masks, every, labelled, [str(i) for i in range(clips[0])], [()] * clips[0])


@contextmanager
def ranges(methods: Mapping[str, str], owner: object | None = None) -> Iterator[None]:
    """Within, the functions run inside `record_function` ranges of their names, which `emit_nvtx` passes on to NVTX.

    Args:
        methods: for each range, the function, as a dotted path from `owner`, or of modules where there is none.
            What does not exist, as the objective of a baseline, is left out.
    """
    replaced = []
    for name, path in methods.items():
        holder, _, attribute = path.rpartition(".")
        place = import_module(holder) if owner is None else _find(owner, holder)
        if (function := getattr(place, attribute, None)) is not None:
            replaced.append((place, attribute, vars(place).get(attribute)))
            setattr(place, attribute, _in_range(name, function))
    try:
        yield
    finally:
        for place, attribute, own in replaced:
            setattr(place, attribute, own) if own is not None else delattr(place, attribute)


def _find(owner: object, path: str) -> object | None:
    for name in filter(None, path.split(".")):
        owner = getattr(owner, name, None)
    return owner


def _in_range(name: str, function):
    @wraps(function)
    def call(*args, **kwargs):
        with record_function(name):
            return function(*args, **kwargs)
    return call


class Spent(NamedTuple):
    """Seconds per step within a range, and in the backward of what was computed there."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.forward + other.forward, self.backward + other.backward)


def trace(step, steps: int = 1, warmup: int = 1) -> torch.profiler.profile:
    """The profile of `steps` calls of `step`, after others that are not in it."""
    for _ in range(warmup):
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
    return profile


def breakdown(profile: torch.profiler.profile, names: Iterable[str], steps: int = 1) -> dict[str, Spent]:
    """What was spent in each range of `names`, in those of the optimiser, and in the rest: the innermost range counts.

    The backward of a range is found by the numbers that autograd gives its nodes. Times are of the GPU where there is
    one, else of the thread that takes the step.
    """
    names, spent = [*names], defaultdict(Spent)
    events = sorted((e for e in profile.events() if e.device_type == DeviceType.CPU), key=lambda e: e.time_range.start)
    on_gpu, made = any(e.kernels for e in events), {}

    def owner(event) -> tuple[str, bool]:
        while event is not None:
            if event.name in names:
                return event.name, False
            if event.name.startswith("Optimizer."):
                return OPTIMIZER, False
            if event.name.startswith(BACKWARD):
                return made.get((event.fwd_thread, event.sequence_nr), REST), True
            event = event.cpu_parent
        return REST, False

    for event in events:
        name, backward = owner(event)
        if event.sequence_nr >= 0 and not backward:
            made[event.thread, event.sequence_nr] = name    # ops that make no node carry the number of the next one
        seconds = 1e-6 / steps * (sum(k.duration for k in event.kernels) if on_gpu else event.self_cpu_time_total)
        spent[name] += Spent(0.0, seconds) if backward else Spent(seconds, 0.0)
    return {name: spent[name] for name in (*names, OPTIMIZER, REST) if name in spent}


def profile(cfg: Config, target: Path, steps: int = 1, device: str | None = None) -> None:
    """Trace a training step of `cfg`, print what each part and operator takes, and write a Chrome trace.

    Args:
        target: the trace, .json or .gz.
        steps: how many are traced; the tables give their mean.
        device: see `Step`.
    """
    step = Step(cfg, device)
    with ranges(PARTS, step.accelerator.unwrap_model(step.model)), ranges(OPERATORS):
        traced = trace(step, steps)
    write_atomic(target, lambda path: _export(traced, path, compress=target.suffix == ".gz"))
    console = Console()
    for title, names in ("part", PARTS), ("operator", OPERATORS):
        console.print(_table(title, breakdown(traced, names, steps)))
    if (grown := peak_memory(step, step.device)) is not None:
        console.print(f"memory that a step adds at its peak: {grown / 2**20:.0f} MiB")
    console.print(f"Chrome trace, for chrome://tracing or ui.perfetto.dev: {target}")


def _export(traced: torch.profiler.profile, path: Path, compress: bool) -> None:
    traced.export_chrome_trace(str(path))
    if compress:
        path.write_bytes(gzip.compress(path.read_bytes()))


def emit_nvtx(cfg: Config, steps: int = 1, device: str | None = None) -> None:
    """Training steps whose parts, operators and autograd nodes are NVTX ranges, for Nsight Systems.

    Raises:
        ValueError: there is no NVIDIA GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("profile: --nvtx needs an NVIDIA GPU, and none is visible")
    step = Step(cfg, device)
    step()
    with ranges(PARTS, step.accelerator.unwrap_model(step.model)), ranges(OPERATORS), \
            torch.autograd.profiler.emit_nvtx():
        for _ in range(steps):
            step()


def peak_memory(step, device: torch.device) -> int | None:
    """Bytes by which memory grows while `step` runs: PyTorch's on a GPU, else the process' own, None where the system
    (anything but Linux) does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)        # give back what is free, which would hide growth
    reset.write_text("5")                   # the peak starts from here, see proc(5)
    before = _kibibytes(status, "VmRSS")
    step()
    return (_kibibytes(status, "VmHWM") - before) * 1024


def _kibibytes(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))


def _table(title: str, spent: dict[str, Spent]) -> Table:
    table, total = Table(title, "forward ms", "backward ms", "share"), sum(s.total for s in spent.values())
    for column in table.columns[1:]:
        column.justify = "right"
    for name, own in spent.items():
        table.add_row(name, f"{1e3 * own.forward:.2f}", f"{1e3 * own.backward:.2f}", f"{own.total / total:.1%}")
    table.add_row("step", "", f"{1e3 * total:.2f}", "")
    return table
