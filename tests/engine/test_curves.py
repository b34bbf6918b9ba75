"""Training curves of a run at any time."""
import io

import numpy as np
import pytest
from PIL import Image

from icf.engine.curves import curves

HISTORY = {"steps": [{"step": i, "loss": 1 / i, "bce": 0.5 / i, "lr": 1e-3} for i in range(1, 40)],
           "evaluations": [{"epoch": 1, "step": 20, "J": 0.4, "F": 0.5}, {"epoch": 2, "step": 39, "J": 0.5, "F": 0.6}]}


@pytest.mark.parametrize("history", [
    pytest.param(HISTORY, id="whole run"),
    pytest.param({**HISTORY, "evaluations": []}, id="before the first evaluation"),
    pytest.param({"steps": HISTORY["steps"][:1]}, id="one step"),
    pytest.param({"steps": []}, id="nothing yet"),
])
def test_curves_of_a_run_at_any_time(history):
    image = np.asarray(Image.open(io.BytesIO(curves(history))))
    assert image.shape[2] == 4 and image[0, 0, 3] == 0, "transparent, for light and dark pages"
    assert image[..., 3].max() > 200
