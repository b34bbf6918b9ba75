"""Training curves of a run at any time."""
import io

import numpy as np
import pytest
from PIL import Image

from icf.engine.curves import curves, grouped

HISTORY = {"steps": [{"step": i, "loss": 1 / i, "bce": 0.5 / i, "lr": 1e-3} for i in range(1, 40)],
           "evaluations": [{"epoch": 1, "step": 20, "J": 0.4, "F": 0.5}, {"epoch": 2, "step": 39, "J": 0.5, "F": 0.6}]}


@pytest.mark.parametrize("history", [
    pytest.param(HISTORY, id="whole run"),
    pytest.param({**HISTORY, "evaluations": []}, id="before the first evaluation"),
    pytest.param({"steps": HISTORY["steps"][:1]}, id="one step"),
    pytest.param({"steps": []}, id="nothing yet"),
    pytest.param({"steps": [{**row, **({"grad/va/decoder": 1.0} if row["step"] % 10 == 0 else {})}
                            for row in HISTORY["steps"]]}, id="terms of some steps"),
])
def test_curves_of_a_run_at_any_time(history):
    image = np.asarray(Image.open(io.BytesIO(curves(history))))
    assert image.shape[2] == 4 and image[0, 0, 3] == 0, "transparent, for light and dark pages"
    assert image[..., 3].max() > 200


def test_terms_are_drawn_with_their_kind_and_none_is_lost():
    keys = ["step", "loss", "lr", "bce", "dice", "focal", "eps", "rec", "cf", "va", "al", "vl", "al_cf", "al_batch",
            "degree", "cosine", "spread_v", "left_out", "grad/va/sc", "grad/bce/sc", "grad/bce/encoder"]
    panels = grouped(keys)
    assert sorted(key for panel in panels.values() for key in panel) == sorted(set(keys) - {"step", "lr"})
    assert panels["segmentation"] == ["loss", "bce", "dice", "focal"]
    assert panels["statistics"] == ["spread_v", "left_out"]
    assert panels["gradient norms: sc"] == ["grad/va/sc", "grad/bce/sc"]
    assert max(map(len, panels.values())) <= 6
