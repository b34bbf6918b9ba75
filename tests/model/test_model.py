"""The whole model: the path, padding, supervision, learning."""
import copy
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from icf.config import AudioConfig, ContextConfig, DecoderConfig, LossConfig, ModelConfig, VisualConfig
from icf.model.icf import ICF
from icf.model.packing import SILENT


@pytest.mark.parametrize(("classes", "steps"), [(1, 5), (71, 10)])
def test_shapes_of_the_paper(make_batch, classes, steps):
    """Every tensor between parts as in the method, at 224 x 224, with the small network's widths."""
    model = ICF(ModelConfig(classes, VisualConfig("pvt_v2_b0", "none"), AudioConfig("none", 0.0625),
                            ContextConfig(dim=16),
                            DecoderConfig(dim=32, pixel_layers=1, pixel_ffn=32, layers=9, ffn=32, queries=100))).eval()
    seen = {}
    for name in ("visual", "audio", "context", "pixel_decoder", "decoder"):
        getattr(model, name).register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        out = model(make_batch((steps,), steps, 224, classes))
    assert [tuple(x.shape) for x in seen["visual"]] == [
        (steps, c, s, s) for c, s in ((32, 56), (64, 28), (160, 14), (256, 7))]
    assert seen["audio"].shape == (steps, 128)
    assert [tuple(x.shape) for x in seen["context"]] == [(steps, 160, 14, 14), (steps, 256, 7, 7)]
    pixels, levels = seen["pixel_decoder"]
    assert pixels.shape == (steps, 32, 56, 56) and [x.shape[2] for x in levels] == [28, 14, 7]
    decoded = seen["decoder"]
    assert decoded.pixels.shape == (steps, 32, 56, 56) and decoded.audio.shape == (steps, 1, 32)
    assert decoded.masks.shape == (1, steps, 1 if classes == 1 else 100, 56, 56)
    assert classes == 1 or decoded.classes.shape == (1, steps, 100, 72)
    assert out.shape == (1, steps, classes, 224, 224)


def test_paper_settings_build():
    with torch.device("meta"):
        model = ICF(ModelConfig(), pretrained=False)
    millions = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    assert len(model.decoder.masked.layers) == 9 and len(model.pixel_decoder.layers) == 6
    assert millions["visual"] == pytest.approx(81.4, abs=0.05) and millions["audio"] == pytest.approx(72.1, abs=0.05)
    assert not any(p.requires_grad for p in model.audio.parameters())


@pytest.mark.parametrize("classes", [1, 7])
def test_gradients_reach_every_trainable_parameter(make_model, make_batch, settle, classes):
    model = settle(make_model(classes))
    model(make_batch((5, 3), classes=classes)).total.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    # a key's bias shifts all scores of a query alike, and so do the last layer's normalised statistics
    assert [name for name in silent if not name.endswith(("key.bias", "audio_key.bias"))] == []


@pytest.mark.parametrize("query_mode", ["bidirectional", "audio", "learnable"])
@pytest.mark.parametrize("deep", [True, False])
def test_no_parameter_is_left_out_of_the_graph(make_model, make_batch, query_mode, deep):
    """DistributedDataParallel waits for the gradient of every parameter."""
    model = make_model(loss=LossConfig(deep_supervision=deep), query_mode=query_mode)
    model(make_batch(labels=1)).total.backward()
    idle = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None}
    assert idle == ({"audio"} if query_mode == "learnable" else set())


@pytest.mark.parametrize(("classes", "head", "preset"), [
    (1, "dense", "paper"), (1, "mask2former", "paper"), (4, "mask2former", "paper"), (4, "mask2former", "combo")])
def test_a_few_steps_lower_the_loss(make_model, make_batch, classes, head, preset):
    model, batch = make_model(classes, LossConfig(preset), head=head, layers=2), make_batch((2, 2), 2, classes=classes)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    history = []
    for _ in range(12):
        losses = model(batch)
        losses.total.backward()
        optimizer.step(), optimizer.zero_grad()
        history.append(float(losses.detached()["total"]))
    assert sum(history[-3:]) < 0.93 * sum(history[:3])


def test_total_is_the_weighted_sum(make_model, make_batch):
    model = make_model(loss=LossConfig(bce=2.0, dice=0.5, focal=3.0))
    losses = model(make_batch())
    terms = losses.detached()
    torch.testing.assert_close(terms["total"], 2 * terms["bce"] + terms["dice"] / 2 + 3 * terms["focal"])
    assert set(terms) == {"total", "bce", "dice", "focal"} and not terms["total"].requires_grad


def test_deep_supervision_adds_a_term_per_head(make_model, make_batch):
    batch = make_batch()
    deep, last = make_model(), make_model(loss=LossConfig(deep_supervision=False))
    last.load_state_dict(deep.state_dict())
    heads = []
    deep.decoder.register_forward_hook(lambda module, args, out: heads.append(len(out.masks)))
    last.decoder.register_forward_hook(lambda module, args, out: heads.append(len(out.masks)))
    assert deep(batch).total > 2 * last(batch).total and heads == [4, 1]


@pytest.mark.parametrize("classes", [1, 7])
def test_padded_frames_are_never_computed_and_come_out_empty(make_model, make_batch, classes):
    model, batch = make_model(classes).eval(), make_batch((5, 3), classes=classes)
    counts = []
    for part in (model.visual, model.audio, model.pixel_decoder):
        part.register_forward_pre_hook(lambda module, args: counts.append(
            len(args[0]) if torch.is_tensor(args[0]) else len(args[0][0])))
    with torch.no_grad():
        out = model(batch)
        batch.frames[1, 3:], batch.log_mel[1, 3:] = 99, 3.0
        assert torch.equal(out, model(batch))
    assert counts == [8, 8, 8] * 2
    if classes == 1:
        assert (out[1, 3:] == SILENT).all() and (out[:, :3] != SILENT).all()
    else:
        assert (out[1, 3:].argmax(1) == 0).all() and (out[1, 3:].sum(1) == 1).all()


def test_a_padded_clip_is_predicted_as_alone(make_model, make_batch, settle):
    model, batch = settle(make_model()).eval(), make_batch((5, 3))
    short = make_batch((3,), steps=3)
    short.frames, short.log_mel = batch.frames[1:, :3], batch.log_mel[1:, :3]
    with torch.no_grad():
        torch.testing.assert_close(model(batch)[1, :3], model(short)[0], atol=1e-5, rtol=1e-4)


def test_only_labelled_frames_are_decoded_in_training_and_it_changes_nothing(make_model, make_batch, settle):
    model, batch = settle(make_model()).train(), make_batch((5, 4), labels=1)
    for module in model.modules():                                          # statistics of a batch aside
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    counts = []
    model.pixel_decoder.register_forward_pre_hook(lambda module, args: counts.append(len(args[0][0])))
    terms = model(batch).detached()
    find, labelled = model._losses, batch.labelled
    batch.labelled = batch.real                                             # decode all, then keep the labelled ones
    model._losses = lambda decoded, masks: find(
        decoded._replace(masks=decoded.masks[:, torch.searchsorted(batch.real, labelled)]),
        batch.masks.flatten(0, 1)[labelled])
    torch.testing.assert_close(model(batch).detached(), terms, atol=1e-5, rtol=1e-5)
    assert counts == [2, 9]


def test_the_context_sees_frames_without_labels(make_model, make_batch, settle):
    model, batch = settle(make_model(levels=("video",))), make_batch(labels=1)
    model.visual.eval()
    before = model(batch).detached()["total"]
    batch.frames[:, 3] = 255 - batch.frames[:, 3]
    assert model(batch).detached()["total"] != before


def test_unlabelled_masks_do_not_matter(make_model, make_batch):
    model, batch = make_model(), make_batch(labels=1)
    model.visual.eval()
    before = model(batch).detached()["total"]
    batch.masks[:, 1:] = 1
    assert model(batch).detached()["total"] == before


@pytest.mark.parametrize("classes", [1, 7])
def test_training_and_evaluation_see_the_same_masks(make_model, make_batch, classes):
    """With frozen statistics, nothing but the loss tells the modes apart."""
    model, batch = make_model(classes), make_batch((5, 3), classes=classes)
    model.visual.eval()
    masks = []
    model.decoder.register_forward_hook(lambda module, args, out: masks.append(out.masks[-1]))
    model(batch)
    model.training = False
    model(batch)
    torch.testing.assert_close(masks[0], masks[1], atol=1e-5, rtol=1e-5)


def test_semantic_scores_are_the_mean_of_masks_over_queries(make_model, make_batch):
    model, batch, decoded = make_model(7).eval(), make_batch(classes=7), []
    model.decoder.register_forward_hook(lambda module, args, out: decoded.append(out))
    with torch.no_grad():
        scores = model(batch)[1, 2]
    p = decoded[0].classes[0, 7].softmax(-1)
    masks = torch.nn.functional.interpolate(decoded[0].masks[0, 7:8], scale_factor=4, mode="bilinear")[0].sigmoid()
    torch.testing.assert_close(scores, (p[:, :7, None, None] * masks[:, None]).sum(0))


def test_binary_masks_of_a_matched_head_are_logits_of_their_score(make_model, make_batch):
    model, batch = make_model(1, head="mask2former").eval(), make_batch((5, 2))
    with torch.no_grad():
        out = model(batch)
    assert out.shape == (2, 5, 1, 64, 64) and (out[1, 2:] == SILENT).all() and out[0].sigmoid().std() > 0


def test_sound_changes_the_masks(make_model, make_batch):
    model, batch = make_model().eval(), make_batch()
    with torch.no_grad():
        before = model(batch)
        batch.log_mel = batch.log_mel.flip(0)
        assert (model(batch) - before).abs().mean() > 0.01 * before.std()


def test_a_loaded_state_gives_the_same_masks(make_model, make_batch, tmp_path):
    model, batch = make_model().eval(), make_batch()
    other = make_model().eval()
    with torch.no_grad():
        assert not torch.equal(other(batch), model(batch))
        torch.save(model.state_dict(), tmp_path / "model.pth")
        other.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
        assert torch.equal(other(batch), model(batch))


@pytest.mark.parametrize("classes", [1, 7])
def test_bf16_autocast_trains(make_model, make_batch, classes):
    model, batch = make_model(classes), make_batch((5, 3), classes=classes)
    same = copy.deepcopy(model)
    torch.manual_seed(3)
    expected = same(batch).detached()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch)
    losses.total.backward()
    assert losses.total.dtype == torch.float32
    assert float(losses.detached()["total"]) == pytest.approx(float(expected["total"]), rel=0.1)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.eval()(batch).dtype == torch.float32


def test_the_same_seed_gives_the_same_step(make_model, make_batch):
    totals = []
    for _ in range(2):
        torch.manual_seed(5)
        model = make_model(7)
        totals.append(model(make_batch(classes=7)).detached()["total"])
    assert totals[0] == totals[1]


@pytest.mark.parametrize("lengths", [(5, 5), (5, 3)])
def test_a_step_does_not_wait_for_the_device(make_model, make_batch, lengths):
    """No operator whose result's size depends on values, and no value read by the host, in forward or loss."""
    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")
            masked = func.overloadpacket.__name__ == "index" and any(
                i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
            assert not masked, "indexing with a mask waits for its sum"
            return func(*args, **(kwargs or {}))

    model, batch = make_model(), make_batch(lengths, labels=1)
    with Refuse():
        model(batch).total.backward()
        model.eval()(batch)


def test_parts_compile_into_one_graph_each(make_model, make_batch):
    model, batch = make_model(layers=1).eval(), make_batch()
    with torch.no_grad():
        expected = model(batch)
        for name in ("context", "decoder"):
            setattr(model, name, torch.compile(getattr(model, name), backend="eager", fullgraph=True))
        torch.testing.assert_close(model(batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("settings", "loss", "match"), [
    (ModelConfig(classes=7, decoder=DecoderConfig(head="dense")), LossConfig(), "model.decoder.head"),
    (ModelConfig(), LossConfig(preset="combo"), "loss.preset")])
def test_contradictions_are_refused_before_weights_are_fetched(settings, loss, match):
    with pytest.raises(ValueError, match=match):
        ICF(settings, loss)


def test_it_runs_without_the_libraries_of_training_and_data():
    absent, unused = ["transformers", "diffusers", "accelerate", "icf.engine.train"], ["icf.cli", "icf.data.avsbench"]
    code = (f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
            f"import icf.model.icf; assert not {{*{unused}, 'icf.engine.evaluate'}} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)
