"""Weights and training states on disk: safetensors, complete or absent, never half-written."""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from icf import __version__
from icf.config import Config
from icf.files import flush, parse_json, read_json, read_yaml, usual_modes, write_atomic
from icf.weights import in_short, require_finite

CONFIG = "config.yaml"  # the resolved configuration in a run folder
WEIGHTS = "best.safetensors"  # the name of the best weights in a run folder
TRAINING_ONLY = "objective."  # parameters that a model built for inference does without
OTHERS = "progress.json"  # in a training state; what Accelerate would save of others, it would unpickle with trust
STATES = "checkpoints"  # where a run folder keeps its training states, one folder a step


@contextmanager
def failure_named(path: Path) -> Iterator[None]:
    """Makes an OSError that names ``path`` and its disk of what safetensors and torch say when they cannot write, which
    names neither, nor, in the case of torch, that the disk is full."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if "DataLoader" in str(error):  # a reader has died meanwhile, which is raised wherever the process is
            raise
        free = shutil.disk_usage(path.parent).free / 1e6
        raise OSError(f"{path} could not be written, {free:.0f} MB are free there: {error}") from error


def save_weights(path: Path, state: dict[str, torch.Tensor], cfg: Config, **notes) -> None:
    """Write a state dict with its configuration (and ``notes``, such as the step) inside, so that the file suffices."""
    metadata = {"icf": json.dumps({"version": __version__, "config": cfg.to_dict(), **notes})}
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    with failure_named(path):
        write_atomic(path, lambda temporary: save_file(state, temporary, metadata), durable=True)


def find_weights(source: Path) -> Path:
    """The weights file that ``source``, a file or a run folder, stands for: of a run, the best, or before there are any
    the newest that have been trained at all.

    Raises:
        FileNotFoundError: there is none.
    """
    source = Path(source)
    in_run = [source / WEIGHTS, *(state / "model.safetensors" for state in states(source) if step_of(state))]
    candidates = [source] if source.is_file() else in_run
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"no weights at {source}: expected a .safetensors file or a run folder with {WEIGHTS}")


def read_config(source: Path) -> Config:
    """The configuration that a weights file or run folder was made with.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is not one of icf's.
    """
    path = Path(source) / CONFIG
    values = read_yaml(path) if path.is_file() else read_notes(source)["config"]
    try:
        return Config.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path if path.is_file() else source}: {error}") from None


def read_notes(source: Path) -> dict:
    """What :func:`save_weights` wrote beside the weights: version, configuration, and its notes.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is not one of icf's.
    """
    path = find_weights(source)
    if path.suffix == ".onnx":
        from icf.engine.deploy import OnnxModel
        return OnnxModel(path).notes
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    notes = parse_json(metadata.get("icf", "null"), path)
    if not isinstance(notes, dict) or not isinstance(notes.get("config"), dict):
        raise ValueError(f"{path} holds no icf configuration; it was not written by icf")
    return notes


def load_weights(model: nn.Module, source: Path, *, strict: bool = True) -> list[str]:
    """Fill ``model`` from a weights file or run folder.

    Args:
        strict: every tensor has to be there, in its shape. Otherwise what differs keeps its initial value (a binary
            model that starts a semantic one has another head, for example).

    Returns:
        The names of the parameters that kept their initial value.

    Raises:
        FileNotFoundError: there is no such file. ValueError: the file does not fit the model.
    """
    path = find_weights(source)
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    own = model.state_dict()
    state = {name: value for name, value in state.items() if name in own or not name.startswith(TRAINING_ONLY)}
    fitting = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape
               and own[name].is_floating_point() == value.is_floating_point()}
    missing = sorted(own.keys() - fitting.keys())
    if strict and (missing or len(fitting) < len(state)):
        surplus = sorted(state.keys() - fitting.keys())
        raise ValueError(f"{path} does not fit the model: missing or of another shape or type {missing[:3]}, "
                         f"surplus {surplus[:3]}")
    require_finite(str(path), fitting)
    if not fitting:
        raise ValueError(f"{path} holds no parameter of the model")
    model.load_state_dict(fitting, strict=False)
    return missing


def load_model(source: Path, device: str | torch.device = "cpu") -> tuple[nn.Module, Config]:
    """The model of a weights file or run folder, without what only training needs, in ``eval()`` on ``device``, and its
    configuration."""
    from icf.model.build import build_model

    cfg = read_config(source)
    if Path(source).suffix == ".onnx":
        from icf.engine.deploy import OnnxModel
        return OnnxModel(Path(source)).eval(), cfg
    model = build_model(cfg, pretrained=False, inference=True)
    load_weights(model, source)
    return model.to(device).eval(), cfg


def export(source: Path, path: Path) -> None:
    """Write what inference needs of a weights file or run folder, without text tower, diffusion or contrast: by the
    ending weights (`.safetensors`), or a model that runs without this package (`.onnx`, `.pt2`).

    Raises:
        ValueError: another ending, or what writes ONNX is not installed.
    """
    if path.suffix not in (".safetensors", ".onnx", ".pt2"):
        raise ValueError(f"file: expected one that ends in .safetensors, .onnx or .pt2, got {path.name!r}")
    model, cfg = load_model(source)
    notes = {name: value for name, value in read_notes(source).items() if name not in ("version", "config")}
    if path.suffix == ".safetensors":
        save_weights(path, model.state_dict(), cfg, **notes)
    else:
        from icf.engine.deploy import export_model
        export_model(model, cfg, path, notes)


def states(run: Path) -> list[Path]:
    """The complete training states of a run folder, newest first."""
    return sorted(Path(run).glob(f"{STATES}/step-*"), reverse=True)


def step_of(state: Path) -> int:
    return int(state.name.removeprefix("step-"))


def remove_partial(run: Path) -> None:
    """Remove what a killed process left half-written in a run folder."""
    for path in list(run.rglob("*.partial")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # it may have been in a folder of them


def save_state(accelerator, run: Path, step: int, keep: int = 2, **others) -> None:
    """Write the whole training state: weights, optimiser, scaler, and the ``state_dict`` of each of ``others``, which
    JSON has to be able to hold; all processes call it.

    The ``keep`` newest states stay. A state is under its name only while it is complete.

    Raises:
        OSError: it could not be written, and is not there.
    """
    path = Path(run) / STATES / f"step-{step:08d}"
    partial = path.with_name(f".{path.name}.partial")  # one name for all processes
    accelerator.wait_for_everyone()
    try:
        with failure_named(path):
            accelerator.save_state(str(partial))
            if accelerator.is_main_process:
                (partial / OTHERS).write_text(json.dumps({name: x.state_dict() for name, x in others.items()}))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and not path.exists():
            usual_modes(partial)
            flush(partial)
            os.replace(partial, path)
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
    if accelerator.is_main_process:
        for old in states(run)[keep:]:
            os.replace(old, partial)
            shutil.rmtree(partial)
    accelerator.wait_for_everyone()


def load_state(accelerator, state: Path, **others) -> None:
    """Go on from a training state of :func:`save_state`. Nothing in it is trusted: its pickles may hold tensors only.

    Raises:
        ValueError: it is damaged, of another model, or there was no memory for it; the message holds the cause.
    """
    try:
        accelerator.load_state(str(state))
        values = read_json(state / OTHERS)
        for name, other in others.items():
            other.load_state_dict(values[name])
    except Exception as error:  # the readers of Accelerate and torch let errors of every kind through
        raise ValueError(f"{state} cannot be read as a training state of this model ({in_short(error)})") from error
