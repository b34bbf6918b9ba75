"""Encoders: shapes, normalisation, and the weight files that users own."""
import argparse

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.models import resnet50

from icf.data.audio import log_mel_spectrogram
from icf.model.audio import VGGish, YAMNet, rebase
from icf.model.visual import VisualEncoder


@pytest.mark.parametrize(("name", "channels", "millions"), [
    ("pvt_v2_b5", [64, 128, 320, 512], 81.4), ("resnet50.tv_in1k", [256, 512, 1024, 2048], 23.5)])
def test_the_papers_encoders_have_their_sizes(name, channels, millions):
    with torch.device("meta"):
        encoder = VisualEncoder(name, "none")
    assert encoder.channels == channels
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_vggish_has_its_size_and_layout():
    with torch.device("meta"):
        vggish = VGGish("none")
    shapes = {name: tuple(p.shape) for name, p in vggish.named_parameters()}
    assert sum(p.numel() for p in vggish.parameters()) / 1e6 == pytest.approx(72.1, abs=0.05)
    assert list(shapes) == [f"{part}.{i}.{kind}" for part, places in (
        ("features", (0, 3, 6, 8, 11, 13)), ("embeddings", (0, 2, 4))) for i in places for kind in ("weight", "bias")]
    assert shapes["features.13.weight"] == (512, 512, 3, 3) and shapes["embeddings.0.weight"] == (4096, 12288)


@pytest.mark.parametrize("name", ["pvt_v2_b0", "resnet18", "resnet10t", "mobilenetv4_conv_small", "convnext_atto",
                                  "swin_tiny_patch4_window7_224"])
def test_any_pyramid_of_timm_gives_four_maps(name):
    encoder = VisualEncoder(name, "none").eval()
    size = 224 if name.startswith("swin") else 64
    with torch.no_grad():
        maps = encoder(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    assert [tuple(x.shape) for x in maps] == [
        (1, c, size // s, size // s) for c, s in zip(encoder.channels, (4, 8, 16, 32), strict=True)]


def test_pictures_are_normalised_as_the_weights_expect():
    encoder = VisualEncoder("resnet10t", "none", freeze_norm=True)
    frames = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = encoder.net((frames / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    torch.testing.assert_close(encoder(frames), expected)


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_statistics_do_not_move(freeze):
    encoder = VisualEncoder("resnet10t", "none", freeze_norm=freeze).train()
    before = encoder.net.bn1.running_mean.clone()
    encoder(torch.full((2, 3, 32, 32), 200, dtype=torch.uint8))
    assert torch.equal(before, encoder.net.bn1.running_mean) == freeze


def test_torchvisions_resnet50_file_is_read(tmp_path):
    source = resnet50(weights=None).eval()
    torch.save(source.state_dict(), tmp_path / "resnet50-19c8e357.pth")
    encoder = VisualEncoder("resnet50.tv_in1k", str(tmp_path / "resnet50-19c8e357.pth")).eval()
    state = encoder.net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in source.state_dict().items() if "fc." not in name)


def test_the_original_key_names_of_pvt_are_read(tmp_path):
    source = timm.create_model("pvt_v2_b0", pretrained=False)
    original = {}
    for name, value in source.state_dict().items():                         # stages.1.blocks.0.x was block2.0.x
        parts = name.split(".")
        if parts[0] == "patch_embed":
            parts[0] = "patch_embed1"
        elif parts[0] == "stages":
            stage = int(parts[1]) + 1
            parts = {"blocks": [f"block{stage}"], "norm": [f"norm{stage}"],
                     "downsample": [f"patch_embed{stage}"]}[parts[2]] + parts[3:]
        original[".".join(parts)] = value
    torch.save(original, tmp_path / "pvt_v2_b0.pth")
    encoder = VisualEncoder("pvt_v2_b0", str(tmp_path / "pvt_v2_b0.pth"))
    read, expected = encoder.net.state_dict(), source.state_dict()
    assert len(read) >= len(expected) - 4                                   # all but the classifier
    for name, value in read.items():
        assert torch.equal(value, expected[name.replace("stages_", "stages.")]), name


def test_safetensors_of_vggish_and_of_a_checkpoint_are_read(tmp_path):
    state = timm.create_model("resnet10t", pretrained=False).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    torch.save({"state_dict": state}, tmp_path / "checkpoint.pth")
    for name in ("weights.safetensors", "checkpoint.pth"):
        encoder = VisualEncoder("resnet10t", str(tmp_path / name))
        assert torch.equal(encoder.net.state_dict()["conv1.0.weight"], state["conv1.0.weight"])


@pytest.mark.parametrize("wrap", [
    lambda state: {"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}},
    lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}, "best_acc1": 0.8},
    lambda state: {"model_state_dict": state}, lambda state: {"model": {"state_dict": state}}])
@pytest.mark.parametrize("name, head", [("resnet10t", "fc."), ("pvt_v2_b0", "head.")])
def test_checkpoints_of_training_runs_are_read_with_and_without_a_head(tmp_path, name, head, wrap):
    state = timm.create_model(name).state_dict()
    shown = next(key for key in state if key.endswith("weight") and not key.startswith(head))
    for kind in ("whole", "headless", "other classes"):
        kept = {key: value[:7] if key.startswith(head) else value for key, value in state.items()
                if kind != "headless" or not key.startswith(head)}
        torch.save(wrap(kept if kind != "whole" else state), tmp_path / "w.pth")
        read = VisualEncoder(name, str(tmp_path / "w.pth")).net.state_dict()
        assert torch.equal(next(value for key, value in read.items() if key.replace("_", ".") == shown.replace(
            "_", ".")), state[shown])
    del kept[shown]
    torch.save(wrap(kept), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"does not fit {name} .*{shown}") as caught:  # the reason is not cut off
        VisualEncoder(name, str(tmp_path / "w.pth"))
    assert "\n" not in str(caught.value)


def test_vggish_reads_the_published_layout_and_rejects_another(tmp_path, monkeypatch):
    source = VGGish("none", width=0.0625)
    torch.save(source.state_dict(), tmp_path / "vggish.pth")
    with pytest.raises(ValueError, match="model.audio.width"):
        VGGish(str(tmp_path / "vggish.pth"), width=0.0625)
    with pytest.raises(ValueError, match="holds another network"):
        VGGish(str(tmp_path / "vggish.pth"))
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda url, **options: full)
    full = VGGish("none").state_dict()
    assert torch.equal(VGGish("download").features[0].weight, full["features.0.weight"])


def test_vggish_flattens_channels_last():
    """The published weights come from TensorFlow: the 12288 inputs are ordered height, width, channel."""
    vggish = VGGish("none", width=0.0625)
    x = torch.randn(2, 1, 96, 64)
    maps = vggish.features(x)
    rows = torch.stack([maps[:, c, i, j] for i in range(6) for j in range(4) for c in range(maps.shape[1])], 1)
    torch.testing.assert_close(vggish.embed(x), vggish.embeddings(rows))


def test_vggish_is_frozen_unless_asked(make_batch):
    x = torch.randn(2, 1, 96, 64)
    frozen, trained = VGGish("none", 0.0625), VGGish("none", 0.0625, train=True)
    assert not frozen.train().training and not frozen(x).requires_grad and trained(x).requires_grad


@pytest.mark.parametrize(("weights", "error", "match"), [
    ("missing.pth", FileNotFoundError, "there is no file"), ("text.pth", ValueError, "cannot be read as weights"),
    ("object.pth", ValueError, "cannot be read as weights"), ("other.pth", ValueError, "does not fit|another network")])
def test_bad_files_get_one_clear_line(tmp_path, weights, error, match):
    (tmp_path / "text.pth").write_text("not weights")
    torch.save(object(), tmp_path / "object.pth")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    for encoder, key in ((lambda path: VisualEncoder("resnet10t", path), "model.visual.weights"), (VGGish,
                         "model.audio.weights")):
        with pytest.raises(error, match=match) as caught:
            encoder(str(tmp_path / weights))
        assert key in str(caught.value) and weights in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no_such_net", "vit_tiny_patch16_224"])
def test_networks_without_a_pyramid_are_refused(name):
    with pytest.raises(ValueError, match="model.visual.name"):
        VisualEncoder(name, "none")


def test_a_failed_download_says_what_to_do(monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no network\nsecond line")
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(ConnectionError, match="model.audio.weights: could not fetch .*no network.*local") as audio:
        VGGish("download")
    with pytest.raises(ConnectionError, match="model.visual.weights: .*no network.*local file") as visual:
        VisualEncoder("resnet10t", "imagenet")
    assert "\n" not in str(audio.value) + str(visual.value)


def yamnet_layouts():
    """A YAMNet with batch norms as published in three layouts, and what they fold to."""
    generator, port, google, folded = torch.Generator().manual_seed(1), {}, {}, {}
    for name, conv in ((f"{layer}.{part}", conv) for layer, parts in YAMNet("none").net.items()
                       for part, conv in parts.items()):
        layer, part = name.split(".")
        weight, out = torch.randn(conv.weight.shape, generator=generator), len(conv.weight)
        mean, variance, shift = torch.rand(3, out, generator=generator)
        long = {"conv": "conv", "dw": "depthwise_conv", "pw": "pointwise_conv"}[part]
        ported = f"{layer}.{'fused' if part == 'conv' else long}"
        port |= {f"{ported}.conv.weight": weight, f"{ported}.bn.weight": torch.ones(out), f"{ported}.bn.bias": shift,
                 f"{ported}.bn.running_mean": mean, f"{ported}.bn.running_var": variance,
                 f"{ported}.bn.num_batches_tracked": torch.tensor(1)}
        kernel, order = ("depthwise_kernel", (2, 3, 0, 1)) if part == "dw" else ("kernel", (2, 3, 1, 0))
        google |= {f"{layer}/{long}/{kernel}:0": weight.permute(order), f"{layer}/{long}/bn/beta:0": shift,
                   f"{layer}/{long}/bn/moving_mean:0": mean, f"{layer}/{long}/bn/moving_variance:0": variance}
        scale = 1 / (variance + 1e-4).sqrt()
        folded |= {f"{name}.weight": weight * scale.view(-1, 1, 1, 1), f"{name}.bias": shift - mean * scale}
    port["classifier.weight"] = google["logits/kernel:0"] = folded["dense.weight"] = torch.zeros(2, 2)
    return port, google, folded


def test_yamnet_is_read_in_the_layouts_that_people_have(tmp_path):
    port, google, folded = yamnet_layouts()
    torch.save(port, tmp_path / "yamnet.pth")
    save_file({name: value.contiguous() for name, value in google.items()}, tmp_path / "google.safetensors")
    np.savez(tmp_path / "folded.npz", **{name: value.numpy() for name, value in folded.items()})
    for name in ("yamnet.pth", "google.safetensors", "folded.npz"):
        state = YAMNet(str(tmp_path / name)).net.state_dict()
        for key, value in state.items():
            torch.testing.assert_close(value, folded[key], rtol=1e-5, atol=1e-5, msg=f"{name}: {key}")
    np.savez(tmp_path / "pickled.npz", **{"layer1.conv.weight": np.array([{}], dtype=object)})
    np.savez(tmp_path / "other.npz", **{"layer1.conv.weight": np.zeros((32, 1, 3, 3))})
    for name, said in (("pickled.npz", "cannot be read as weights"), ("other.npz", "another network than YAMNet")):
        with pytest.raises(ValueError, match=said):
            YAMNet(str(tmp_path / name))


def test_yamnets_projection_is_trained_though_it_is_frozen():
    x, yamnet = torch.randn(2, 1, 96, 64), YAMNet("none", 0.0625).train()
    y = yamnet(x)
    y.sum().backward()
    assert y.shape == (2, 128) and not yamnet.net.training
    assert {name.split(".")[0] for name, p in yamnet.named_parameters() if p.grad is not None} == {"projection"}
    assert not list(YAMNet("none", 0.0625, train=True).kept.rows)


@pytest.mark.parametrize("kind", [VGGish, YAMNet])
def test_frozen_features_are_computed_once_and_are_the_same(kind, monkeypatch):
    x, encoder, calls = torch.randn(6, 1, 96, 64), kind("none", 0.0625), []
    batches, embed = ([0, 1], [3, 1, 1], [5, 4, 3, 2, 1, 0]), encoder.embed
    with monkeypatch.context() as without:
        without.setattr("icf.model.audio.KEPT", 0)
        expected = [encoder(x[chosen]) for chosen in batches]
        assert not encoder.kept.rows
    monkeypatch.setattr(encoder, "embed", lambda y: calls.append(len(y)) or embed(y))
    for chosen, same in zip(batches, expected, strict=True):
        assert torch.equal(encoder(x[chosen]), same)
    assert sum(calls) == 6
    assert not torch.equal(encoder(x + 1), encoder(x)) and sum(calls) == 12      # a disturbed sound is another
    encoder.load_state_dict({name: value / 2 for name, value in encoder.state_dict().items()})
    encoder(x)
    assert sum(calls) == 18                                                 # other weights


def test_kept_features_have_a_bound(monkeypatch):
    encoder = VGGish("none", 0.0625)
    monkeypatch.setattr("icf.model.audio.KEPT", 3 * 128 * 4)
    encoder(torch.randn(6, 1, 96, 64))
    assert len(encoder.kept.rows) == 3


@pytest.mark.parametrize("loudness", [0.0, 1e-3, 0.1, 1.0])
def test_yamnet_hears_by_its_own_front_end(loudness, monkeypatch):
    sound = loudness * torch.randn(16000).clamp(-1, 1)
    vggish = log_mel_spectrogram(sound)
    monkeypatch.setattr("icf.data.audio.OFFSET", 0.001)
    torch.testing.assert_close(rebase(vggish), log_mel_spectrogram(sound), rtol=0, atol=1e-4)
