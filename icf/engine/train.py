"""Training: the loop on Accelerate, its checkpoints, and what a run folder holds.

A run folder holds ``config.yaml`` (resolved), ``metrics.json`` (losses and validation scores), ``checkpoints/``
(training states to resume from), ``best.safetensors`` and ``last.safetensors`` (weights with their configuration
inside), ``tensorboard/``, and, once training has ended, the evaluation of the test split with ``report.html``.
"""
from __future__ import annotations

import json
import math
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from icf.config import Config, TrainConfig
from icf.data import Batch, build_dataset, collate
from icf.data.check import check
from icf.engine.checkpoint import (
    CONFIG,
    WEIGHTS,
    load_state,
    load_weights,
    remove_partial,
    save_state,
    save_weights,
    states,
    step_of,
)
from icf.engine.conditions import conditions
from icf.engine.evaluate import evaluate, hearing, validate
from icf.engine.gradients import gradient_norms
from icf.engine.results import HISTORY
from icf.engine.summary import ONE_PROCESS, launched_alone, started, trained, training
from icf.engine.trackers import check_trackers, start_trackers, track_pictures
from icf.files import write_atomic
from icf.machine import readers
from icf.model.build import build_model
from icf.model.losses import OBJECTIVE
from icf.ops import use_backend


@dataclass
class Progress:
    """How far a run has come; saved with every training state, so that a resumed run goes on where it stopped."""

    epoch: int = 0  # epochs finished
    seen: int = 0  # clips of the current epoch that all processes together have been through
    step: int = 0  # optimiser steps
    best: float = -1.0  # highest J&F on the validation split
    steps: list[dict] = field(default_factory=list)  # losses and learning rate, every train.log_every steps
    evaluations: list[dict] = field(default_factory=list)  # scores of the validation split

    state_dict = asdict

    def load_state_dict(self, state: dict) -> None:
        for name, value in asdict(self).items():
            if type(state[name]) is not type(value):
                raise TypeError(f"{name}: expected {type(value).__name__}, got {type(state[name]).__name__}")
        self.__dict__.update(state)


class EpochSampler(Sampler[int]):
    """A permutation of ``n`` clips that depends on (seed, epoch) alone, from the ``start``-th on.

    Resuming sets ``start``, so nothing is loaded twice and the order is that of the uninterrupted run.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed, self.epoch, self.start = n, seed, 0, 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.n, generator=generator)[self.start:].tolist())

    def __len__(self) -> int:
        return max(self.n - self.start, 0)


def train(cfg: Config, resume: bool = False) -> dict:
    """Train the model of ``cfg``, then evaluate the best weights on the test split and write the report.

    Args:
        resume: go on from the newest training state in ``cfg.out``. The result is that of an uninterrupted run.

    Returns:
        The scores of the test split.

    Raises:
        FileExistsError: ``cfg.out`` holds a run already and ``resume`` is not set.
        FileNotFoundError: there is nothing to resume.
        ValueError: ``cfg.backend`` cannot run here, or a tracker is not installed.
        OSError: the machine ended the run (a full disk, a killed reader, no memory); the message tells how to go on.
    """
    with use_backend(cfg.backend):
        accelerator = start(cfg, resume)
        with machine_errors(cfg.out):
            return run(accelerator, cfg, resume)


def run(accelerator: Accelerator, cfg: Config, resume: bool) -> dict:
    with accelerator.main_process_first():  # which writes the toy benchmark where it is missing
        train_set, val_set, test_set = (build_dataset(cfg.data, split) for split in ("train", "val", "test"))
    check_data(cfg, train_set, val_set, test_set)
    train_set.seed = cfg.train.seed
    sampler = EpochSampler(len(train_set), cfg.train.seed)
    loader = build_loader(train_set, cfg, sampler)

    set_seed(cfg.train.seed)
    model = build_model(cfg, pretrained=not resume)
    if cfg.train.init_from is not None and not resume:
        kept = load_weights(model, cfg.train.init_from, strict=False)
        accelerator.print(f"started from {cfg.train.init_from}" + (f"; new: {', '.join(kept)}" if kept else ""))
    compile_model(model, cfg.train)
    epochs, total_steps = length(cfg.train, len(loader), accelerator.num_processes)
    optimizer = AdamW(parameter_groups(model, cfg.train), fused=accelerator.device.type in ("cpu", "cuda"))
    schedule = LambdaLR(optimizer, lambda step: lr_factor(cfg.train, step, total_steps))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    splits = {"train": train_set, "val": val_set, "test": test_set}
    accelerator.print(started("resume" if resume else "train", cfg.out, accelerator.device, accelerator.num_processes,
                              **training(cfg, model, splits, accelerator.num_processes)))
    if launched_alone():
        accelerator.print(ONE_PROCESS)
    if cfg.objective.enabled and cfg.objective.mit.enabled:
        accelerator.print(accelerator.unwrap_model(model).objective.mit.cost())
    progress = Progress()
    if resume:
        load_state(accelerator, newest_state(cfg.out), schedule=schedule, progress=progress)
    write_config(accelerator, cfg)  # what was asked for has passed all checks: the first change to the run's folder
    if not resume:
        save_state(accelerator, cfg.out, progress.step, schedule=schedule, progress=progress)  # something to resume
    start_trackers(accelerator, cfg, progress.step)

    bar = tqdm(total=total_steps, initial=progress.step, unit="step", disable=not accelerator.is_local_main_process)
    with stop_requested(accelerator) as stopping, bar:
        while progress.epoch < epochs and progress.step < total_steps:
            loader.set_epoch(progress.epoch)  # and of the data set; by itself it counts from the epoch resumed in
            sampler.epoch = progress.epoch
            sampler.start = progress.seen
            if train_epoch(accelerator, model, loader, optimizer, schedule, cfg, progress, total_steps, bar, stopping):
                save_state(accelerator, cfg.out, progress.step, schedule=schedule, progress=progress)
                raise KeyboardInterrupt(f"stopped and saved; icf train --resume {cfg.out} goes on")
            through = progress.seen >= len(train_set)  # else train.iters ends within the epoch, which may go on later
            progress.epoch, progress.seen = (progress.epoch + 1, 0) if through else (progress.epoch, progress.seen)
            finished = progress.epoch >= epochs or progress.step >= total_steps
            if finished or (cfg.train.evaluate_every and progress.epoch % cfg.train.evaluate_every == 0):
                validation(accelerator, model, val_set, cfg, progress, finished)
            save_state(accelerator, cfg.out, progress.step, schedule=schedule, progress=progress)
    return finish(accelerator, model, cfg)


def start(cfg: Config, resume: bool) -> Accelerator:
    """The accelerator of a run whose folder has, or has not, something to resume."""
    no_device = not torch.accelerator.is_available()  # told, several processes share the work on CPUs too
    accelerator = Accelerator(cpu=no_device, mixed_precision=cfg.train.amp, project_dir=str(cfg.out),
                              dataloader_config=DataLoaderConfiguration(non_blocking=True))
    check_trackers(cfg.train.trackers)
    if resume:
        newest_state(cfg.out)
    elif states(cfg.out) or (cfg.out / WEIGHTS).exists():
        raise FileExistsError(f"{cfg.out} holds a run already: --resume {cfg.out} goes on with it, --out names another "
                              "folder, or remove it")
    return accelerator


def check_data(cfg: Config, *splits: Dataset) -> None:
    """What would end the run after hours, or its report after all of them, is said before the first step.

    Raises:
        ValueError: a split has no clips, or other classes than the model; own clips hold what `icf data check` calls an
            error.
        FileNotFoundError: files of clips are missing; the message counts them and names the first ones.
    """
    classes = cfg.model.classes
    for data in splits:
        if not len(data):
            how = "; clips.csv says which split a clip is of" if cfg.data.subset == "folder" else ""
            raise ValueError(f"data: the {data.split} split of {data.root} has no clips; training needs clips of each "
                             f"split: train, val and test{how}")
        if len(data.classes) != (0 if classes == 1 else classes):
            names = f"{len(data.classes)}: {', '.join(data.classes[:5])}, .." if data.classes else "1, a foreground"
            raise ValueError(f"model.classes: expected that of the {data.split} split of {data.root} ({names}), got "
                             f"{classes}; --model.classes {len(data.classes) or 1}")
    if cfg.data.subset == "folder":
        errors = [finding for finding in check(cfg.data.root, "folder", progress=False).findings
                  if finding.level == "error"]
        if errors:
            raise ValueError(f"data.root: {errors[0].where}: {errors[0].what}; icf data check {cfg.data.root} "
                             f"--subset folder lists all {len(errors)} errors")
    try:
        conditions(splits[-1], cfg, cfg.eval.negatives)
    except ValueError as error:
        raise ValueError(f"eval.negatives: the report of the test split needs what it has not: {error}; "
                         "--eval.negatives '[]' does without") from None
    sounds = [record.sound for record in splits[-1].records] if cfg.eval.negatives else []  # to pair test clips anew
    files = chain(sounds, *(data.files() for data in splits))
    missing = sorted({str(path) for path in files if not path.is_file()})
    if missing:
        raise FileNotFoundError(f"{len(missing)} files of the data set are missing, as {', '.join(missing[:3])}; icf "
                                f"data check {cfg.data.root} --subset {cfg.data.subset} lists them")


def write_config(accelerator: Accelerator, cfg: Config) -> None:
    """The resolved configuration, in the run's folder, from which what a killed process left is removed."""
    if accelerator.is_main_process:
        remove_partial(cfg.out)
        write_atomic(cfg.out / CONFIG, lambda path: path.write_text(yaml.safe_dump(cfg.to_dict(), sort_keys=False)))
    accelerator.wait_for_everyone()


def newest_state(run: Path) -> Path:
    if not states(run):
        raise FileNotFoundError(f"{run} holds no training state to resume from; icf train without --resume starts anew")
    return states(run)[0]


# What libraries say, in a RuntimeError, where the machine failed and not the program.
ONEDNN = "could not create a primitive"
MACHINE = re.compile(rf"DataLoader worker \(pid|Too many open files|allocate memory|out of memory|{ONEDNN}")


@contextmanager
def machine_errors(run: Path) -> Iterator[None]:
    """Tells in one line what of the machine ended a run, and how to go on; other errors pass as they are."""
    show = threading.excepthook
    # TensorBoard's thread hands its error to the loop, too
    threading.excepthook = lambda failed: None if failed.exc_type is OSError else show(failed)
    try:
        yield
    except Exception as error:
        machine = type(error) in (OSError, MemoryError) or MACHINE.search(str(error))  # its subclasses name a setting
        if not machine or not states(run):
            raise
        said = (str(error) or "out of memory").strip().splitlines()[-1]  # before it, the traceback of a reader
        said = f"out of memory, it seems: {said}" if said == ONEDNN else said
        raise OSError(f"{said}; icf train --resume {run} goes on after step {step_of(states(run)[0])}") from error
    finally:
        threading.excepthook = show


def build_loader(dataset: Dataset, cfg: Config, sampler: Sampler) -> DataLoader:
    """Batches of clips, read by ``data.workers`` processes into pinned memory where a GPU will take them."""
    workers = readers(cfg.data.workers)
    return DataLoader(dataset, cfg.train.batch, sampler=sampler, num_workers=workers, collate_fn=collate,
                      pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0)


def compile_model(model: nn.Module, train: TrainConfig) -> None:
    """In place, so that names of parameters and what wraps the model stay as they are."""
    if train.compile != "no":
        model.compile(backend=train.compile)


def length(train: TrainConfig, batches: int, processes: int) -> tuple[int, int]:
    """Epochs and optimiser steps of the whole run; ``batches`` is what one process would see in an epoch."""
    steps_per_epoch = math.ceil(math.ceil(batches / processes) / train.accumulate)
    if train.iters is None:
        return train.epochs, train.epochs * steps_per_epoch
    return math.ceil(train.iters / steps_per_epoch), train.iters


LINEAR = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase)


def parameter_groups(model: nn.Module, train: TrainConfig) -> list[dict]:
    """AdamW's groups: decay for matrices of linear maps and convolutions alone, so that nothing that is learned as it
    is, queries, positions, levels, pseudo-words, codes, norms and biases, decays; a smaller rate for the visual encoder
    *(COMBO)*."""
    decaying = {id(p) for m in model.modules() if isinstance(m, LINEAR) for p in m.parameters(recurse=False)
                if p.ndim > 1}
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith("visual."), id(parameter) in decaying), []).append(parameter)
    return [{"params": parameters, "lr": train.lr * (train.backbone_lr if backbone else 1),
             "weight_decay": train.weight_decay if decays else 0.0}
            for (backbone, decays), parameters in groups.items()]


def lr_factor(train: TrainConfig, step: int, total: int) -> float:
    """What the learning rates are multiplied by at ``step`` of ``total``."""
    if step < train.warmup:
        return (step + 1) / train.warmup
    done = min((step - train.warmup) / max(total - train.warmup, 1), 1.0)
    return {"poly": (1 - done) ** train.power, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[
        train.schedule]


def train_epoch(accelerator, model, loader, optimizer, schedule, cfg, progress, total_steps, bar, stopping) -> bool:
    """The rest of the epoch that ``progress`` stands in. Returns early, with True, where a stop was asked for."""
    model.train()
    batches, since, seen = iter(loader), time.perf_counter(), progress.seen
    while group := list(islice(batches, cfg.train.accumulate)):
        # What is random in a step depends on (seed, step) alone, so a resumed run needs no generator states.
        norms = cfg.train.gradient_norms and (progress.step + 1) % (10 * cfg.train.log_every) == 0
        losses = train_step(accelerator, model, group, optimizer, schedule, cfg.train.clip,
                            cfg.train.seed * 1_000_003 + progress.step, norms)
        progress.seen += len(group) * cfg.train.batch * accelerator.num_processes
        progress.step += 1
        bar.update()
        due = progress.step % cfg.train.log_every == 0
        if due or progress.step == total_steps:
            log(accelerator, losses, schedule, progress, bar)  # which waits for the device
            now = time.perf_counter()
            accelerator.log({"clips/s": (progress.seen - seen) / (now - since)}, step=progress.step)
            since, seen = now, progress.seen
        if progress.step >= total_steps:
            return False
        if (due or accelerator.num_processes == 1) and stopping():
            return True
        if cfg.train.save_every and progress.step % cfg.train.save_every == 0:
            save_state(accelerator, cfg.out, progress.step, schedule=schedule, progress=progress)
    return False


def train_step(accelerator: Accelerator, model, group: Sequence[Batch], optimizer, schedule, clip: float,
               seed: int = 0, norms: bool = False) -> dict[str, Tensor]:
    """A step of the optimiser on the batches of a group (``train.accumulate``) and of all processes: their gradients
    add up to that of one large batch, but for the contrast, whose negatives are those of a batch. With the `norms` of
    the gradients of its terms among the losses, and, of all steps of this model so far: `skipped`, how many were left
    out, as some gradient was not finite, and `left_out`, how much of what running statistics were to follow."""
    losses = []
    for place, (batch, share) in enumerate(zip(group, shares(accelerator, model, group), strict=True)):
        # Batches and processes draw their own numbers; the primes keep steps and processes apart.
        torch.manual_seed(seed * 1009 + place * accelerator.num_processes + accelerator.process_index)
        with nullcontext() if place == len(group) - 1 else accelerator.no_sync(model):
            own = model(batch)
            own.terms.update(gradient_norms(accelerator.unwrap_model(model), own) if norms else {})
            own = own.shared(share)
            accelerator.backward(own.total)
        losses.append(own.detached())
    skipped = finite_step(accelerator, model, optimizer, clip)
    schedule.step()
    optimizer.zero_grad(set_to_none=True)
    left_out = [counted for name, counted in model.named_buffers() if name.endswith("left_out")]
    return {**{name: sum(row[name] for row in losses) for name in losses[0]}, "skipped": skipped,
            "left_out": sum(left_out, torch.zeros_like(skipped))}


def finite_step(accelerator: Accelerator, model: nn.Module, optimizer, clip: float) -> Tensor:
    """A step along the gradients, clipped if `clip` is not 0, which leaves weights and optimiser as they are where any
    is not finite; returns how many of this optimiser's have so far. A fused optimiser decides on its device, so that
    nothing waits for that; others wait. With a scaler of gradients, it decides."""
    norm = accelerator.clip_grad_norm_(model.parameters(), clip or math.inf)
    skip = (~norm.isfinite()).float()
    inner = getattr(optimizer, "optimizer", optimizer)                      # in Accelerate's
    fused = getattr(inner, "_step_supports_amp_scaling", False)
    if fused and accelerator.scaler is None:
        inner.found_inf = skip
    if fused or accelerator.scaler is not None or not skip:
        optimizer.step()
    optimizer.skipped = getattr(optimizer, "skipped", 0) + skip
    return optimizer.skipped


def shares(accelerator: Accelerator, model, group: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """What the terms of each batch of a group are to be multiplied by. A term is a mean over what it counts, pixels or
    frames; weighed by that, the means add up to the mean over the group and over all processes."""
    processes = accelerator.num_processes
    if len(group) * processes == 1:
        return [{}]
    counts = [accelerator.unwrap_model(model).counts(batch) for batch in group]
    names = list(counts[0])
    own = torch.stack([torch.stack([count[name] for name in names]) for count in counts]).float()  # [batches, terms]
    whole = accelerator.reduce(own.sum(0), "sum").clamp(min=1e-6)
    weighed = own * processes / whole                                       # DDP divides by the processes
    rest = weighed.new_tensor(1 / len(group))
    return [{OBJECTIVE: rest, **dict(zip(names, row, strict=True))} for row in weighed]


def log(accelerator: Accelerator, losses: dict[str, Tensor], schedule: LambdaLR, progress: Progress, bar) -> None:
    """Read the losses of this step, the only place of the loop that waits for the device. A step whose loss is not
    finite was skipped and is told, not kept; FloatingPointError where all since the last one that is kept were."""
    values = {name: value.item() for name, value in losses.items()}
    if not math.isfinite(values["total"]):
        last = progress.steps[-1] if progress.steps else {"step": 0}
        said = f"the loss became {values['total']} at step {progress.step}"
        if values["skipped"] - last.get("skipped", 0) >= progress.step - last["step"] >= HOPELESS:
            raise FloatingPointError(f"{said}, and no step since {last['step']} could be made: {values}")
        tqdm.write(f"{said}, which is skipped; {values['skipped']:.0f} so far")
        return
    row = {"loss": values.pop("total"), "lr": max(schedule.get_last_lr()), **values}
    progress.steps.append({"step": progress.step, **row})
    accelerator.log(row, step=progress.step)
    bar.set_postfix(loss=f"{row['loss']:.3f}", epoch=progress.epoch + 1)


def validation(accelerator: Accelerator, model, val_set: Dataset, cfg: Config, progress: Progress,
               last: bool = False) -> None:
    """Score the validation split, keep the weights if they are the best so far, and write ``metrics.json``; at the
    last one, say so where the model does not listen."""
    scores = {name: 0.0 if math.isnan(value) else value  # nan: a split without any object
              for name, value in validate(model, val_set, cfg, accelerator).items()}
    if audible(cfg, val_set):
        scores |= hearing(model, val_set, cfg, accelerator)
    progress.evaluations.append({"epoch": progress.epoch, "step": progress.step, **scores})
    accelerator.log({f"val/{name}": value for name, value in scores.items()}, step=progress.step)
    track_pictures(accelerator, model, val_set, cfg, progress.step)
    state = accelerator.get_state_dict(model)
    better = scores["J&F"] > progress.best
    progress.best = max(progress.best, scores["J&F"])
    if accelerator.is_main_process:
        notes = {"step": progress.step, "scores": scores, "classes": list(val_set.classes)}
        save_weights(cfg.out / "last.safetensors", state, cfg, **notes)
        if better:
            save_weights(cfg.out / WEIGHTS, state, cfg, **notes)
        history = json.dumps({"steps": progress.steps, "evaluations": progress.evaluations})
        write_atomic(cfg.out / HISTORY, lambda path: path.write_text(history))
        tqdm.write(f"epoch {progress.epoch}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        if last and scores.get("J heard", 1) < DEAF:
            tqdm.write(DEAF_ADVICE.format(scores["J heard"]))


HOPELESS = 10
"""Steps without a finite gradient that end a run."""
DEAF = 0.05
"""Of what J loses with another sound."""
DEAF_ADVICE = """With another clip's sound J falls by no more than {:.3f}: the model goes by the picture alone. Try:
  model.audio.weights    a trained sound encoder; --model.audio.standardise true for one that is not
  data.negatives 0.25    clips with a sound that belongs to nothing in them, in training
  train.lr, train.warmup a smaller rate, a longer start: what salience explains is learned first
"""


def audible(cfg: Config, dataset: Dataset) -> bool:
    """Whether clips of a data set can be given the sound of another, to a model that has ears."""
    heard = cfg.model.network != "icf" or cfg.model.decoder.query_mode != "learnable"
    return heard and len(dataset) > 1 and cfg.data.audio_source == "wav"


def finish(accelerator: Accelerator, model, cfg: Config) -> dict:
    """Evaluate the best weights on the test split and write the report."""
    accelerator.wait_for_everyone()
    model = accelerator.unwrap_model(model)
    load_weights(model, cfg.out / WEIGHTS)
    results = evaluate(model, cfg, "test", cfg.out, device=accelerator.device, accelerator=accelerator)
    accelerator.print(trained(cfg.out, cfg.out / WEIGHTS, results))
    accelerator.end_training()  # closes the group of processes too
    return results


@contextmanager
def stop_requested(accelerator: Accelerator):
    """Yields a function that says whether Ctrl-C or SIGTERM has reached any process; a second signal interrupts.

    The function is collective: every process has to call it at the same step.
    """
    received = []

    def handler(number, frame):
        received.append(number)
        signal.signal(number, previous[number])

    def stopping() -> bool:
        if accelerator.num_processes == 1:
            return bool(received)
        return bool(accelerator.reduce(torch.tensor(len(received), device=accelerator.device)).item())

    main = threading.current_thread() is threading.main_thread()  # only there Python takes handlers
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield stopping
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
