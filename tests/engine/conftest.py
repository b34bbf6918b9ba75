"""What is drawn and written: a clip with its prediction, and results of both kinds."""
import pytest
import torch

from icf.engine.pictures import Sample

PIXELS = {"mIoU/zero": 0.61, "FDR": 0.07}


@pytest.fixture(scope="session")
def make_sample():
    """Three seconds of 40 pixels with one square, the prediction right unless given."""
    def make(name="clip", rank="worst", prediction=None):
        truth = torch.zeros(3, 40, 40, dtype=torch.uint8)
        truth[:, 10:30, 10:30] = 1
        prediction = truth.clone() if prediction is None else prediction
        return Sample(name, torch.full((3, 3, 40, 40), 100, dtype=torch.uint8), torch.zeros(3, 1, 96, 64), truth,
                      torch.ones(3, dtype=torch.bool), prediction, 0.25, None, rank, ("conflicting",))
    return make


@pytest.fixture(scope="session")
def make_results():
    """Results of binary masks; keywords replace their entries."""
    def make(**changes):
        j = {f"{empty}/{mean}": 0.5 + 0.01 * i for i, (empty, mean) in enumerate(
            (empty, mean) for empty in ("background", "strict", "skip") for mean in ("frame", "batch:4"))}
        f = {f"{group}/{empty}": 0.7 + 0.01 * i for i, (group, empty) in enumerate(
            (group, empty) for group in ("per_video", "batch:2", "batch:4", "dataset") for empty in ("skip", "zero"))}
        silence = {"FPR": 0.0123, "strict": 0.9, "J": 0.1, "F": 0.1, "sensitivity": 0.4, "change": 0.2}
        classes = [{"class": name, "clips": 3, "J": value, "F": 0.5} for name, value in (("violin", 0.9), ("dog", 0.1))]
        return {"split": "test", "subset": "s4", "J": 0.5, "F": 0.71, "J&F": 0.605,
                "default_modes": {"J": "background/frame", "F": "per_video/zero"},
                "scores": {"J": {**j, "false_positive/empty": None}, "F": f, "pixels": PIXELS},
                "groups": {"aligned": {"clips": 3, "J": 0.9, "F": 0.9, "J&F": 0.9},
                           "conflicting": {"clips": 4, "J": 0.2, "F": 0.3, "J&F": 0.25}},
                "gap": {"J": 0.7, "F": 0.6, "J&F": 0.65}, "oracles": {"salience": {"J": 0.4321}}, "combined": 0.8765,
                "negatives": {"silence": silence}, "classes": classes, "counts": {"clips": 7, "scored_frames": 35},
                "settings": {"resolution": 224, "toy": None}, **changes}
    return make


@pytest.fixture(scope="session")
def make_semantic_results(make_results):
    """Results of classes."""
    def make():
        modes = {f"{key}/{divide}/{frames}/{background}": 0.3 for key in "JF" for divide in ("all", "seen")
                 for frames in ("real", "padded") for background in ("include", "exclude", "public")}
        scores = {"AVSS": {**modes, "J/all/padded/include": 0.3456}, "AVSS, at least 16 pixels": modes,
                  "J of the foreground": {"background/frame": 0.8, "strict/frame": 0.7}, "pixels": PIXELS}
        return make_results(subset="avss", scores=scores,
                            default_modes={"J": "J/all/real/include", "F": "F/all/real/include"})
    return make
