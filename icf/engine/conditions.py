"""The sounds that clips are scored under, side by side, and the clips' division among processes."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from icf.config import Config
from icf.data import Batch, collate
from icf.data.disturb import Disturbed
from icf.machine import readers

UNHEARD = ("silence", "noise", "offscreen")     # negative sounds that nothing in the picture makes
SEED = 42                                       # pairing of clips and sounds


def conditions(dataset: Dataset, cfg: Config, kinds: Sequence[str]) -> tuple[Dataset, dict[str, Dataset]]:
    """The data set under the sound that `cfg.eval` asks for (noise, mixed frames), and under each negative sound."""
    true_set = dataset
    if cfg.eval.frame_mix:
        true_set = Disturbed(true_set, f"mix:{cfg.eval.frame_mix}", seed=SEED)
    if cfg.eval.snr_db is not None:
        true_set = Disturbed(true_set, f"snr:{cfg.eval.snr_db}", seed=SEED)
    return true_set, {kind: Disturbed(dataset, kind, seed=SEED) for kind in kinds}


class Conditions(Dataset):
    """Clips of several data sets of the same names, side by side: (index, one clip of each)."""

    def __init__(self, datasets: Sequence[Dataset], indices: Sequence[int]) -> None:
        self.datasets, self.indices = datasets, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple:
        index = self.indices[place]
        return index, [dataset[index] for dataset in self.datasets]


def build_loader(datasets: Sequence[Dataset], cfg: Config, rows: Sequence[int] | None = None) -> DataLoader:
    """Batches (index int64 [B], one `Batch` per data set) of this process' clips, none of them twice; rows: which of
    the clips are wanted, None: all."""
    rank, processes = process()
    clips = Conditions(datasets, (range(len(datasets[0])) if rows is None else rows)[rank::processes])
    return DataLoader(clips, cfg.eval.batch, num_workers=readers(cfg.data.workers), collate_fn=_collate,
                      pin_memory=torch.cuda.is_available())


def process() -> tuple[int, int]:
    """Number of this process, and of all that share the work."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gather(items: dict) -> dict:
    """The items of all processes together."""
    rank, processes = process()
    if processes == 1:
        return items
    parts = [None] * processes
    dist.all_gather_object(parts, items)
    return {key: value for part in parts for key, value in part.items()}


def _collate(items: list[tuple]) -> tuple[Tensor, list[Batch]]:
    indices, clips = zip(*items, strict=True)
    return torch.tensor(indices), [collate(list(condition)) for condition in zip(*clips, strict=True)]
