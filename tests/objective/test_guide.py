"""docs/objective.md: its host trains, on several processes and in 16 bits; what is forgotten or wrong is told."""
import gc
import os
import re
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch

import icf
from icf import CDCLConfig, ICFObjective, MITConfig, ObjectiveConfig, SCConfig
from icf.objective import checks

T = 5
GUIDE = Path(__file__).parents[2] / "docs/objective.md"


def make_objective(**options):
    mit = MITConfig(frame="hash", video="hash", audio="hash", texts=6)
    sc = SCConfig(dim=16, blocks=2, candidates=5, keep=3, ddim_steps=4, width=16, layers=1, heads=2)
    return ICFObjective(12, 7, ObjectiveConfig(mit=mit, sc=sc, cdcl=CDCLConfig(dim=16)), **options)


def features(b=4):
    return torch.randn(b, T, 12, 6, 6), torch.randn(b, T, 7)


def test_the_host_of_the_guide_trains_alike_on_two_processes_in_16_bits(tmp_path):
    code = re.search(r"^```python\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), flags=re.S | re.M)[1]
    assert len(code.splitlines()) <= 50
    host = tmp_path / "host.py"
    host.write_text("import warnings; warnings.filterwarnings('error', 'ICFObjective')\n"
                    "import torch; torch.manual_seed(0)\n" +
                    code.replace("Host()\n", "Host()\nstart = [p.detach().clone() for p in model.parameters()]\n") +
                    "moved = [not torch.equal(a, b.cpu()) for a, b in zip(start, model.parameters(), strict=True)]\n"
                    "own = dict(accelerator.unwrap_model(model).objective.named_parameters())\n"
                    "weight = sum(float(p.double().sum()) for p in own.values() if p.requires_grad)\n"
                    "print('found', accelerator.num_processes, accelerator.mixed_precision, sum(moved) > 30, weight)\n")
    told = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", host],
        env=os.environ | {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr
    found = re.findall(r"found 2 bf16 True (\S+)", told.stdout)
    assert len(found) == 2 and found[0] == found[1]


# --- parameters that are in no optimiser ----------------------------------------------------------------------------


def steps(objective, *optimizers, count=3):
    """What is warned of, and by which step."""
    host = torch.nn.Linear(12, 12)
    optimizers = [torch.optim.SGD(host.parameters(), 1e-3), *optimizers]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            visual, audio = features()
            objective(host(visual.transpose(2, 4)).transpose(2, 4), audio)["total"].backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return [str(w.message) for w in caught if "ICFObjective" in str(w.message)]


def test_parameters_in_no_optimiser_are_warned_of_once():
    objective = make_objective()
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    (told,) = steps(objective)
    count = int(re.search(r"([\d,]+) parameters", told)[1].replace(",", ""))
    assert 0.5 * trained < count <= trained and "docs/objective.md" in told                 # those that have a gradient
    assert not steps(objective)


def test_several_objectives_are_warned_of_each():
    objectives = [make_objective() for _ in range(2)]
    pair = torch.nn.Linear(1, 1)
    pair.objectives = torch.nn.ModuleList(objectives)
    visual, audio = features()
    optimizer = torch.optim.SGD([pair.weight], 0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            sum(objective(visual, audio)["total"] * pair.weight.sum() for objective in objectives).backward()
            optimizer.step()
    assert sum("ICFObjective" in str(w.message) for w in caught) == 2


def test_parameters_left_out_of_an_optimiser_are_counted():
    objective = make_objective()
    (told,) = steps(objective, torch.optim.SGD(objective.mit.parameters(), 1e-3))
    rest = sum(p.numel() for p in [*objective.levels.parameters(), *objective.sc.parameters(),
                                   *objective.cdcl.parameters()] if p.requires_grad)
    assert int(re.search(r"([\d,]+) parameters", told)[1].replace(",", "")) <= rest


def test_parameters_in_an_optimiser_of_their_own_are_not_warned_of_and_nothing_looks_any_more():
    objective = make_objective()
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], fused=True)
    assert steps(objective, optimizer) == []
    assert objective not in checks._UNSURE


def test_a_compiled_objective_is_warned_of():
    config = ObjectiveConfig(mit=MITConfig(enabled=False), sc=SCConfig(enabled=False),
                             cdcl=CDCLConfig(dim=16, pairs=("va",), positives="diag"))
    objective, trained = ICFObjective(12, 7, config), ICFObjective(12, 7, config)
    for module in (objective, trained):
        module.compile(backend="eager", fullgraph=True)
    assert len(steps(objective)) == 1 and steps(trained, torch.optim.SGD(trained.parameters(), 0.1)) == []


def test_an_objective_that_is_gone_or_not_trained_is_not_looked_at():
    objective = make_objective()
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    optimizer = torch.optim.SGD([weight], 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.step()
    assert objective in checks._UNSURE
    gone = weakref.ref(objective)
    del objective
    gc.collect()
    assert gone() is None


# --- wrong input ----------------------------------------------------------------------------------------------------


VISUAL, AUDIO = torch.randn(2, T, 12, 6, 6), torch.randn(2, T, 7)
HOLES = torch.tensor([[True] * T, [True, False, True, False, False]])


@pytest.mark.parametrize("options, error, words", [
    (dict(visual=VISUAL[:, :, :5]), ValueError, r"visual: expected 12 channels.*got 5"),
    (dict(audio=AUDIO[..., :5]), ValueError, r"audio: expected 7 channels.*got 5"),
    (dict(visual=[VISUAL, VISUAL]), ValueError, r"visual: expected 1 maps, of map_dims=\[12\], got 2"),
    (dict(visual=[]), ValueError, "visual: expected at least one map"),
    (dict(maps=[VISUAL[:, :, :5]]), ValueError, "maps: expected 12 channels.*got 5"),
    (dict(maps=[]), ValueError, "maps: expected 1 maps"),
    (dict(maps=[VISUAL[:1]]), ValueError, r"maps: expected \[B,T,C,H,W\] with B, T = \[2, 5\]"),
    (dict(sound=AUDIO[..., :5]), ValueError, "sound: expected 7 channels.*got 5"),
    (dict(sound=AUDIO[:, :3]), ValueError, r"sound: expected \[B,T,D\] with B, T = \[2, 5\]"),
    (dict(visual=VISUAL.byte()), TypeError, "visual: expected a floating tensor.*got torch.uint8"),
    (dict(audio=AUDIO.tolist()), TypeError, "audio: expected a floating tensor.*got list"),
    (dict(frame_mask=HOLES), ValueError, r"frame_mask: .*got \[1, 0, 1, 0, 0\] for clip 1"),
    (dict(frame_mask=HOLES.float()), ValueError, "frame_mask: expected bool"),
    (dict(visual_mask=torch.randn(2, T, 1, 6, 6) * 4), ValueError, "visual_mask: .*from 0 to 1.*sigmoid"),
    (dict(visual_mask=torch.rand(2, T, 6, 6)), ValueError, r"visual_mask: expected floating \[2,5,1,h,w\]"),
    (dict(visual_mask=torch.ones(2, T, 1, 6, 6, dtype=torch.bool)), ValueError, "visual_mask: .*got torch.bool"),
    (dict(negative=torch.zeros(2)), ValueError, r"negative: expected bool \[2\]")])
def test_wrong_features_and_masks_are_named(options, error, words):
    with pytest.raises(error, match=words) as caught:
        make_objective()(**{"visual": VISUAL, "audio": AUDIO, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config, words", [
    ({"mit": {"frame": "hash"}}, "config: expected icf.ObjectiveConfig, got dict"),
    (ObjectiveConfig(mit={"frame": "hash"}), "config.mit: expected icf.MITConfig, got dict"),
    (ObjectiveConfig(cdcl=SCConfig()), "config.cdcl: expected icf.CDCLConfig, got SCConfig")])
def test_a_config_of_another_class_is_named(config, words):
    with pytest.raises(TypeError, match=words):
        ICFObjective(12, 7, config)
    assert icf.ObjectiveConfig is ObjectiveConfig


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_other_bits_are_taken_as_float32(dtype):
    objective = make_objective()
    visual, audio = (x.to(dtype).requires_grad_() for x in features())
    torch.manual_seed(1)
    losses = objective(visual, audio, visual_mask=torch.rand(4, T, 1, 6, 6))
    losses["total"].backward()
    assert losses["total"].dtype == torch.float32 and visual.grad.dtype == dtype and audio.grad.isfinite().all()
    with pytest.raises(ValueError, match="expected parameters in float32, got torch.bfloat16"):
        objective.bfloat16()(visual, audio)
