"""Hosts of the objective: AVSBench's TPAVI and AVSegFormer, each with and without ICF."""
import pytest
import torch

from icf.cli import main
from icf.config import Config
from icf.engine.checkpoint import export, load_model, save_weights
from icf.model.build import build_model
from icf.model.hosts import SoundAttention
from icf.model.icf import ICF
from icf.model.packing import SILENT, Packing

HOSTS = ["tpavi", "avsegformer"]


@pytest.fixture
def settings(small):
    """The configuration of a host, with the objective where `icf` says so."""
    def settings(network, icf=False, classes=1, loss=None, mit=None) -> Config:
        return small(model={"network": network, "classes": classes, "decoder": {"layers": 2}}, loss=loss or {},
                     objective={"enabled": icf, "mit": mit or {}})
    return settings


@pytest.fixture
def make(settings):
    def make(*args, **options):
        torch.manual_seed(0)
        return build_model(settings(*args, **options))
    return make


def test_the_network_is_chosen_by_the_configuration(make):
    assert isinstance(make("icf"), ICF)
    assert [type(make(host)).__name__ for host in HOSTS] == ["TPAVI", "AVSegFormer"]


@pytest.mark.parametrize("classes", [1, 7])
@pytest.mark.parametrize("host", HOSTS)
def test_padded_frames_are_never_computed_and_come_out_empty(host, classes, make, make_batch):
    model, batch = make(host, classes=classes).eval(), make_batch((5, 3), classes=classes)
    counts = []
    for part in (model.visual, model.audio):
        part.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    with torch.no_grad():
        out = model(batch)
        batch.frames[1, 3:], batch.log_mel[1, 3:] = 99, 3.0
        assert torch.equal(out, model(batch))
    assert out.shape == (2, 5, classes, 64, 64) and counts == [8] * 4
    if classes == 1:
        assert (out[1, 3:] == SILENT).all() and (out[:, :3] != SILENT).all()
    else:
        assert (out[1, 3:].argmax(1) == 0).all()
        torch.testing.assert_close(out.sum(2), torch.ones(2, 5, 64, 64))


@pytest.mark.parametrize("host", HOSTS)
def test_a_padded_clip_is_predicted_as_alone(host, make, make_batch, settle):
    model, batch, short = settle(make(host)).eval(), make_batch((5, 3)), make_batch((3,), steps=3)
    short.frames, short.log_mel = batch.frames[1:, :3], batch.log_mel[1:, :3]
    with torch.no_grad():
        torch.testing.assert_close(model(batch)[1, :3], model(short)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_sound_attention_is_the_published_sum_over_all_pixels_of_a_clip(masked, settle):
    attend = settle(SoundAttention(7, 8)).eval()
    frame_mask = torch.tensor([[True] * 3, [True, True, not masked]])
    clips = Packing(frame_mask.flatten().nonzero()[:, 0], frame_mask)
    maps, audio = torch.randn(2, 3, 8, 2, 2), torch.randn(2, 3, 7)
    out = attend(clips.pack(maps), audio, clips)
    x, a = maps[1][frame_mask[1]], audio[1][frame_mask[1]]                           # the second clip, as published
    theta = attend.theta(x).permute(0, 2, 3, 1).flatten(0, 2)                       # [N, C']
    phi = attend.phi(a).repeat_interleave(4, 0)
    value = attend.g(x.permute(0, 2, 3, 1)).flatten(0, 2)
    y = (theta @ phi.T / len(phi)) @ value
    z = x + attend.expand(y.view(-1, 2, 2, 4).permute(0, 3, 1, 2))
    torch.testing.assert_close(out[3:], attend.norm(z.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@pytest.mark.parametrize("icf", [False, True])
@pytest.mark.parametrize(("classes", "labels"), [(1, 1), (7, None)])
@pytest.mark.parametrize("host", HOSTS)
def test_gradients_reach_every_trainable_parameter(host, classes, labels, icf, make, make_batch, settle):
    model = settle(make(host, icf, classes))
    losses = model(make_batch((5, 3), classes=classes, labels=labels))
    losses.total.backward()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    if not icf:
        assert silent == [] and not {"cf", "va", "al", "vl"} & losses.terms.keys()
    else:                                               # what the objective leaves without gradient is its own affair
        assert [name for name in silent if not name.startswith("objective.")] == []
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        assert {"cf", "va", "al", "vl"} <= losses.terms.keys()


@pytest.mark.parametrize("host", HOSTS)
def test_the_objective_reaches_the_encoders_through_the_host(host, make, make_batch, settle):
    model, batch = settle(make(host, True)), make_batch(labels=1)
    terms = model(batch).terms
    (terms["va"] + terms["al"] + terms["vl"]).backward()
    for encoder in (model.visual, model.audio):
        assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())


@pytest.mark.parametrize("host", HOSTS)
def test_with_and_without_icf_a_seed_gives_the_same_host(host, make, make_batch):
    model, batch = make(host), make_batch()
    full = make(host, True)
    assert {name for name, _ in full.named_parameters()} - {name for name, _ in model.named_parameters()} == {
        name for name, _ in full.named_parameters() if name.startswith("objective.")} != set()
    terms, more = model(batch).detached(), full(batch).detached()
    assert all(torch.equal(more[name], value) for name, value in terms.items() if name != "total")
    with torch.no_grad():
        assert torch.equal(model.eval()(batch), full.eval()(batch))


@pytest.mark.parametrize("host", HOSTS)
def test_nothing_of_the_objective_runs_at_test_time(host, make, make_batch):
    model, batch = make(host, True), make_batch()
    for module in model.objective.modules():
        module.register_forward_pre_hook(lambda *_: pytest.fail("a part of training ran"))
    with torch.no_grad():
        model.eval()(batch)


@pytest.mark.parametrize("host", HOSTS)
def test_sound_changes_the_masks(host, make, make_batch, settle):
    model, batch = settle(make(host)).eval(), make_batch()
    with torch.no_grad():
        before = model(batch)
        batch.log_mel = batch.log_mel.flip(0)
        assert (model(batch) - before).abs().mean() > 0.01 * before.std()


@pytest.mark.parametrize("icf", [False, True])
@pytest.mark.parametrize("host", HOSTS)
def test_a_few_steps_lower_the_loss(host, icf, make, make_batch):
    model, batch = make(host, icf), make_batch((2, 2), 2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3)
    history = []
    for _ in range(12):
        losses = model(batch)
        losses.total.backward()
        optimizer.step(), optimizer.zero_grad()
        history.append(sum(float(losses.terms[name].detach()) for name in ("bce", "dice")))
    assert sum(history[-3:]) < 0.93 * sum(history[:3])


@pytest.mark.parametrize(("host", "loss", "parts"), [
    ("tpavi", {"dice": 0.0, "focal": 0.0}, {"bce": 1.0}),
    ("avsegformer", {"bce": 0.0, "focal": 0.0}, {"dice": 1.0, "mix": 0.1})])
@pytest.mark.parametrize("classes", [1, 7])
def test_total_is_the_published_sum(host, loss, parts, classes, make, make_batch):
    losses = make(host, classes=classes, loss=loss)(make_batch(classes=classes))
    if classes > 1:
        parts = {"ce": 1.0, **{name: weight for name, weight in parts.items() if name == "mix"}}
    torch.testing.assert_close(losses.total, sum(weight * losses.terms[name] for name, weight in parts.items()))
    assert ("mix" in losses.terms) == ("mix" in parts)


def test_the_foreground_of_classes_trains_the_features_of_avsegformer(make, make_batch):
    """All that is not background, whatever its class; unknown pixels stay unknown."""
    model, batch = make("avsegformer", classes=7), make_batch(classes=7)
    model.train().visual.eval()
    batch.masks[0, 0, :32] = 255
    mix = model(batch).terms["mix"]
    batch.masks[(batch.masks > 0) & (batch.masks < 255)] = 3
    assert torch.equal(model(batch).terms["mix"], mix)


@pytest.mark.parametrize("host", HOSTS)
def test_masks_of_unlabelled_frames_do_not_matter(host, make, make_batch):
    model, batch = make(host, True), make_batch(labels=1)
    model.train().visual.eval()
    before = {name: value for name, value in model(batch).detached().items() if name in ("bce", "dice", "mix")}
    batch.masks[:, 1:] = 1
    after = model(batch).detached()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("host", HOSTS)
def test_bf16_autocast_trains(host, make, make_batch):
    model, batch = make(host, True), make_batch((5, 3))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch)
    losses.total.backward()
    assert losses.total.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.eval()(batch).dtype == torch.float32


@pytest.mark.parametrize("icf", [False, True])
@pytest.mark.parametrize("host", HOSTS)
def test_saved_and_loaded_it_segments_the_same(host, icf, make, settings, make_batch, tmp_path):
    model, batch, cfg = make(host, icf), make_batch(), settings(host, icf)
    model(batch)                                                            # moves the statistics of BatchNorm
    save_weights(tmp_path / "best.safetensors", model.state_dict(), cfg)
    export(tmp_path, tmp_path / "slim.safetensors")
    with torch.no_grad():
        expected = model.eval()(batch)
        for source in ("best", "slim"):
            loaded, found = load_model(tmp_path / f"{source}.safetensors")
            assert found == cfg and type(loaded) is type(model)
            assert not any(name.startswith("objective.") for name in loaded.state_dict())
            assert torch.equal(loaded(batch), expected)
    with pytest.raises(RuntimeError, match="built for inference"):
        loaded.train()(batch)


@pytest.mark.parametrize(("options", "match"), [
    (dict(loss={"preset": "combo"}), "loss.preset: combo .* model.network=tpavi"),
    (dict(icf=True, mit={"inject": "cross_attention"}), "objective.mit.inject: expected none")])
def test_what_a_host_does_not_have_is_refused(options, match, make):
    with pytest.raises(ValueError, match=match):
        make("tpavi", **options)


def test_a_matched_head_is_refused(settings):
    cfg = settings("avsegformer")
    cfg.model.decoder.head = "mask2former"
    with pytest.raises(ValueError, match="model.decoder.head: expected auto or dense for model.network=avsegformer"):
        build_model(cfg)


@pytest.mark.parametrize(("more", "enabled", "out"), [
    ([], False, "runs/toy-tpavi"), (["--with-icf"], True, "runs/toy-tpavi-icf"),
    (["--with-icf", "--out", "mine"], True, "mine")])
def test_the_flag_adds_the_objective_and_keeps_both_runs_apart(more, enabled, out, monkeypatch):
    runs = []
    monkeypatch.setattr("icf.engine.train.train", lambda cfg, resume: runs.append(cfg))
    main(["train", "toy-tpavi", *more])
    assert runs[0].objective.enabled == enabled and str(runs[0].out) == out and runs[0].model.network == "tpavi"
