"""Weight files that users bring along, read without running code from them."""
from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def read_weights(key: str, path: str) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or torch file by name. `key`: the configuration key that an error names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of finite tensors; a torch file may hold nothing else, or all of them under `state_dict`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{key}: there is no file {str(path)!r}")
    try:
        state = load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{key}: {path} cannot be read as weights ({first_line(error)})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(n, str) and _is_plain(x) for n, x in state.items()):
        raise ValueError(f"{key}: {path} holds something other than named tensors")
    require_finite(f"{key}: {path}", state)
    return state


def require_finite(what: str, state: dict[str, Tensor]) -> None:
    """Raise ValueError where `what`, which holds these tensors, has values that are not finite."""
    for name, value in state.items():
        if value.is_floating_point() and not value.float().isfinite().all():
            raise ValueError(f"{what} holds values that are not finite, in {name} first")


def _is_plain(value: object) -> bool:
    """A tensor with values, and no sparse or quantised one."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.is_cpu and not value.is_quantized


def first_line(error: Exception) -> str:
    """What an error says, short enough to be quoted in another."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
