"""Weight files that users bring along, read without running code from them."""
from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

NESTED = ("model", "model_state_dict", "state_dict")  # where training scripts put the weights in their checkpoints
WRAPPED = "module."  # before every name where they were taken from DistributedDataParallel
SHORT = 400  # characters


def read_weights(key: str, path: str) -> dict[str, Tensor]:
    """The tensors of a `.safetensors`, `.npz` or torch file by name. `key`: the configuration key that an error names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of finite tensors. Those of a training run, under one of `NESTED`, may have its settings
            and optimiser beside them.
    """
    path = os.path.expanduser(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{key}: there is no file {str(path)!r}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # settings of a training run, without code in them
            state = READERS.get(Path(path).suffix, _load_torch)(path)
    except Exception as error:
        raise ValueError(f"{key}: {path} cannot be read as weights ({in_short(error)})") from error
    for name in NESTED:
        state = state[name] if isinstance(state, dict) and isinstance(state.get(name), dict) else state
    if isinstance(state, dict) and all(str(name).startswith(WRAPPED) for name in state):
        state = {name.removeprefix(WRAPPED): value for name, value in state.items()}
    if not isinstance(state, dict) or not all(isinstance(n, str) and _is_plain(x) for n, x in state.items()):
        raise ValueError(f"{key}: {path} holds something other than named tensors")
    require_finite(f"{key}: {path}", state)
    return state


def _load_arrays(path: str) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def _load_torch(path: str) -> object:
    return torch.load(path, "cpu", weights_only=True)


READERS = {".safetensors": load_file, ".npz": _load_arrays}


def require_finite(what: str, state: dict[str, Tensor]) -> None:
    """Raise ValueError where `what`, which holds these tensors, has values that are not finite."""
    for name, value in state.items():
        if value.is_floating_point() and not value.float().isfinite().all():
            raise ValueError(f"{what} holds values that are not finite, in {name} first")


def _is_plain(value: object) -> bool:
    """A tensor with values, and no sparse or quantised one."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.is_cpu and not value.is_quantized


def in_short(error: Exception) -> str:
    """What an error says, in one line that is short enough to be quoted in another. The reason may stand on any line of
    it: torch's `Error(s) in loading` is followed by which."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return said if len(said) <= SHORT else f"{said[:SHORT - 4].rstrip()} ..."
