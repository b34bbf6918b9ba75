"""Every setting of a run, with its default. The command line and the YAML files of `configs/` fill these dataclasses.

Defaults marked *(paper)* are given by the paper, *(COMBO)* come from COMBO-AVS, on which the paper builds, and *(ours)*
fill a gap of the paper; what is not marked follows from the data sets.
"""
from __future__ import annotations

from argparse import ArgumentError
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

SUBSETS = ("s4", "ms3", "avss", "folder")
Subset = Literal["s4", "ms3", "avss", "folder"]


@dataclass
class ToyConfig:
    """The embedded benchmark, written below `data.root` when that folder does not exist yet.

    Args:
        size: number of clips, see `icf data toy --help`.
        seed: every clip is drawn from (seed, subset, split, index).
        bias: probability that the salient shape is the one that sounds, in the training and validation splits.
        visible: smallest and largest number of shapes in a clip.
        gap: how much the salient shape stands out in size, contrast and speed: 0 not at all, 1 strongly.
        val_bias: bias of the validation split where it differs.
        clips: numbers of train, val and test clips in place of those of `size`.
    """

    size: Literal["tiny", "small", "full"] = "small"
    seed: int = 0
    bias: float = 0.9
    visible: tuple[int, int] = (2, 3)
    gap: float = 1.0
    val_bias: float | None = None
    clips: tuple[int, int, int] | None = None


@dataclass
class DataConfig:
    """Which clips are read, and how.

    Args:
        root: the folder that holds `Single-source/`, `Multi-sources/` or `AVSBench_semantic/`, or one of these itself.
        subset: `s4`, `ms3`, `avss`, or `folder` for own labelled clips.
        size: side of the square frames given to the model, in pixels (paper: 224).
        frames: frames per clip, one per second (paper: 5; AVSS 10).
        supervision: `auto` reads which frames of a split are labelled from the data set; `first` and `all` force it.
        audio_source: `wav`, or `pkl` for the distributed log-mel files (read by a restricted unpickler).
        audio_timing: `vggish` takes windows every 0.96 s as published; `aligned` one per second.
        augmentation: `none` (paper), `flip` (left and right), or `combo`: scale, crop, flip and colour, as COMBO-AVS.
        workers: loader processes; `null` chooses by the number of cores.
        cache: keep what was read in memory that the workers share: log-mels, frames and labels, each if all of a split
            take less than 1 GiB.
        toy: set, the data is the toy benchmark, generated when it is missing.
    """

    root: Path = Path("data/avsbench")
    subset: Subset = "s4"
    size: int = 224
    frames: int = 5
    supervision: Literal["auto", "first", "all"] = "auto"
    audio_source: Literal["wav", "pkl"] = "wav"
    audio_timing: Literal["vggish", "aligned"] = "vggish"
    augmentation: Literal["none", "flip", "combo"] = "none"
    workers: int | None = None
    cache: bool = True
    toy: ToyConfig | None = None


@dataclass
class VisualConfig:
    """Visual encoder: any timm model with a four-level feature pyramid at strides 4, 8, 16, 32.

    Args:
        name: timm's name: `pvt_v2_b5` or `resnet50.tv_in1k` *(paper)*.
        weights: `imagenet` (through timm, needs a network once), a local file, or `none` for a seeded random start.
        freeze_norm: BatchNorm keeps its stored statistics *(ours: the frames of a batch are correlated)*.
    """

    name: str = "pvt_v2_b5"
    weights: str = "imagenet"
    freeze_norm: bool = True


@dataclass
class AudioConfig:
    """VGGish.

    Args:
        weights: a local `vggish-10086976.pth`, `download` (torch.hub, needs a network once), or `none`.
        width: multiplies the channels of every layer but the last; 1 is the published network.
        train: train it; otherwise it stays frozen *(COMBO)*.
    """

    weights: str = "download"
    width: float = 1.0
    train: bool = False


@dataclass
class ContextConfig:
    """Spatio-temporal channel attention, Eq. 1-2.

    Args:
        levels: whose output feeds the decoder: `video` attends over all channels of a clip, `frame` within a frame.
        dim: channels attended over, per frame *(ours; the paper would need up to 1.7 GB a clip)*.
        literal_product: the printed `V A` instead of `(A V^T)^T`, whose columns do not sum to one.
    """

    levels: tuple[Literal["video", "frame"], ...] = ("video", "frame")
    dim: int = 256
    literal_product: bool = False


@dataclass
class DecoderConfig:
    """Pixel decoder, audio-visual queries and mask decoder, as in Mask2Former and COMBO-AVS *(COMBO)*.

    Args:
        dim: model width.
        pixel_layers: layers of multi-scale deformable attention.
        layers: layers of masked cross-attention; each, and the initial queries, has a supervised head.
        heads, points: attention heads; sampling points per level.
        queries: learnable queries.
        query_mode: `bidirectional` *(paper)* | `audio` (queries get the sound as it is) | `learnable` (no sound).
        audio_keys: sound that the pixels attend to: the clip's seconds and a learned null token, or their `own` second.
        head: `dense` for one foreground, `mask2former` for classes; `auto` by the number of classes.
    """

    dim: int = 256
    pixel_layers: int = 6
    pixel_ffn: int = 1024
    layers: int = 9
    ffn: int = 2048
    heads: int = 8
    points: int = 4
    queries: int = 100
    query_mode: Literal["bidirectional", "audio", "learnable"] = "bidirectional"
    audio_keys: Literal["clip_null", "own"] = "clip_null"
    head: Literal["auto", "dense", "mask2former"] = "auto"


@dataclass
class LossConfig:
    """Weights of Eq. 18, all 1 in the paper; `preset: combo`: COMBO-AVS' for matched masks (CE 2, BCE 5, dice 5)."""

    preset: Literal["paper", "combo"] = "paper"
    bce: float = 1.0
    dice: float = 1.0
    focal: float = 1.0
    deep_supervision: bool = True


@dataclass
class ModelConfig:
    """The network. `classes`: 1 for a single foreground (S4, MS3), else all classes with background (AVSS: 71)."""

    classes: int = 1
    visual: VisualConfig = field(default_factory=VisualConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)


@dataclass
class TrainConfig:
    """The recipe.

    Args:
        batch: clips per step and process *(paper: 8)*.
        epochs: *(paper: 60)*; `iters`, if set, counts optimiser steps instead.
        lr, weight_decay, backbone_lr: AdamW; decay .05, none for norms and embeddings, backbone at 0.1 of lr *(COMBO)*.
        schedule, power, warmup: polynomial decay 0.9 without warm-up *(COMBO)*, or `cosine`; warm-up in steps.
        clip: norm that the gradient of the whole model is clipped to *(COMBO: 0.01)*; 0 leaves it alone.
        accumulate: steps whose gradients are added up before the optimiser moves.
        amp: mixed precision.
        seed: initialisation, order of the data and everything random in the step.
        init_from: weights to start from (a run folder or a .safetensors file); MS3 is usually started from S4.
        evaluate_every: epochs between evaluations of the validation split, 0 for the last only.
        save_every: steps between checkpoints within an epoch, 0 for epoch ends only.
        log_every: steps between two readings of the losses.
    """

    batch: int = 8
    epochs: int = 60
    iters: int | None = None
    lr: float = 1e-4
    weight_decay: float = 0.05
    backbone_lr: float = 0.1
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    power: float = 0.9
    warmup: int = 0
    clip: float = 0.01
    accumulate: int = 1
    amp: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0
    init_from: Path | None = None
    evaluate_every: int = 1
    save_every: int = 0
    log_every: int = 10


@dataclass
class EvalConfig:
    """Evaluation; `icf evaluate` prints every mode of a metric, these choose what is computed.

    Args:
        batch: clips per step.
        threshold: of the sigmoid, for binary masks.
        negatives: sounds put in place of the true one, for false positives and sensitivity.
        snr_db: white noise added to the sound at this signal-to-noise ratio.
        frame_mix: frames per clip exchanged with other clips, in a quarter of the clips.
    """

    batch: int = 8
    threshold: float = 0.5
    negatives: tuple[Literal["silence", "noise", "offscreen", "shuffled"], ...] = (
        "silence", "noise", "offscreen", "shuffled")
    snr_db: float | None = None
    frame_mix: int = 0


@dataclass
class Config:
    """One run: its data, model, loss, recipe and evaluation, and the folder it writes to."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    out: Path = Path("runs/default")

    def check(self) -> None:
        """Raise ValueError, naming the key, where fields contradict one another or are out of range."""
        require = _require
        size = self.data.size
        require(size > 0 and size % 32 == 0, "data.size", "a positive multiple of 32", size)
        require(self.data.frames >= 1, "data.frames", "at least 1", self.data.frames)
        require(self.model.classes >= 1, "model.classes", "at least 1", self.model.classes)
        require(self.data.subset in get_args(Subset), "data.subset", f"one of {SUBSETS}", self.data.subset)
        decoder = self.model.decoder
        require(decoder.dim % decoder.heads == 0, "model.decoder.dim", "divisible by model.decoder.heads",
                f"{decoder.dim} and {decoder.heads}")
        require(decoder.head != "dense" or self.model.classes == 1, "model.decoder.head",
                "mask2former or auto where model.classes is above 1", decoder.head)
        require(not (self.data.subset == "avss" and self.model.classes == 1), "model.classes",
                "the number of classes with background for data.subset=avss", self.model.classes)
        for name in ("batch", "epochs", "accumulate", "log_every"):
            require(getattr(self.train, name) >= 1, f"train.{name}", "at least 1", getattr(self.train, name))
        require(self.train.iters is None or self.train.iters >= 1, "train.iters", "at least 1", self.train.iters)
        require(self.train.lr > 0, "train.lr", "above 0", self.train.lr)
        require(0 < self.eval.threshold < 1, "eval.threshold", "between 0 and 1", self.eval.threshold)

    def to_dict(self) -> dict:
        """Plain values, as JSON and YAML hold them."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, values: dict) -> Config:
        """The inverse of :meth:`to_dict`; raises ValueError where a key is unknown or a value of the wrong type."""
        parser = config_parser(exit_on_error=False)
        try:
            return build_config(parser, parser.parse_object(values))
        except ArgumentError as error:
            raise ValueError(f"configuration: {error}") from None


def config_parser(**options) -> ArgumentParser:
    """A parser of every field, as `--data.size 224`, and of YAML files that hold some of them, as `--config FILE`."""
    parser = ArgumentParser(**options)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file, or text, with any of the fields below")
    parser.add_class_arguments(Config, as_group=False)
    return parser


def build_config(parser: ArgumentParser, parsed: Namespace) -> Config:
    """The checked configuration of what ``parser`` has parsed."""
    values = parser.instantiate(parsed)
    cfg = Config(**{field.name: values[field.name] for field in fields(Config)})
    cfg.check()
    return cfg


def _require(ok: bool, key: str, expected: str, got) -> None:
    if not ok:
        raise ValueError(f"{key}: expected {expected}, got {got}")


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
