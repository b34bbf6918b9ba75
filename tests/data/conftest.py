import shutil

import pytest

from icf.config import DataConfig
from icf.data import build_dataset, toy

SEED = 3


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory):
    """All three subsets, small; not to be written to."""
    root = tmp_path_factory.mktemp("toy")
    toy.generate(root, "tiny", seed=SEED, subsets=("s4", "ms3"), clips=(5, 4, 6), workers=1, progress=False)
    toy.generate(root, "tiny", seed=SEED, subsets=("avss",), clips=(6, 6, 6), workers=1, progress=False)
    return root


@pytest.fixture
def own_root(toy_root, tmp_path):
    """A copy of one subset that a test may damage: own_root("s4") is the folder with its metadata."""
    def copy(subset):
        return shutil.copytree(toy_root / toy.FOLDERS[subset], tmp_path / toy.FOLDERS[subset])

    return copy


@pytest.fixture
def load(toy_root):
    """load("s4", "train", root=..., size=...): a data set."""
    def load(subset, split, root=toy_root, **settings):
        settings = {"size": 64, "frames": 10 if subset == "avss" else 5, **settings}
        return build_dataset(DataConfig(root=root, subset=subset, **settings), split)

    return load
