"""What the generator of counterfactuals is trained by, what its settings mean, and what of it the log shows."""
import pytest
import torch
import torch.nn.functional as F

from icf import ICFObjective
from icf.config import CDCLConfig, MITConfig, ObjectiveConfig, SCConfig
from icf.objective.cdcl import CDCL
from icf.objective.mit import Text
from icf.objective.sc import SC, Counterfactuals

T, D = 5, 24
SMALL_SC = {"dim": 16, "blocks": 2, "candidates": 5, "keep": 3, "ddim_steps": 4, "width": 16, "layers": 1, "heads": 2}


def make_sc(**sc):
    return SC(SCConfig(**{**SMALL_SC, **sc}), D, 12)


def make_objective(sc=(), cdcl=(), **top):
    return ICFObjective(12, 7, ObjectiveConfig(
        mit=MITConfig(frame="hash", video="hash", audio="hash", texts=6), sc=SCConfig(**{**SMALL_SC, **dict(sc)}),
        cdcl=CDCLConfig(**{"dim": 16, **dict(cdcl)}), **top))


def features(b=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, T, 12, 6, 6, generator=g), torch.randn(b, T, 7, generator=g)


def said(b=4):
    choices, index = F.normalize(torch.randn(6, D), dim=-1), torch.randint(0, 6, (b, T))
    return Text(torch.randn(b, T, D), torch.randn(b, T, D), choices[index], index, choices, {})


def reached(objective, seed=0):
    """Gradients of the contrast alone in denoiser, decoder and degree, by name."""
    torch.manual_seed(seed)
    losses = objective(*features())
    parameters = {name: p for name, p in objective.sc.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(losses["al_cf"] + losses["vl_cf"], [*parameters.values()], allow_unused=True,
                                    retain_graph=True)
    return {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None and g.abs().max() > 0}


@pytest.mark.parametrize("weight_grad", [False, True])
@pytest.mark.parametrize(("grad", "parts"), [
    ("none", set()), ("last_step", {"diffusion", "decode"}), ("reversed", {"diffusion", "decode"}),
    ("full", {"diffusion", "decode", "degree"})])
def test_contrast_reaches_what_grad_lets_it(grad, parts, weight_grad, settle):
    objective = settle(make_objective({"grad": grad, "mode": "both"}, {"weight_grad": weight_grad}))
    parts = parts | ({"degree"} if weight_grad and grad != "none" else set())
    assert {name.split(".")[0] for name in reached(objective)} == parts


@pytest.mark.parametrize("generator", ["feature", "vqvae"])
@pytest.mark.parametrize("grad", ["none", "last_step", "full", "reversed"])
def test_grad_governs_every_generator(generator, grad, settle):
    objective = settle(make_objective({"generator": generator, "grad": grad, "blocks": 2}))
    assert bool(reached(objective)) == (grad != "none")


def test_a_reversed_gradient_is_the_negative_of_the_last_steps(settle):
    def gradients(grad):
        torch.manual_seed(1)
        return reached(settle(make_objective({"grad": grad})))

    easy, hard = gradients("last_step"), gradients("reversed")
    assert easy.keys() == hard.keys() and easy
    for name in easy:
        torch.testing.assert_close(easy[name], -hard[name])


def test_by_default_a_step_along_the_contrast_makes_no_negative_easier():
    objective = make_objective()
    assert reached(objective) == {}
    torch.manual_seed(0)
    objective(*features())["total"].backward()
    assert all(p.grad is not None for p in objective.sc.parameters() if p.requires_grad)    # it learns by its own loss


@pytest.mark.parametrize("mode", ["both", "inter", "intra"])
def test_the_degree_follows_the_interval(mode):
    """Trained generators of different intervals make counterfactuals of different degrees."""
    ends = []
    for low, high in ((0.0, 0.1), (0.2, 0.3), (0.4, 0.5), (0.6, 0.7), (0.8, 0.9)):
        torch.manual_seed(0)
        sc = make_sc(alpha=(low, high), mode=mode)
        optimizer = torch.optim.Adam(sc.parameters(), 3e-2)
        z, seen = torch.randn(8, T, D), torch.randn(8, T, 12)
        for _ in range(60):
            losses = sc(z, seen, wanted=False).losses["cf"]
            optimizer.zero_grad(), losses.backward(), optimizer.step()
        with torch.no_grad():
            ends.append(sum(float(sc(z, seen, wanted=False).statistics["degree"]) for _ in range(8)) / 8)
    assert all(b - a > 0.05 for a, b in zip(ends, ends[1:], strict=False)), ends
    share = [end / middle for end, middle in zip(ends, (0.05, 0.25, 0.45, 0.65, 0.85), strict=True)]
    assert min(share) > 0.4


@pytest.mark.parametrize("generator", ["diffusion", "feature", "vqvae"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_not_rotated_is_the_text_itself_of_every_generator(generator, symmetric):
    """Noise, quantisation and an untrained autoencoder are taken off; rotation is what rows of Table 2 share."""
    sc = make_sc(generator=generator, symmetric=symmetric, alpha=(0.0, 0.0), ortho="off")
    z, seen = torch.randn(3, T, D), torch.randn(3, T, 12)
    distance = (sc(z, seen).texts - z[:, None]).norm(dim=-1).median()       # the degree is at least 1e-4
    assert (distance < 0.1) == symmetric


def test_texts_themselves_are_noised_like_latents():
    sc, z, seen = make_sc(generator="feature", symmetric=False, alpha=(0.0, 0.0)), torch.randn(3, T, D), torch.zeros(
        3, T, 12)
    cosine = F.cosine_similarity(sc(z, seen).texts, z[:, None], dim=-1).mean()
    assert cosine == pytest.approx(float(sc.noise.schedule.alphas_cumprod[199]) ** 0.5, abs=0.06)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("generator", ["diffusion", "feature", "vqvae", "dropout"])
def test_the_other_part_is_rotated_for_each(generator, pooled):
    """What sight is contrasted with depends on the audio text, and what sound is contrasted with on the visual text."""
    objective = make_objective({"part": "other", "generator": generator, "blocks": 4})
    object.__setattr__(objective.mit.config, "z_mode", "pooled" if pooled else "per_frame")
    visual, audio = features()
    reading = objective.read([visual], audio)
    cf, text = objective.imagine(reading), reading.text
    assert cf.texts.shape == cf.of_sound.texts.shape == (4, 3, 1 if pooled else T, 512)
    for texts, gone in ((cf.texts, {"audio": 0 * text.audio}), (cf.of_sound.texts, {"visual": 0 * text.visual})):
        silent = text._replace(**gone)
        silent = silent._replace(z=objective.mit.composite(silent.visual, silent.audio))
        if pooled:
            silent = silent._replace(z=silent.z.mean(1, keepdim=True))
        found = objective.imagine(reading._replace(text=silent))
        kept = found.texts if "audio" in gone else found.of_sound.texts     # without that part there is nothing to turn
        assert (kept - silent.z[:, None]).abs().max() < 1e-5 < (texts - text.z[:, None]).abs().max()
    losses = objective(visual, audio)
    losses["total"].backward()
    assert torch.isfinite(losses["total"])


def test_parts_add_up_to_the_text():
    objective = make_objective()
    text = objective.read([features()[0]], features()[1]).text
    torch.testing.assert_close(sum(objective.mit.parts(text.visual, text.audio)) + objective.mit.compose.bias, text.z)


def test_the_log_tells_the_terms_of_the_contrast_apart():
    losses = make_objective()(*features())
    for pair in ("al", "vl"):
        torch.testing.assert_close(losses[pair], losses[f"{pair}_cf"] + losses[f"{pair}_batch"])
    assert {"degree", "degree_kept", "cosine", "closer_a", "closer_v", "left_out"} <= losses.keys()
    assert "vl_cf" not in make_objective({"enabled": False}, {"text_negatives": "batch"})(*features())
    assert "vl_batch" not in make_objective(cdcl={"text_negatives": "cf"})(*features())


@pytest.mark.parametrize("kind", ["distribution", "prototype", "feature"])
def test_closer_is_the_share_of_clips_that_their_text_is_nearest_to(kind):
    cdcl, text = CDCL(CDCLConfig(dim=16, kind=kind), 12, 7, D), said()
    far, near = -text.z[:, None].expand(-1, 3, -1, -1), text.z[:, None].expand(-1, 3, -1, -1)
    with torch.no_grad():                                                   # sight that says what the text says
        cdcl.project["l"].bias.zero_()
        own = cdcl.project["l"](text.z)
    cdcl.project["v"] = torch.nn.Identity()
    for texts, share in ((far, 1.0), (near, 0.0), (torch.cat([far[:3], near[3:]]), 0.75)):
        cf = Counterfactuals(texts, torch.full((4, 3), 0.5), torch.full((4, 3), 0.5), {}, {})
        assert cdcl(own, torch.randn(4, T, 7), text, cf)[1]["closer_v"] == share
