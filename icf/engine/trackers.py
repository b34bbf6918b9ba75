"""What a run tells the trackers of `train.trackers`, through Accelerate: its settings, and pictures of some clips."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker, get_available_trackers
from torch import nn
from torch.utils.data import Dataset

from icf.config import Config, flat
from icf.engine.pictures import contact_sheet, sample
from icf.engine.predictors import model_predictor

PICTURED = 3  # clips of the validation split
UNSCORED = {"J": None, "F": None, "groups": ()}


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for a tracker that Accelerate does not know or that is not installed."""
    installed = sorted(map(str, get_available_trackers()))
    for name in names:
        if name not in installed:
            wrong = "is not installed" if name in LOGGER_TYPE_TO_CLASS else "is none that Accelerate knows"
            raise ValueError(f"train.trackers: expected of those installed ({', '.join(installed)}), got {name!r}, "
                             f"which {wrong}")


def start_trackers(accelerator: Accelerator, cfg: Config, step: int) -> None:
    """Begin after `step`, with the settings of the run. TensorBoard's files are in the run's folder."""
    accelerator.log_with = [  # made here, for the name of its folder; that of the others is the project's
        TensorBoardTracker("tensorboard", cfg.out, purge_step=step + 1) if name == "tensorboard" else name
        for name in dict.fromkeys(cfg.train.trackers)]
    settings = {name: value if isinstance(value, (bool, int, float)) else str(value)
                for name, value in flat(cfg.to_dict()).items()}
    accelerator.init_trackers("icf", settings, {"wandb": {"dir": str(cfg.out), "name": cfg.out.name}})


def track_pictures(accelerator: Accelerator, model: nn.Module, data: Dataset, cfg: Config, step: int) -> None:
    """The first clips of a split, with truth and prediction, to the trackers that take pictures."""
    trackers = [tracker for tracker in accelerator.trackers if hasattr(tracker, "log_images")]
    if not trackers or not accelerator.is_main_process:
        return
    predict = model_predictor(accelerator.unwrap_model(model), len(data.classes), accelerator.device)
    samples = [sample(predict, data[place], UNSCORED, "", bool(data.classes), cfg.eval.threshold)
               for place in range(min(PICTURED, len(data)))]
    pictures = np.asarray(contact_sheet(samples, data.classes))[None]                            # [1,H,W,3] uint8
    for tracker in trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({f"{data.split}/clips": pictures}, step=step, **layout)
