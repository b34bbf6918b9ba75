"""Evaluation of one split: every mode of every score, negative sounds, tables, pictures of the worst clips.

A clip belongs to one process (every n-th of the data set) and is scored once; the metrics hold one row per clip and add
the rows of all processes up, so the scores are those of a single process.
"""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.utils.data import Dataset

from icf.config import Config
from icf.data import build_dataset
from icf.engine.conditions import build_loader, conditions, gather, process
from icf.engine.masks import write_masks
from icf.engine.pictures import samples
from icf.engine.predictors import Predictor, model_predictor, saved_predictor
from icf.engine.report import write_report
from icf.engine.results import HISTORY, assemble, read_history, write_tables
from icf.engine.score_tables import score_tables
from icf.engine.tally import Negative, Tally
from icf.files import write_atomic
from icf.ops import use_backend

LISTENERS = 64                                  # clips that are heard with another sound while training


@torch.no_grad()
def evaluate(
    model: nn.Module, cfg: Config, split: str = "test", out: Path | None = None,
    device: torch.device | str | None = None, accelerator: Accelerator | None = None, save_masks: bool = False,
    progress: bool = True, report: bool = True,
) -> dict:
    """Score `model` on a split under the true sound and under negative sounds.

    Writes to `out`: `results.json` (everything), `per_class.csv`, `per_clip.csv`, `pairing.json` (which sound replaced
    which), `report.html` with the pictures behind it, and, on request, `masks/<clip>/<frame>.png` at `data.size`, which
    `evaluate_masks` reads again. With several processes all have to call this; the first one writes.

    Args:
        model: gives for a `Batch` in eval mode logits [B,T,1,H,W], or scores [B,T,C,H,W] of C classes.
        split: `train`, `val` or `test`.
        out: folder, made if missing; None for `cfg.out`.
        device: None for that of the model's parameters.
        accelerator: what prepared the model, if anything did. The processes of torch.distributed share the work.
        save_masks: write the predicted masks.
        progress: show a progress bar and print the table of scores.
        report: write `report.html`.

    Returns:
        What `results.json` holds; `J`, `F` and `J&F` are the default modes, `scores` has all of them.

    Raises:
        FloatingPointError: the model gave a value that is not finite. ValueError: its channels do not fit the classes,
            or `cfg.backend` cannot run here.
    """
    dataset = build_dataset(cfg.data, split)
    model = accelerator.unwrap_model(model) if accelerator else model
    device = device or next(model.parameters()).device
    predict = model_predictor(model, len(dataset.classes), device)
    with use_backend(cfg.backend):
        return _evaluate(predict, dataset, cfg, Path(out or cfg.out), device, {"weights_sha256": weights_hash(model)},
                         save_masks, progress, report, cfg.eval.negatives)


def evaluate_masks(masks: Path, cfg: Config, split: str, out: Path, progress: bool = True, report: bool = True) -> dict:
    """Score the saved masks of any method: `masks/<clip>/*.png` in numeric order, one per frame of the clip.

    Binary masks are 0/255 or 0/1, class masks hold the index, with a palette or not; masks of another size are resized
    to `data.size` by nearest neighbour. F is computed from 0/1 maps, which have one threshold, and there are no
    negative sounds. Files and return value as of `evaluate`.

    Raises:
        FileNotFoundError: a clip has no masks, or too few. ValueError: a file is no mask.
    """
    dataset = build_dataset(cfg.data, split)
    predict = saved_predictor(Path(masks), len(dataset.classes), cfg.data.size)
    notes = {"masks": str(masks), "F": "of 0/1 maps"}
    return _evaluate(predict, dataset, cfg, Path(out), "cpu", notes, progress=progress, report=report)


@torch.no_grad()
def validate(
    model: nn.Module, dataset: Dataset, cfg: Config, accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """J, F and J&F of a model on a data set in their default modes, nothing written; all processes get the result."""
    model = accelerator.unwrap_model(model) if accelerator else model
    device = next(model.parameters()).device
    predict = model_predictor(model, len(dataset.classes), device)
    tally = Tally(len(dataset), dataset.classes, cfg, device)
    for index, (batch,) in build_loader([dataset], cfg):
        tally.add(predict(batch).masks, batch, index)
    with tally.synchronised():
        return tally.summary()


@torch.no_grad()
def hearing(
    model: nn.Module, dataset: Dataset, cfg: Config, accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Whether a model listens: what J loses when clips get the sound of another, `J heard`, and the J that is left,
    `J other sound`, on `LISTENERS` clips at most, spread over the data set; all processes get the result. A model that
    goes by the picture alone loses nothing."""
    model = accelerator.unwrap_model(model) if accelerator else model
    device = next(model.parameters()).device
    predict = model_predictor(model, len(dataset.classes), device)
    rows = range(0, len(dataset), -(-len(dataset) // LISTENERS))
    own, other = (Tally(len(dataset), dataset.classes, cfg, device) for _ in range(2))
    disturbed = conditions(dataset, cfg, ["shuffled"])[1]["shuffled"]
    for index, batches in build_loader([dataset, disturbed], cfg, rows):
        for tally, batch in zip((own, other), batches, strict=True):
            tally.add(predict(batch).masks, batch, index)
    with own.synchronised(), other.synchronised():
        left = other.summary(rows)["J"]
        return {"J other sound": left, "J heard": own.summary(rows)["J"] - left}


def _evaluate(
    predict: Predictor, dataset: Dataset, cfg: Config, out: Path, device: torch.device | str, notes: dict,
    save_masks: bool = False, progress: bool = True, report: bool = True, kinds: Sequence[str] = (),
) -> dict:
    true_set, disturbed = conditions(dataset, cfg, kinds)
    main = process()[0] == 0
    tally = Tally(len(dataset), dataset.classes, cfg, device)
    negatives = {kind: Negative(len(dataset), dataset.classes, cfg, device) for kind in disturbed}
    categories: dict[int, tuple[str, ...]] = {}
    history = read_history(out / HISTORY) if report and (out / HISTORY).is_file() else None
    loader = build_loader([true_set, *disturbed.values()], cfg)
    bar = Console(stderr=True)
    for index, (batch, *others) in track(loader, f"scoring {dataset.split}", console=bar, disable=not progress * main):
        prediction = predict(batch)
        tally.add(prediction.masks, batch, index)
        categories.update(zip(index.tolist(), batch.categories, strict=True))
        if save_masks:
            write_masks(out / "masks", prediction.masks, batch, dataset.classes, cfg.eval.threshold)
        for negative, other in zip(negatives.values(), others, strict=True):
            negative.add(predict(other), prediction, other, index)
    categories = gather(categories)
    with ExitStack() as stack:
        for item in (tally, *negatives.values()):
            stack.enter_context(item.synchronised())
        results = assemble(tally, negatives, dataset, cfg, categories, notes)
    if main:
        write_tables(results, out)
        for kind, other in disturbed.items():
            write_atomic(out / "pairing" / f"{kind}.json", other.save_pairing)
        if report:
            pictured = samples(predict, true_set, results, cfg.eval.threshold)
            write_report(out, results, pictured, dataset.classes, history)
        if progress:
            Console().print(score_tables(results))
    if process()[1] > 1:
        dist.barrier()
    return results


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of names, types, shapes and values of all weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
