"""Models that run without this package give what the module gives, at other sizes than the export has seen."""
import numpy as np
import pytest
import torch

from icf.engine.checkpoint import export, load_model, read_config, read_notes, save_weights
from icf.engine.deploy import Deployed, OnnxModel
from icf.model.build import build_model

OTHERS = [(1, 5), (3, 4), (2, 2), (1, 7)]


@pytest.fixture(scope="module", params=[1, 4], ids=["binary", "classes"])
def weights(request, small, tmp_path_factory):
    """A small model of one foreground, and one of classes, in a weights file."""
    torch.manual_seed(0)
    cfg = small(model={"classes": request.param, "audio": {"standardise": True, "train": False}}, data={"size": 64})
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_weights(path, build_model(cfg).state_dict(), cfg, classes=["background", "dog", "cat", "cow"][:request.param])
    return path


def clips(b, t):
    generator = torch.Generator().manual_seed(10 * b + t)
    return (torch.randint(0, 256, (b, t, 3, 64, 64), generator=generator, dtype=torch.uint8),
            torch.randn(b, t, 1, 96, 64, generator=generator))


@pytest.fixture(scope="module")
def onnx(weights):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export(weights, weights.with_suffix(".onnx"))
    return weights.with_suffix(".onnx")


def module(weights):
    model, cfg = load_model(weights)
    return Deployed(model, cfg.model.classes).eval()


@pytest.mark.parametrize("sizes", OTHERS)
def test_onnx_at_other_batches_and_lengths(weights, onnx, sizes):
    import onnxruntime
    inputs = clips(*sizes)
    session = onnxruntime.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
    (found,) = session.run(["probability"], {"frames": inputs[0].numpy(), "log_mel": inputs[1].numpy()})
    with torch.no_grad():
        expected = module(weights)(*inputs)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_an_onnx_file_is_predicted_with_like_weights(weights, onnx, make_batch):
    """The configuration and the classes' names lie inside; masks are the same."""
    assert read_config(onnx) == read_config(weights) and read_notes(onnx)["classes"] == read_notes(weights)["classes"]
    (model, cfg), batch = load_model(onnx), make_batch((5, 5), classes=read_config(weights).model.classes)
    assert isinstance(model, OnnxModel)
    with torch.no_grad():
        found, expected = model(batch), load_model(weights)[0](batch)
    assert found.shape == expected.shape
    masks = [x > 0 if cfg.model.classes == 1 else x.argmax(2) for x in (found, expected)]
    assert (masks[0] == masks[1]).float().mean() > 0.999


def test_a_program_at_other_batches_and_lengths(weights):
    path = weights.with_suffix(".pt2")
    export(weights, path)
    about = {"icf": ""}
    program = torch.export.load(path, extra_files=about).module()
    assert '"version"' in about["icf"]
    for sizes in OTHERS:
        inputs = clips(*sizes)
        with torch.no_grad():
            torch.testing.assert_close(program(*inputs), module(weights)(*inputs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["model.pth", "model", "model.onnx.zip"])
def test_other_endings_are_refused(weights, tmp_path, name):
    with pytest.raises(ValueError, match=r"file: expected one that ends in .safetensors, .onnx or .pt2, got"):
        export(weights, tmp_path / name)


def test_other_onnx_files_are_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "a.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match="a.onnx: cannot be read as an ONNX model"):
        load_model(tmp_path / "a.onnx")
