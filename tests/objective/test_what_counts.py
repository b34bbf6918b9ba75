"""What is padding, not finite, or not the clip's own enters neither loss nor statistic."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from icf import ICFObjective
from icf.config import CDCLConfig, MITConfig, ObjectiveConfig, SCConfig
from icf.context import LevelFeatures
from icf.model.visual import keep_finite
from icf.objective.cdcl import CDCL
from icf.objective.mit import MIT, Text
from icf.objective.objective import build_towers, others
from icf.objective.sc import SC, Counterfactuals
from icf.ops import gaussian_wasserstein

T, D = 5, 24
KINDS = ["distribution", "prototype", "feature"]
SMALL_SC = {"dim": 16, "blocks": 2, "candidates": 5, "keep": 3, "ddim_steps": 4, "width": 16, "layers": 1, "heads": 2}


def prefix_mask(*lengths):
    return torch.arange(T) < torch.tensor(lengths)[:, None]


def make_objective(mit=(), sc=(), cdcl=()):
    hash_towers = {"frame": "hash", "video": "hash", "audio": "hash"}
    return ICFObjective(12, 7, ObjectiveConfig(
        mit=MITConfig(**{**hash_towers, "texts": 6, **dict(mit)}), sc=SCConfig(**{**SMALL_SC, **dict(sc)}),
        cdcl=CDCLConfig(**{"dim": 16, **dict(cdcl)})))


def features(b=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, T, 12, 6, 6, generator=g), torch.randn(b, T, 7, generator=g)


def said(b=4, steps=T):
    choices, index = F.normalize(torch.randn(6, D), dim=-1), torch.randint(0, 6, (b, T))
    return Text(torch.randn(b, steps, D), torch.randn(b, T, D), choices[index], index, choices, {})


def imagined(b=4, steps=T, k=3):
    return Counterfactuals(torch.randn(b, k, steps, D), torch.rand(b, k), torch.rand(b, k), {}, {})


def take(record, rows):
    """The same rows of every tensor of a Text or Counterfactuals."""
    per_clip = ("z", "visual", "audio", "index", "texts", "degree", "alpha")
    return record._replace(**{name: getattr(record, name)[rows] for name in per_clip if name in record._fields})


# --- not finite -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("place", ["visual", "audio"])
@pytest.mark.parametrize("first", [True, False])
def test_one_bad_value_spoils_one_step_and_is_counted(value, place, first):
    objective, (visual, audio) = make_objective(), features()
    if not first:
        objective(visual, audio)
    bad = {"visual": visual.clone(), "audio": audio.clone()}
    bad[place].view(4, T, -1)[1, 2, 3] = value
    losses = objective(**bad)
    assert torch.isfinite(losses["total"]) or losses["left_out"] >= 1
    assert all(torch.isfinite(x).all() for x in objective.buffers())
    assert torch.isfinite(objective(*features(seed=1))["total"])


def test_the_other_features_of_a_spoilt_batch_are_followed():
    config = MITConfig(frame="hash", video="hash", audio="hash", texts=6)
    mit, levels = MIT(config, 7, build_towers(config)), LevelFeatures([12], 512, config.levels, ())
    visual, audio = features(3)
    audio[0, 1] = float("nan")
    text = mit(*levels([visual]), audio)
    heard = F.normalize(mit.hear(audio), dim=-1) @ mit.kept["audio"].T
    heard = heard.flatten(0, 1)[torch.arange(3 * T) != 1]
    torch.testing.assert_close(mit.usual_audio, torch.stack([heard.mean(0), heard.square().mean(0)]))
    assert text.left_out == 1


def test_texts_that_are_not_finite_are_not_kept():
    objective = make_objective()
    objective(*features())
    kept = objective.mit.kept["audio"].clone()
    with torch.no_grad():
        objective.mit.slots["audio"][0] = float("nan")
    objective(*features())
    assert torch.equal(objective.mit.kept["audio"], kept)


def test_batch_norm_keeps_its_statistics_where_a_batch_overflows():
    norm, plain = keep_finite(nn.BatchNorm2d(3)), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    for module in (norm, plain):
        module(x).sum().backward()
    torch.testing.assert_close(norm.running_var, plain.running_var)
    bad = torch.randn(4, 3, 5, 5)
    bad[0, 1, 0, 0] = float("inf")
    norm(bad), plain(bad)
    assert torch.isfinite(norm.running_mean).all() and torch.isfinite(norm.running_var).all()
    torch.testing.assert_close(norm.running_mean[[0, 2]], plain.running_mean[[0, 2]])       # the others go on


@pytest.mark.parametrize("network", ["icf", "tpavi"])
def test_every_batch_norm_of_a_network_is_guarded(network, small):
    from icf.model.build import build_model
    model = build_model(small(model={"network": network}, objective={"enabled": False}))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(m._forward_hooks and m._forward_pre_hooks for m in norms)


# --- padding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("negatives", ["cf", "batch"])
@pytest.mark.parametrize("pooled", [False, True])
def test_a_clip_without_seconds_is_no_clip(kind, negatives, pooled):
    """Beside it, all terms and statistics are those of the others alone."""
    cdcl = CDCL(CDCLConfig(dim=16, kind=kind, text_negatives=negatives), 12, 7, D)
    visual, audio = torch.randn(4, T, 12), torch.randn(4, T, 7)
    text, cf, mask = said(steps=1 if pooled else T), imagined(steps=1 if pooled else T), prefix_mask(5, 3, 0, 2)
    rows = torch.tensor([0, 1, 3])
    text = text._replace(index=torch.tensor([0, 1, 2, 3])[:, None].expand(-1, T))
    losses, statistics = cdcl(visual, audio, text, cf, mask)
    alone = cdcl(visual[rows], audio[rows], take(text, rows), take(cf, rows), mask[rows])
    for own, other in zip((losses, statistics), alone, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)


def test_contrast_of_features_is_that_of_the_real_seconds():
    """Against InfoNCE over the unit vectors of all real seconds, those of one clip positives of one another."""
    cdcl = CDCL(CDCLConfig(dim=16, kind="feature", pairs=("va",), positives="diag", entropy="none"), 12, 7, None)
    visual, audio, mask = torch.randn(3, T, 12), torch.randn(3, T, 7), prefix_mask(5, 3, 1)
    v, a = (F.normalize(cdcl.project[name](x), dim=-1)[mask] for name, x in (("v", visual), ("a", audio)))
    clip = torch.arange(3)[:, None].expand(-1, T)[mask]
    logits = -torch.cdist(v, a).square() / cdcl.config.tau
    positive = clip[:, None] == clip
    expected = sum((x.logsumexp(1) - x.masked_fill(~positive, -torch.inf).logsumexp(1)).mean()
                   for x in (logits, logits.T)) / 2
    torch.testing.assert_close(cdcl(visual, audio, frame_mask=mask)[0]["va"], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"mit": {"z_mode": "pooled"}}, {"mit": {"inversion_weight": 1.0}},
                                     {"cdcl": {"kind": "feature"}}, {"cdcl": {"kind": "feature"}, "mit": {
                                         "z_mode": "pooled"}}, {"sc": {"generator": "vqvae"}},
                                     {"sc": {"generator": "feature", "blocks": 4}}, {"sc": {"generator": "pair_swap"}},
                                     {"sc": {"generator": "audio_replacement"}}, {"sc": {"part": "other"}}], ids=str)
@pytest.mark.parametrize("lengths", [(5, 3, 1, 2), (5, 3, 0, 2)])
def test_what_padded_seconds_hold_changes_nothing(options, lengths):
    mask, found = prefix_mask(*lengths), []
    for fill in (0.0, 50.0):
        torch.manual_seed(3)
        objective, (visual, audio) = make_objective(**options), features()
        visual = torch.where(mask[..., None, None, None], visual, fill)
        losses = objective(visual, torch.where(mask[..., None], audio, fill), mask)
        losses["total"].backward()
        assert all(torch.isfinite(p.grad).all() for p in objective.parameters() if p.grad is not None)
        assert all(torch.isfinite(x).all() for x in objective.buffers())
        found.append({name: value.detach() for name, value in losses.items()})
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_the_degree_is_that_of_real_seconds():
    sc = SC(SCConfig(**{**SMALL_SC, "mode": "intra"}), D, 12)
    z, seen, mask = torch.randn(3, T, D), torch.randn(3, T, 12), prefix_mask(5, 2, 1)
    degree = sc.degree.forward
    with torch.no_grad():
        sc.degree.intra.weight.zero_()
        sc.degree.forward = lambda latent, m: (torch.where(mask[:, None, :, None], 0.3, 0.9).expand(
            -1, 5, -1, 2), degree(latent, m)[1])
        cf = sc(z, seen, mask)
    torch.testing.assert_close(cf.statistics["degree"], torch.tensor(0.3))
    torch.testing.assert_close(cf.degree, torch.full((3, 3), 0.3))


# --- other sounds ---------------------------------------------------------------------------------------------------


def test_sounds_outside_of_the_batch_do_not_change_what_is_usual():
    objective, (visual, audio) = make_objective(sc={"generator": "audio_replacement"}), features()
    objective(visual, audio)
    state = {name: x.clone() for name, x in objective.named_buffers()}
    objective.mit.hearing(10 * torch.randn(4, T, 7), objective.mit.kept["audio"])
    for name, x in objective.named_buffers():
        assert torch.equal(x, state[name]), name
    plain = make_objective(sc={"generator": "audio_replacement"})
    plain.load_state_dict(make_objective(sc={"generator": "audio_replacement"}).state_dict())
    plain.load_state_dict({k: v for k, v in objective.state_dict().items()})
    objective(visual, audio, replaced_sound=100 * torch.randn(4, T, 7)), plain(visual, audio)
    torch.testing.assert_close(objective.mit.usual_audio, plain.mit.usual_audio)


@pytest.mark.parametrize("standardise", [True, False])
def test_the_temperature_of_matching_acts(standardise):
    gradients = []
    for tau in (None, 1.0 if standardise else 0.07, 5.0):
        torch.manual_seed(0)
        objective = make_objective(mit={"standardise": standardise, "match_tau": tau})
        torch.manual_seed(1)
        objective(*features())["total"].backward()
        gradients.append(objective.mit.slots["audio"].grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert (gradients[2] - gradients[0]).norm() > 0.01 * gradients[0].norm()


def test_what_others_say_is_said_in_the_seconds_of_each_clip():
    x = torch.arange(3.0)[:, None, None] * 10 + torch.arange(T)[:, None]                    # clip * 10 + second
    found = others(x, prefix_mask(5, 2, 3))[..., 0]
    assert found[0].tolist() == [[20, 21, 22, 20, 21], [10, 11, 10, 11, 10]]
    assert found[1].tolist() == [[0, 1, 2, 3, 4], [20, 21, 22, 20, 21]]
    assert others(x[:1]).shape == (1, 0, T, 1)


@pytest.mark.parametrize("generator", ["pair_swap", "audio_replacement"])
def test_texts_that_say_the_same_are_no_counterfactuals(generator):
    objective = make_objective(sc={"generator": generator, "keep": 3})
    visual, audio = features()
    reading = objective.read([visual], audio)
    text = reading.text._replace(audio=reading.text.audio[:1].expand(4, -1, -1),
                                 visual=reading.text.visual[:1].expand(4, -1, -1))
    text = text._replace(z=objective.mit.composite(text.visual, text.audio))
    assert not objective.imagine(reading._replace(text=text)).valid.any()
    heard = torch.stack([text.audio[0], text.audio[0], -text.audio[0], text.audio[0]])
    odd = text._replace(audio=heard, z=objective.mit.composite(text.visual, heard))
    valid = objective.imagine(reading._replace(text=odd)).valid
    assert valid.sum(1).tolist() == ([1, 1, 1, 1] if generator == "audio_replacement" else [1, 1, 3, 1])
    losses, statistics = objective.cdcl(visual.mean((3, 4)), audio, text, objective.imagine(
        reading._replace(text=text)))
    assert statistics["vl_cf"] == 0 and torch.isfinite(losses["vl"])


# --- a sound that is not the clip's ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_sound_that_belongs_to_nothing_is_no_positive(kind, masked):
    """The contrast drives it away from the sight of its clip, which a sound of the clip is drawn to."""
    cdcl = CDCL(CDCLConfig(dim=16, kind=kind, positives="diag", entropy="none"), 12, 7, D)
    mask = prefix_mask(5, 3, 2, 4) if masked else None
    visual, text, cf = torch.randn(4, T, 12), said(), imagined()
    audio, negative = torch.randn(4, T, 7), torch.tensor([False, True, False, False])
    ordinary, _ = cdcl(visual, audio, text, cf, mask)
    none, _ = cdcl(visual, audio, text, cf, mask, negative=torch.zeros(4, dtype=torch.bool))
    torch.testing.assert_close(none, ordinary, atol=1e-5, rtol=1e-4)        # two ways to compute the same

    def after_a_step(negative):
        sound = audio.clone().requires_grad_()
        losses, _ = cdcl(visual, sound, text, cf, mask, negative=negative)
        g, = torch.autograd.grad(losses["va"], sound)
        moved = audio.clone()
        moved[1] -= 0.1 * g[1] / g[1].norm()
        return moved

    def distance(sound):
        real = slice(None) if mask is None else mask[1]
        v, a = (F.normalize(cdcl.project[n](x[1]), dim=-1)[real] for n, x in (("v", visual), ("a", sound)))
        return gaussian_wasserstein(v[None], a[None]).item() if kind == "distribution" else (
            v.mean(0) - a.mean(0)).norm().item()

    with torch.no_grad():
        before = distance(audio)
    assert distance(after_a_step(negative)) > before > distance(after_a_step(None))


def test_sight_of_a_negative_clip_prefers_its_text_to_the_sound():
    cdcl = CDCL(CDCLConfig(dim=16, pairs=("va", "vl"), positives="diag", text_negatives="batch"), 12, 7, D)
    visual, audio, text = torch.randn(2, T, 12), torch.randn(2, T, 7), said(2)
    negative = torch.tensor([True, False])
    va = cdcl(visual, audio, text, negative=negative)[0]["va"]
    far = cdcl(visual, audio.clone().index_fill_(0, torch.tensor([0]), 0) - 50 * torch.tensor([1.0, 0])[:, None, None]
               * torch.randn(2, T, 7), text, negative=negative)[0]["va"]
    assert va > 0 and far > 0 and va != far
    both = cdcl(visual, audio, text, negative=torch.ones(2, dtype=torch.bool))[0]
    assert torch.isfinite(both["va"]) and both["vl"] > 0


def test_text_of_a_negative_clip_is_that_of_its_own_sound(small, make_batch):
    from icf.model.build import build_model
    for network in ("icf", "tpavi", "avsegformer"):
        model, batch = build_model(small(model={"network": network})), make_batch((5, 3))
        own = batch.log_mel
        given = replace(batch, log_mel=torch.randn_like(own), own_log_mel=own, negative=torch.tensor([True, False]))
        heard = []
        hear = model.objective.mit.hear.forward
        model.objective.mit.hear.forward = lambda x, heard=heard, hear=hear: heard.append(x) or hear(x)
        model(batch)
        model(given).total.backward()
        torch.testing.assert_close(heard[0], heard[1])
