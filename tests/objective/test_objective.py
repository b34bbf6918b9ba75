"""The training objective: implicit text, counterfactuals, contrast, and the plug-in that holds them."""
import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from icf import ICFObjective
from icf.config import CDCLConfig, MITConfig, ObjectiveConfig, SCConfig
from icf.context import LevelFeatures, segments
from icf.objective.cdcl import CDCL, pool
from icf.objective.diffusion import Diffusion
from icf.objective.mit import MIT, Text
from icf.objective.objective import build_towers
from icf.objective.sc import SC, Counterfactuals, Degree, rotate

HASH = {"frame": "hash", "video": "hash", "audio": "hash"}
SMALL_SC = {"dim": 16, "blocks": 2, "candidates": 5, "keep": 3, "ddim_steps": 4, "width": 16, "layers": 1, "heads": 2}
T = 5


def settings(mit=(), sc=(), cdcl=(), **top) -> ObjectiveConfig:
    return ObjectiveConfig(mit=MITConfig(**{**HASH, "texts": 6, **dict(mit)}), sc=SCConfig(**{**SMALL_SC, **dict(sc)}),
                           cdcl=CDCLConfig(**{"dim": 16, **dict(cdcl)}), **top)


def features(b=4, steps=T, seed=0):
    """Features of a host: visual [B,T,12,6,6], audio [B,T,7]."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, steps, 12, 6, 6, generator=g), torch.randn(b, steps, 7, generator=g)


def prefix_mask(*lengths, steps=T):
    return torch.arange(steps) < torch.tensor(lengths)[:, None]


# --- levels and implicit text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "parts", "expected"), [
    (5, 2, [[0, 1, 2], [2, 3, 4]]), (10, 4, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [7, 8, 9]]),
    (5, 4, [[0, 1], [2, 3], [3, 4]]), (1, 2, [[0]]), (0, 2, [])])
def test_segments_of_the_paper(length, parts, expected):
    assert segments(length, parts) == expected


def test_segments_may_overlap():
    assert segments(5, 2, stride=1) == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]


@pytest.mark.parametrize("attended", [(), ("segment",), ("video", "segment", "frame")])
def test_padded_frames_change_no_level(attended, settle):
    levels = settle(LevelFeatures([8], 6, ("video", "segment", "frame"), attended, 4, parts=4))
    maps, mask = torch.randn(2, T, 8, 3, 3), prefix_mask(5, 3)
    out, member = levels([maps], mask)
    disturbed, _ = levels([torch.where(mask[..., None, None, None], maps, 1e3)], mask)
    alone, _ = levels([maps[1:, :3]])
    assert {name: x.shape[1] for name, x in out.items()} == {"video": 1, "segment": 4, "frame": 5}
    for name, x in out.items():
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(x.shape[:2]))
        real = alone[name].shape[1]
        torch.testing.assert_close(x[1, :real], alone[name][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(x[1, :real], disturbed[name][1, :real], atol=1e-5, rtol=1e-4)
    assert member.shape == (2, T, 10) and member[0, :, 0].all() and torch.equal(member[0, :, 5:], torch.eye(5).bool())
    assert not member[1, 3:, 1:].any()                                      # nothing but the clip speaks of padding


def make_mit(**mit):
    config = MITConfig(**{**HASH, "texts": 6, **mit})
    return MIT(config, 7, build_towers(config)), LevelFeatures([12], 512, config.levels, (), parts=config.parts)


@pytest.mark.parametrize("match", ["st_top1", "hard", "mean"])
@pytest.mark.parametrize("fuse", ["query", "level_scalar"])
def test_text_of_each_second(match, fuse):
    mit, levels = make_mit(match=match, fuse=fuse)
    visual, audio = features()
    text = mit(*levels([visual]), audio)
    assert text.z.shape == text.visual.shape == text.audio.shape == (4, T, 512) and text.index.shape == (4, T)
    if match != "mean":
        torch.testing.assert_close(text.audio, text.choices[text.index])


def test_best_match_is_the_nearest_text_and_every_pseudo_word_can_learn():
    mit, levels = make_mit(standardise=False)
    visual, audio = features()
    text = mit(*levels([visual]), audio)
    heard = F.normalize(mit.hear(audio), dim=-1)
    assert torch.equal(text.index, (heard @ mit.texts()["audio"].T).argmax(-1))
    text.z.square().sum().backward()
    for level, slots in mit.slots.items():
        assert (slots.grad.flatten(1).abs().amax(1) > 0).all(), level
    assert all(p.grad is None for p in mit.towers.parameters())


def test_what_all_sounds_share_does_not_decide_the_match():
    """Sounds with much in common: as printed they all match one text, without that they spread."""
    torch.manual_seed(1)
    audio = torch.full((16, 1, 7), 3.0) + torch.randn(16, T, 7)
    chosen = {}
    for standardise in (False, True):
        mit, levels = make_mit(standardise=standardise, texts=15)
        chosen[standardise] = len(mit(*levels([features(16)[0]]), audio).index.unique())
    assert chosen[True] > chosen[False]


def test_running_means_leave_padding_out():
    visual, audio = features(2)
    mask = prefix_mask(5, 3)
    (mit, levels), disturbed = make_mit(), torch.where(mask[..., None], audio, 1e3)
    mit(*levels([visual], mask), disturbed, mask)
    similarity = (F.normalize(mit.hear(audio), dim=-1) @ mit.kept["audio"].T)[mask]
    torch.testing.assert_close(mit.usual_audio, torch.stack([similarity.mean(0), similarity.square().mean(0)]))


def test_fusion_weighs_what_speaks_of_a_second():
    mit, _ = make_mit(fuse="level_scalar", levels=("video", "frame"))
    texts = [torch.zeros(1, 1, 512), torch.arange(1, 3.)[None, :, None].expand(1, 2, 512)]
    member = torch.tensor([[[True, True, False], [True, False, True]]])
    torch.testing.assert_close(mit._fuse(texts, member)[0, :, 0], torch.tensor([0.5, 1.0]))    # means of 0, 1 and 0, 2


@pytest.mark.parametrize("over", ["second", "clip"])
@pytest.mark.parametrize("fuse", ["query", "level_scalar"])
def test_weights_of_texts_sum_to_one_over_a_second_or_the_clip(over, fuse):
    """Over the texts that speak of a second, that follow it; over all real ones of the clip, alike for each second."""
    mit, _ = make_mit(fuse=fuse, softmax=over, levels=("video", "frame"))
    matches = [torch.randn(1, 1, 512), torch.randn(1, 3, 512)]
    member = torch.tensor([[[True, True, False, False], [True, False, True, False], [False] * 4]])  # then padding
    with torch.no_grad():
        fused = mit._fuse(matches, member)[0]
        texts = torch.cat(matches, 1)[0]
        scores = mit.norm(texts) @ mit.weight / 512 ** 0.5 if fuse == "query" else mit.weight[[0, 1, 1, 1]]
    spoken = [[0, 1], [0, 2]] if over == "second" else [[0, 1, 2]] * 2
    expected = torch.stack([scores[s].softmax(0) @ texts[s] for s in spoken])
    torch.testing.assert_close(fused[:2], expected)
    assert torch.equal(fused[0], fused[1]) == (over == "clip")


def test_at_test_time_the_learned_texts_are_kept_and_no_tower_runs(monkeypatch):
    mit, levels = make_mit()
    visual, audio = features()
    given = *levels([visual]), audio
    trained = mit(*given)
    monkeypatch.setattr(type(mit.towers["audio"]), "forward", lambda *_: pytest.fail("a tower ran"))
    torch.testing.assert_close(mit.eval()(*given).z, trained.z)
    assert not any("towers" in name for name in mit.state_dict())
    other, _ = make_mit()
    other.load_state_dict(mit.state_dict())


def test_a_tower_is_shared_and_runs_once_per_template(monkeypatch):
    mit, levels = make_mit()
    assert len({id(tower) for tower in mit.towers.values()}) == 1
    calls, tower = [], mit.towers["audio"]
    run = tower.forward
    monkeypatch.setattr(tower, "forward", lambda slots, template: calls.append(template) or run(slots, template))
    mit(*levels([features()[0]]), features()[1])
    assert sorted(calls) == ["a frame of *", "a segment of *", "a video of *", "an audio of *"]


def test_optional_losses_of_texts():
    mit, levels = make_mit(inversion_weight=1.0, diversity_weight=1.0)
    losses = mit(*levels([features()[0]]), features()[1]).losses
    assert set(losses) == {"inversion", "diversity"} and -1 <= losses["inversion"] <= 1 and losses["diversity"] >= 0


# --- diffusion and counterfactuals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "steps"), [(50, 10), (150, 10), (200, 10), (300, 10), (200, 4)])
@pytest.mark.parametrize("beta", ["scaled_linear", "linear"])
def test_the_true_noise_leads_back_to_the_text(start, steps, beta, monkeypatch):
    diffusion = Diffusion(8, None, start, steps, beta=beta, width=8, layers=1, heads=1)
    x, noise = torch.randn(3, 2, T, 8), torch.randn(3, 2, T, 8)
    monkeypatch.setattr(diffusion, "predict", lambda *_: noise)
    back = diffusion.denoise(diffusion.add_noise(x, noise, start - 1), None, None, "none")
    torch.testing.assert_close(back, x, atol=2e-6, rtol=0)


def test_denoiser_ignores_padding_and_candidates_do_not_mix(settle):
    diffusion = settle(Diffusion(8, 6, 200, 4, width=16, layers=2, heads=2))
    x, seen, mask = torch.randn(2, 3, T, 8), torch.randn(2, T, 6), prefix_mask(5, 3)
    t = torch.tensor([10, 150])
    out = diffusion.predict(x, t, seen, mask)
    torch.testing.assert_close(diffusion.predict(x[1:, 1:2, :3], t[1:], seen[1:, :3], None), out[1:, 1:2, :3],
                               atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("grad", "calls"), [("none", 0), ("last_step", 1), ("full", 4)])
def test_gradient_passes_the_steps_asked_for(grad, calls, settle):
    diffusion, seen = settle(Diffusion(8, None, 200, 4, width=8, layers=1, heads=1)), []
    diffusion.denoiser.register_forward_hook(lambda m, a, out: seen.append(out.requires_grad))
    diffusion.denoise(torch.randn(1, 1, T, 8), None, None, grad)
    assert len(seen) == 4 and sum(seen) == calls


@pytest.mark.parametrize("mode", ["both", "inter", "intra"])
def test_degree_lies_in_its_interval_and_varies_where_it_should(mode):
    degree = Degree(16, SCConfig(**{**SMALL_SC, "mode": mode, "alpha": (0.7, 0.8)}))
    rho, alpha = degree(torch.randn(4, T, 16))
    assert rho.shape == (4, 5, T, 2) and (alpha > 0.7).all() and (alpha < 0.8).all()
    assert (rho > 0).all() and (rho < 0.8).all()
    assert (rho.std((2, 3)).max() > 1e-3) == (mode != "inter")              # within a clip
    assert rho.mean((2, 3)).std() > 1e-3                                    # between candidates


@pytest.mark.parametrize("value", [1e-4, 0.3, 0.9])
def test_rotation_keeps_norms_and_sets_the_cosine(value):
    x = torch.randn(3, T, 16)
    rotated = rotate(x, torch.full((3, 4, T, 2), value))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1)[:, None].expand(-1, 4, -1))
    cosine = F.cosine_similarity(rotated, x[:, None], dim=-1)
    torch.testing.assert_close(cosine, torch.full_like(cosine, math.sqrt(1 - value)))
    assert (rotated[:, 0] - rotated[:, 1]).norm() > 0.01


def make_sc(**sc):
    return SC(SCConfig(**{**SMALL_SC, **sc}), 24, 12)


@pytest.mark.parametrize("options", [
    {}, {"latent": "identity", "blocks": 4}, {"latent_norm": "unit"}, {"generator": "feature", "blocks": 4},
    {"generator": "vqvae"}, {"generator": "dropout"}, {"rotate": "clean"}, {"predict": "rotated"},
    {"condition": False}, {"ortho": "paper"}, {"ortho": "off"}, {"mode": "inter"}, {"grad": "full"},
    {"alpha_learnable": False}, {"beta": "linear"}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_every_way_to_counterfactuals(options, masked):
    sc = make_sc(**options)
    z, seen = torch.randn(3, T, 24, requires_grad=True), torch.randn(3, T, 12)
    cf = sc(z, seen, prefix_mask(5, 3, 1) if masked else None)
    assert cf.texts.shape == (3, 3, T, 24) and torch.isfinite(cf.texts).all()
    assert cf.degree is None or ((cf.degree > 0) & (cf.degree < 1)).all()
    total = cf.texts.square().sum() + sum(cf.losses.values())
    if total.requires_grad:
        total.backward()
    assert z.grad is None
    assert all(torch.isfinite(p.grad).all() for p in sc.parameters() if p.grad is not None)


def test_kept_candidates_are_the_closest(monkeypatch):
    sc, kept = make_sc(), []
    z = torch.randn(3, T, 24)
    keep = sc._keep
    monkeypatch.setattr(sc, "_keep", lambda texts, *rest: kept.append(texts) or keep(texts, *rest))
    cf = sc(z, torch.randn(3, T, 12))
    cosine = F.cosine_similarity(kept[0], z[:, None], dim=-1).mean(-1).sort(1, descending=True).values
    chosen = F.cosine_similarity(cf.texts, z[:, None], dim=-1).mean(-1)
    torch.testing.assert_close(chosen, cosine[:, :3])


def test_a_counterfactual_differs_by_its_rotation_alone():
    """An unrotated candidate is the text itself, whatever the untrained autoencoder and denoiser make of it."""
    z, seen = torch.randn(3, T, 24), torch.randn(3, T, 12)
    for symmetric in (True, False):
        sc = make_sc(symmetric=symmetric, alpha=(0.0, 0.0), ortho="off")
        distance = (sc(z, seen).texts - z[:, None]).norm(dim=-1).max()
        assert (distance < 0.1) == symmetric                                # the degree is at least 1e-4


def test_printed_orthogonality_is_least_without_rotation():
    """Why `ortho=paper` is not the default."""
    sc = make_sc(ortho="paper")
    latent, weight = torch.randn(2, T, 16), torch.full((2, T), 1 / T)
    values = [float(sc._degree_loss(latent, torch.full((2, 4, T, 2), rho), weight, 0)["ortho"])
              for rho in (1e-4, 0.3, 0.6, 0.9)]
    assert values == sorted(values)


def test_learning_to_denoise_lowers_the_loss_and_rotation_shows_in_the_texts():
    """After some training, counterfactuals are nearer to their text the less they were rotated."""
    torch.manual_seed(0)
    sc = make_sc(alpha=(0.0, 1.0), mode="inter", floor=1.0, ortho="off", dim=16, candidates=5, keep=5, width=32)
    z, seen = torch.randn(16, T, 24), torch.randn(16, T, 12)
    optimizer, history = torch.optim.AdamW(sc.parameters(), 3e-3), []
    for _ in range(150):
        loss = sc(z, seen, wanted=False).losses["cf"]
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        history.append(float(loss.detach()))
    assert sum(history[-10:]) < 0.6 * sum(history[:10])
    with torch.no_grad():
        cf = sc(z, seen)
    cosine = F.cosine_similarity(cf.texts, z[:, None], dim=-1).mean(-1)
    mildest, strongest = cf.degree.argmin(1, keepdim=True), cf.degree.argmax(1, keepdim=True)
    assert cosine.gather(1, mildest).mean() > cosine.gather(1, strongest).mean() + 0.2


# --- contrast -------------------------------------------------------------------------------------------------------


def said(b=4, d=24, steps=T, index=None):
    choices = F.normalize(torch.randn(6, d), dim=-1)
    index = torch.randint(0, 6, (b, steps)) if index is None else index
    return Text(torch.randn(b, steps, d), torch.randn(b, steps, d), choices[index], index, choices, {})


def imagined(b=4, d=24, steps=T, k=3):
    return Counterfactuals(torch.randn(b, k, steps, d), torch.rand(b, k), torch.rand(b, k), {}, {})


def make_cdcl(**cdcl):
    return CDCL(CDCLConfig(**{"dim": 16, **cdcl}), 12, 7, 24)


@pytest.mark.parametrize("kind", ["distribution", "prototype", "feature"])
@pytest.mark.parametrize("negatives", ["cf", "batch", "both"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_every_kind_of_contrast(kind, negatives, masked, pooled):
    cdcl, mask = make_cdcl(kind=kind, text_negatives=negatives), prefix_mask(5, 3, 1, 2) if masked else None
    visual, audio = torch.randn(4, T, 12, requires_grad=True), torch.randn(4, T, 7, requires_grad=True)
    text = said()
    text = text._replace(z=text.z[:, :1]) if pooled else text
    losses, statistics = cdcl(visual, audio, text, imagined(steps=1 if pooled else T), mask)
    assert set(losses) == {"va", "al", "vl"} and all(loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    for x in (visual, audio):
        assert torch.isfinite(x.grad).all()
        assert not masked or (x.grad[~mask] == 0).all() and (x.grad[mask].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("pairs", [("va",), ("vl",), ("vl", "al"), ("va", "al", "vl")])
def test_only_the_pairs_asked_for_have_projections(pairs):
    cdcl = make_cdcl(pairs=pairs)
    losses, _ = cdcl(torch.randn(4, T, 12), torch.randn(4, T, 7), said(), imagined())
    sum(losses.values()).backward()
    assert tuple(losses) == pairs and all(p.grad is not None for p in cdcl.parameters())


def test_clips_of_one_sound_do_not_repel():
    """Positives are the clips whose most frequent audio text is the same."""
    cdcl = make_cdcl()
    index = torch.tensor([[0, 0, 0, 1, 2], [0, 0, 1, 1, 0], [3, 3, 3, 3, 3], [1, 1, 4, 4, 4]])
    positives, ignored, alone = cdcl._positives(4, said(index=index), None, torch.device("cpu"))
    expected = torch.eye(4).bool()
    expected[0, 1] = expected[1, 0] = True
    assert torch.equal(positives, expected) and ignored is None and alone == 0
    positives, _, _ = cdcl._positives(4, said(index=index), prefix_mask(5, 3, 5, 5), torch.device("cpu"))
    assert torch.equal(positives, expected)


@pytest.mark.parametrize(("mode", "loss"), [("diag", True), ("skip", False)])
def test_one_text_for_all_leaves_no_negatives(mode, loss):
    cdcl = make_cdcl(no_negatives=mode, pairs=("va",))
    losses, statistics = cdcl(torch.randn(4, T, 12), torch.randn(4, T, 7), said(index=torch.zeros(4, T).long()))
    assert bool(losses["va"] > 0) == loss and statistics["alone"] == 1


def test_similarity_pulls_positives_together_and_the_printed_sign_drives_them_apart():
    def train(sign):
        torch.manual_seed(0)
        cdcl = make_cdcl(sign=sign, pairs=("va",), positives="diag")
        visual, audio = torch.randn(6, T, 12), torch.randn(6, T, 7)
        optimizer = torch.optim.Adam(cdcl.parameters(), 1e-2)
        for _ in range(60):
            loss = cdcl(visual, audio)[0]["va"]
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        v, a = (F.normalize(cdcl.project[n](x), dim=-1).mean(1) for n, x in (("v", visual), ("a", audio)))
        distance = torch.cdist(v, a)
        return (distance.argmin(1) == torch.arange(6)).float().mean()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert train("similarity") > 0.9 and train("paper") < 0.2


def test_against_counterfactuals_alone_all_clips_may_become_one():
    """Why other clips' texts are negatives too: without them, what is equal for all clips solves the task."""
    cf_alone, both = make_cdcl(pairs=("vl",), text_negatives="cf"), make_cdcl(pairs=("vl",), positives="diag")
    both.load_state_dict(cf_alone.state_dict())
    text = said()
    same = text._replace(z=text.z[:1].expand(4, -1, -1))
    cf = imagined()._replace(texts=-same.z[:, None].expand(-1, 3, -1, -1))
    visual, audio = torch.randn(1, T, 12).expand(4, -1, -1), torch.randn(4, T, 7)
    with torch.no_grad():       # vision that says what the text says
        for cdcl in (cf_alone, both):
            cdcl.project["v"].weight.zero_(), cdcl.project["l"].bias.zero_()
            cdcl.project["v"].bias.copy_(cdcl.project["l"](same.z[0]).mean(0))
    losses = [float(cdcl(visual, audio, same, cf)[0]["vl"]) for cdcl in (cf_alone, both)]
    assert losses[0] < 0.05 and losses[1] > 0.9 * math.log(4)


def test_weights_of_counterfactuals_follow_their_degree():
    """A counterfactual counts more the milder it is, whether it is hard or easy to tell from the text."""
    cdcl = make_cdcl(pairs=("vl",), text_negatives="cf")
    visual, audio, text, cf = torch.randn(1, T, 12), torch.randn(1, T, 7), said(1), imagined(1)

    def loss(*degree, texts=cf.texts, cdcl=cdcl):
        return float(cdcl(visual, audio, text, cf._replace(texts=texts, degree=torch.tensor([degree])))[0]["vl"])

    alone = [loss(0.5, texts=cf.texts[:, k:k + 1]) for k in range(3)]
    easy, hard = alone.index(min(alone)), alone.index(max(alone))
    degrees = [[0.05 if k == mild else 0.95 for k in range(3)] for mild in (easy, hard)]
    assert loss(*degrees[0]) < loss(*degrees[1])
    keep = make_cdcl(pairs=("vl",), text_negatives="cf", weight_sum="keep")
    keep.load_state_dict(cdcl.state_dict())
    assert loss(0.5, 0.5, 0.5, cdcl=keep) > loss(0.5, 0.5, 0.5)


def test_vision_is_averaged_where_the_mask_says():
    maps, mask = torch.randn(2, 3, 4, 4), torch.zeros(2, 1, 8, 8, requires_grad=True)
    with torch.no_grad():
        mask[0, :, :4, 2:4] = 1
    pooled = pool(maps, mask)
    torch.testing.assert_close(pooled[0], maps[0, :, :2, 1].mean(-1))
    torch.testing.assert_close(pooled[1], maps[1].mean((1, 2)))             # less than a pixel of foreground
    assert not pool(maps.requires_grad_(), mask).sum().backward() and mask.grad is None


# --- the plug-in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_a_host_needs_two_lines(masked):
    objective = ICFObjective(12, 7, settings())
    visual, audio = (x.requires_grad_() for x in features())
    losses = objective(visual, audio, prefix_mask(5, 3, 1, 2) if masked else None, torch.rand(4, T, 1, 12, 12))
    assert {"total", "cf", "va", "al", "vl"} <= losses.keys()
    c = objective.config
    torch.testing.assert_close(losses["total"], c.cf_weight * losses["cf"] + c.cdcl_weight * (
        c.va * losses["va"] + c.al * losses["al"] + c.vl * losses["vl"]))
    losses["total"].backward()
    assert all(x.grad.abs().sum() > 0 and torch.isfinite(x.grad).all() for x in (visual, audio))


def test_gradients_reach_every_trainable_parameter(settle):
    objective = settle(ICFObjective(12, 7, settings()))
    for seed in range(4):                                                   # the best matches differ
        objective(*features(8, seed=seed))["total"].backward()
    silent = [name for name, p in objective.named_parameters() if p.requires_grad and (
        p.grad is None or not p.grad.abs().max() > 0)]
    assert silent == []


PARTS = {
    "mit_cdcl": dict(sc={"enabled": False}, cdcl={"text_negatives": "batch"}),
    "mit_sc": dict(mit={"inject": "cross_attention"}, sc={"detach_z": False}, cdcl={"enabled": False}),
    "cdcl": dict(mit={"enabled": False}, sc={"enabled": False}, cdcl={"pairs": ("va",), "positives": "diag"}),
    "frame": dict(mit={"levels": ("frame",)}), "pooled": dict(mit={"z_mode": "pooled"}),
    "threshold": dict(cdcl={"positives": "threshold"}), "band": dict(cdcl={"positives": "band"}),
    "pair_swap": dict(sc={"generator": "pair_swap"}), "residual": dict(sc={"generator": "residual"},
                                                                      cdcl={"text_negatives": "batch"}),
    "audio_replacement": dict(sc={"generator": "audio_replacement"}),
    "text_revision": dict(sc={"generator": "text_revision"}),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("b", [1, 3])
def test_every_combination_of_parts(name, b):
    objective = ICFObjective(12, 7, settings(**PARTS[name]))
    given = {"captions": [("a dog sings", "a cat plays")] * b} if name == "text_revision" else {}
    losses = objective(*features(b), **given)
    assert torch.isfinite(losses["total"]) and (b == 1 or losses["total"] > 0)
    if losses["total"].requires_grad:
        losses["total"].backward()


def test_replaced_sounds_and_captions_are_heard():
    for generator, first, second in (
            ("audio_replacement", {"replaced_sound": features(seed=1)[1]}, {"replaced_sound": -features(seed=1)[1]}),
            ("text_revision", {"captions": [["a dog"]] * 4}, {"captions": [["a violin"]] * 4})):
        objective = ICFObjective(12, 7, settings(sc={"generator": generator}))
        assert objective(*features(), **first)["vl"] != objective(*features(), **second)["vl"]
    with pytest.raises(ValueError, match="captions: expected equally many"):
        objective(*features(), captions=[["a"], ["a", "b"], ["c"], ["d"]])


@pytest.mark.parametrize(("change", "key"), [
    (dict(mit={"enabled": False}), "sc.enabled"), (dict(mit={"enabled": False}, sc={"enabled": False}), "cdcl.pairs"),
    (dict(sc={"enabled": False}, cdcl={"text_negatives": "cf"}), "cdcl.text_negatives"),
    (dict(sc={"keep": 9}), "sc.keep"),
    (dict(sc={"start": 205}), "sc.start"), (dict(sc={"start": 2000}), "sc.start"),
    (dict(sc={"blocks": 3}), "sc.blocks"),
    (dict(sc={"alpha": (0.8, 0.7)}), "sc.alpha"), (dict(mit={"levels": ()}), "mit.levels"),
    (dict(cdcl={"tau": 0.0}), "cdcl.tau"), (dict(sc={"enabled": False}, cdcl={"enabled": False}), "mit.inject")])
def test_contradictions_are_named(change, key):
    with pytest.raises(ValueError, match=f"objective.{key}"):
        ICFObjective(12, 7, settings(**change))


def test_wrong_features_are_named():
    objective, (visual, audio) = ICFObjective(12, 7, settings()), features()
    with pytest.raises(ValueError, match="audio: expected"):
        objective(visual, audio[0])
    with pytest.raises(ValueError, match="visual: expected"):
        objective(visual[:, :3], audio)
    with pytest.raises(ValueError, match="frame_mask: expected"):
        objective(visual, audio, torch.ones(4, T))


def test_towers_of_another_width_are_named():
    with pytest.raises(ValueError, match="mit.dim"):
        ICFObjective(12, 7, settings(mit={"dim": 64}))


# --- in the model ---------------------------------------------------------------------------------------------------


@pytest.fixture
def make_full(make_model):
    """The model of `make_model` with its objective."""
    return lambda objective=None, **options: make_model(objective=objective or settings(), **options)


@pytest.mark.parametrize(("classes", "lengths", "labels"), [(1, (5, 5), None), (1, (5, 5), 1), (7, (5, 3), None)])
def test_the_whole_step(make_full, make_batch, settle, classes, lengths, labels):
    model = settle(make_full(classes=classes))
    losses = model(make_batch(lengths, classes=classes, labels=labels))
    assert {"bce", "dice", "focal", "cf", "va", "al", "vl", "degree"} <= losses.terms.keys()
    segmentation = sum(losses.terms[name] for name in ("bce", "dice", "focal"))
    c, t = model.objective.config, losses.terms
    torch.testing.assert_close(losses.total, segmentation + c.cf_weight * t["cf"] + c.cdcl_weight * (
        c.va * t["va"] + c.al * t["al"] + c.vl * t["vl"]))
    losses.total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_plug_in_and_model_compute_the_same(make_full, make_batch, monkeypatch):
    """What the model adds to its loss is what the plug-in returns for the same features."""
    model, batch, given = make_full(), make_batch(), {}
    objective = model.objective
    read, contrast = objective.read, objective.contrast
    monkeypatch.setattr(objective, "read", lambda *a: given.update(read=a) or read(*a))
    monkeypatch.setattr(objective, "contrast", lambda *a: given.update(contrast=a) or contrast(*a))
    torch.manual_seed(7)
    losses = model(batch)
    (maps, sound, mask), (visual, audio, *_, where) = given["read"], given["contrast"]
    torch.manual_seed(7)
    alone = objective(visual, audio, mask, where, maps=maps, sound=sound)
    for name in ("cf", "va", "al", "vl"):
        torch.testing.assert_close(alone[name], losses.terms[name])


def test_nothing_of_the_objective_runs_at_test_time(make_full, make_batch):
    model, batch = make_full(), make_batch()
    model(batch)

    def refuse(*_):
        pytest.fail("a part of training ran")

    for module in model.objective.modules():
        module.register_forward_pre_hook(refuse)
    with torch.no_grad():
        masks = model.eval()(batch)
    slim = make_full(inference=True).eval()
    assert slim.objective is None
    slim.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("objective.")})
    with torch.no_grad():
        assert torch.equal(slim(batch), masks)
    with pytest.raises(RuntimeError, match="built for inference"):
        slim.train()(batch)


def test_injected_text_is_read_at_test_time_without_a_tower(make_full, make_batch, settle):
    chosen = settings(mit={"inject": "cross_attention"})
    model, batch = settle(make_full(chosen)), make_batch()
    model(batch).total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    slim = make_full(chosen, inference=True).eval()
    kept = {k: v for k, v in model.state_dict().items() if k in slim.state_dict()}
    slim.load_state_dict(kept)
    assert len(slim.objective.mit.towers) == 0
    with torch.no_grad():
        masks = model.eval()(batch)
        torch.testing.assert_close(slim(batch), masks)
        slim.objective.mit.texts_audio.neg_()
        assert (slim(batch) - masks).abs().max() > 0


def test_unlabelled_frames_are_contrasted_but_not_segmented(make_full, make_batch):
    model, batch = make_full().eval(), make_batch(labels=1)
    model.training = model.objective.training = True
    shapes = {}
    model.decoder.register_forward_hook(lambda m, a, out: shapes.update(out._asdict()))
    model(batch)
    assert shapes["masks"].shape[1] == 2 and len(shapes["pixels"]) == len(shapes["foreground"]) == 10
    foreground = shapes["foreground"]
    model(replace(batch, labelled=batch.real))
    torch.testing.assert_close(shapes["foreground"], foreground, atol=1e-5, rtol=1e-4)


def test_a_few_steps_lower_every_loss(make_full, make_batch):
    torch.manual_seed(0)
    model, batch = make_full(settings(cdcl={"positives": "diag"})), make_batch((5, 5, 5, 5))
    optimizer, history = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3), []
    for _ in range(30):
        losses = model(batch)
        optimizer.zero_grad(), losses.total.backward(), optimizer.step()
        history.append(losses.detached())
    for name in ("bce", "dice", "eps", "rec", "va", "vl", "al"):
        first, last = (sum(float(row[name]) for row in rows) for rows in (history[:5], history[-5:]))
        assert last < first, name


@pytest.mark.parametrize("lengths", [(5, 5), (5, 3)])
def test_a_step_does_not_wait_for_the_device(make_full, make_batch, lengths):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")
            return func(*args, **(kwargs or {}))

    model, batch = make_full(), make_batch(lengths, labels=1)
    with Refuse():
        model(batch).total.backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("lengths", [(5, 5), (5, 3)])
def test_a_step_on_a_gpu_does_not_wait_for_it(make_full, make_batch, lengths):
    model, batch = make_full().cuda(), make_batch(lengths, labels=1).to("cuda")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    try:
        for mode in ("default", "error"):                                   # the first step fills what is kept
            torch.cuda.set_sync_debug_mode(mode)
            model(batch).total.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bf16_autocast_keeps_the_contrast_in_float32(make_full, make_batch):
    model, batch = make_full(), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch)
    losses.total.backward()
    assert all(losses.terms[name].dtype == torch.float32 for name in ("va", "al", "vl", "cf"))
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
