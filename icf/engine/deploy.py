"""Models that run without this package: ONNX, for onnxruntime, and torch.export's programs; and ONNX read back.

Both take `frames` [B,T,3,H,W] uint8 RGB, one a second, and `log_mel` [B,T,1,96,64] float32 (`icf.data.audio`), for any
B and T (a program: T from 2 on), and give `probability` [B,T,1,H,W] of what sounds, or [B,T,C,H,W] of classes. H and W
are those of `data.size`. Inside lie the version, the configuration and the classes' names, as in a weights file.
"""
from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from icf import __version__
from icf.config import Config
from icf.data import Batch
from icf.data.audio import BANDS, EXAMPLE
from icf.files import parse_json, write_atomic
from icf.ops import use_backend

INPUTS, OUTPUT = ("frames", "log_mel"), "probability"
MOST = 4096  # clips, and seconds, that a program is made for at most


class Deployed(nn.Module):
    """A model as it is deployed: clips whose frames all exist, and probabilities."""

    def __init__(self, model: nn.Module, classes: int):
        super().__init__()
        self.model, self.classes = model, classes

    def forward(self, frames: Tensor, log_mel: Tensor) -> Tensor:
        b, t = frames.shape[:2]
        real = torch.ones(b, t, dtype=torch.bool, device=frames.device)
        masks = torch.zeros(b, t, 1, 1, dtype=torch.uint8, device=frames.device)
        places = torch.arange(b * t, device=frames.device)
        scores = self.model(Batch(frames, log_mel, masks, real, ~real, [], [], places, places[:0]))
        return scores.float().sigmoid() if self.classes == 1 else scores.float()


def export_model(model: nn.Module, cfg: Config, path: Path, notes: dict) -> None:
    """Write a model in eval mode on the CPU as `.onnx` or `.pt2`, by the ending.

    The operators are taken as PyTorch composes them, so neither file needs this package.

    Args:
        notes: what else a weights file says of the model, such as `classes`.

    Raises:
        ValueError: another ending, or ONNX without the package onnxscript.
    """
    if path.suffix == ".onnx" and find_spec("onnxscript") is None:
        raise ValueError(f"{path}: needs onnx and onnxscript: pip install onnx onnxscript")
    deployed, size = Deployed(model, cfg.model.classes).eval(), cfg.data.size
    example = (torch.zeros(2, 3, 3, size, size, dtype=torch.uint8), torch.zeros(2, 3, 1, EXAMPLE, BANDS))
    every = {0: torch.export.Dim("batch", max=MOST), 1: torch.export.Dim("seconds", max=MOST)}
    about = json.dumps({"version": __version__, "config": cfg.to_dict(), **notes})
    with torch.no_grad(), use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about themselves
        if path.suffix == ".onnx":
            program = torch.onnx.export(deployed, example, dynamo=True, dynamic_shapes=(every, every), verbose=False,
                                        input_names=list(INPUTS), output_names=[OUTPUT])
            program.model.metadata_props["icf"] = about
            write_atomic(path, lambda temporary: program.save(str(temporary)))
        elif path.suffix == ".pt2":
            program = torch.export.export(deployed, example, dynamic_shapes=(every, every))
            write_atomic(path, lambda temporary: _save_program(program, temporary, about))
        else:
            raise ValueError(f"export: expected a file that ends in .safetensors, .onnx or .pt2, got {path.name}")


def _save_program(program: torch.export.ExportedProgram, path: Path, about: str) -> None:
    with path.open("wb") as file:  # by name, torch.export asks for its own ending
        torch.export.save(program, file, extra_files={"icf": about})


class OnnxModel(nn.Module):
    """An ONNX file of `export_model` in onnxruntime, with the interface of the model that it was made of, in eval mode.

    Raises:
        ValueError: the file is not one of these, or there is no onnxruntime.
    """

    def __init__(self, path: Path):
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError(f"{path}: needs onnxruntime: pip install onnxruntime") from error
        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ValueError(f"{path}: cannot be read as an ONNX model ({str(error)[:200]})") from None
        self.notes = parse_json(self.session.get_modelmeta().custom_metadata_map.get("icf", "null"), path)
        if not isinstance(self.notes, dict) or not isinstance(self.notes.get("config"), dict):
            raise ValueError(f"{path} holds no icf configuration; it was not written by icf export")
        self.classes = Config.from_dict(self.notes["config"]).model.classes

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B,T,1,H,W], or scores [B,T,C,H,W]; every frame has to exist."""
        inputs = {name: getattr(batch, name).numpy() for name in INPUTS}
        probability = torch.from_numpy(self.session.run([OUTPUT], inputs)[0])
        return torch.logit(probability, eps=1e-6) if self.classes == 1 else probability
