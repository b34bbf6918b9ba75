"""Training: what a run leaves behind, and that stopping it in any way and going on changes nothing."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from icf.checkpoint import load_model, load_weights, read_config, save_weights, states, write_atomic
from icf.cli import main
from icf.config import Config
from icf.train import EpochSampler, length, lr_factor, parameter_groups, train

SMALL = {
    "data": {"subset": "ms3", "size": 64, "workers": 1, "augmentation": "flip"},
    "model": {"visual": {"name": "resnet10t", "weights": "none"}, "context": {"dim": 16},
              "audio": {"weights": "none", "width": 0.125, "train": True},
              "decoder": {"dim": 16, "heads": 2, "pixel_layers": 1, "pixel_ffn": 32, "layers": 1, "ffn": 32,
                          "queries": 4}},
    "objective": {"mit": {"frame": "hash", "video": "hash", "audio": "hash", "texts": 4},
                  "sc": {"dim": 16, "blocks": 2, "candidates": 3, "keep": 2, "ddim_steps": 2, "width": 16, "layers": 1,
                         "heads": 2},
                  "cdcl": {"dim": 16}},
    "train": {"batch": 4, "epochs": 2, "lr": 1e-3, "clip": 1.0, "log_every": 1},
    "eval": {"negatives": ["silence"]},
}


def config(out, toy, **train) -> Config:
    return Config.from_dict({**SMALL, "data": {**SMALL["data"], "root": str(toy)}, "out": str(out),
                             "train": {**SMALL["train"], **train}})


def launch(cfg, *args, processes=1):
    """`icf train` as a process of its own, or as several."""
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    file = cfg.out.with_suffix(".json")  # JSON is YAML
    file.write_text(json.dumps(cfg.to_dict()))
    several = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--no-python", sys.executable]
    command = [sys.executable, *(several if processes > 1 else []), "-m", "icf.cli", "train", *(args or [str(file)])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def weights(run):
    return load_file(run / "last.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, toy_root):
    """An uninterrupted run."""
    cfg = config(tmp_path_factory.mktemp("runs") / "finished", toy_root)
    process = launch(cfg)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return cfg


def test_a_run_leaves_config_metrics_weights_scores_and_report(finished):
    run = finished.out
    assert read_config(run) == read_config(run / "best.safetensors") == finished
    history = json.loads((run / "metrics.json").read_text())
    assert [row["step"] for row in history["steps"]] == list(range(1, 9))  # 16 clips, 4 a step, 2 epochs
    assert len(history["evaluations"]) == 2 and {"J", "F", "J&F"} <= history["evaluations"][0].keys()
    assert (run / "results.json").is_file() and (run / "report.html").is_file() and any((run / "tensorboard").iterdir())
    assert not list(run.rglob("*.partial"))


def test_loaded_model_is_the_trained_one(finished):
    model, cfg = load_model(finished.out)
    assert cfg == finished and not model.training
    saved = load_file(finished.out / "best.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name]), name
    assert all(name.startswith("objective.") for name in saved.keys() - model.state_dict().keys())


def test_export_holds_nothing_of_training_and_predicts_the_same(finished, tmp_path):
    main(["export", str(finished.out), str(tmp_path / "slim.safetensors")])
    slim = load_file(tmp_path / "slim.safetensors")
    assert slim and not any(name.startswith("objective.") for name in slim)
    assert len(slim) < len(load_file(finished.out / "best.safetensors"))
    model, cfg = load_model(tmp_path / "slim.safetensors")
    assert cfg == finished
    for name, value in load_model(finished.out)[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_evaluate_command_repeats_the_scores_beside_the_weights(finished, tmp_path):
    moved = shutil.copytree(finished.out, tmp_path / "moved")
    (moved / "results.json").unlink()
    main(["evaluate", str(moved), "--save-masks"])
    main(["evaluate", str(moved), "--split", "val", "--eval.negatives", "[]"])
    scores = [json.loads((run / "results.json").read_text()) for run in (finished.out, moved, moved / "val")]
    assert scores[0]["J"] == scores[1]["J"] and scores[2]["split"] == "val"
    main(["evaluate", "--masks", str(moved / "masks"), "--config", str(moved / "config.yaml"),
          "--out", str(tmp_path / "masks")])
    assert json.loads((tmp_path / "masks" / "results.json").read_text())["J"] == pytest.approx(scores[0]["J"])


def test_predict_command_segments_a_folder_of_frames(finished, toy_root, tmp_path):
    frames = next((toy_root / "Multi-sources/ms3_data/visual_frames").iterdir())
    source = shutil.copytree(frames, tmp_path / "clip")
    shutil.copy(next((toy_root / "Multi-sources/ms3_data/audio_wav").rglob(f"{frames.name}.wav")), source)
    main(["predict", str(source), "--weights", str(finished.out), "--output", str(tmp_path / "out")])
    assert len(list((tmp_path / "out" / "masks").glob("*.png"))) == 5
    assert {"overlay.mp4", "contact_sheet.png", "predictions.json"} <= {p.name for p in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_in_mid_epoch_and_resumed_equals_uninterrupted(finished, toy_root, tmp_path, how):
    cfg = config(tmp_path / "stopped", toy_root, save_every=1)
    process = launch(cfg)
    while process.poll() is None and len(states(cfg.out)) < 2:
        time.sleep(0.01)
    process.send_signal(how)
    output = process.communicate(timeout=60)[0]
    step = int(states(cfg.out)[0].name.removeprefix("step-"))
    assert process.returncode != 0 and 2 <= step < 8, output
    if how == signal.SIGINT:
        assert f"stopped and saved; icf train --resume {cfg.out} goes on" in output

    process = launch(cfg, "--resume", str(cfg.out))
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    for name, value in weights(finished.out).items():
        assert torch.equal(weights(cfg.out)[name], value), name
    first, second = (json.loads((run / "metrics.json").read_text()) for run in (finished.out, cfg.out))
    assert first == second


def test_a_run_is_not_overwritten_and_nothing_resumes_from_nothing(finished, toy_root, tmp_path):
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(finished)
    with pytest.raises(FileNotFoundError, match="no training state"):
        train(config(tmp_path / "empty", toy_root), resume=True)


def test_init_from_keeps_what_fits(finished, tmp_path):
    from icf.model import ICF
    cfg = Config.from_dict({**finished.to_dict(), "model": {**SMALL["model"], "classes": 7}})
    model = ICF(cfg.model, cfg.loss)
    new = load_weights(model, finished.out, strict=False)
    assert new and all(name.startswith("decoder.") for name in new)
    trained = load_file(finished.out / "best.safetensors")
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items() if name not in new)
    with pytest.raises(ValueError, match="does not fit the model"):
        load_weights(model, finished.out)


def test_two_processes_train_one_model(finished, toy_root, tmp_path):
    cfg = config(tmp_path / "two", toy_root, batch=2, epochs=1)
    process = launch(cfg, processes=2)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    history = json.loads((cfg.out / "metrics.json").read_text())
    single = json.loads((finished.out / "metrics.json").read_text())
    assert [row["step"] for row in history["steps"]] == [1, 2, 3, 4]  # as many as one process with twice the batch
    scores = json.loads((cfg.out / "results.json").read_text())
    assert scores.keys() == json.loads((finished.out / "results.json").read_text()).keys()
    assert abs(history["steps"][0]["loss"] - single["steps"][0]["loss"]) < 0.5 * single["steps"][0]["loss"]


def test_order_is_a_function_of_seed_and_epoch_and_resumes_anywhere():
    sampler = EpochSampler(10, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(10)) and list(EpochSampler(10, seed=3)) == first
    sampler.start = 6
    assert list(sampler) == first[6:] and len(sampler) == 4
    sampler.epoch, sampler.start = 1, 0
    assert list(sampler) != first and list(EpochSampler(10, seed=4)) != first


@pytest.mark.parametrize("schedule, expected", [("poly", [1, 0.5 ** 0.9, 0]), ("cosine", [1, 0.5, 0]),
                                                ("constant", [1, 1, 1])])
def test_schedules(schedule, expected):
    recipe = Config.from_dict({"train": {"schedule": schedule}}).train
    assert [lr_factor(recipe, step, 100) for step in (0, 50, 100)] == pytest.approx(expected)
    recipe.warmup = 10
    assert [lr_factor(recipe, step, 110) for step in (0, 4, 60)] == pytest.approx([0.1, 0.5, expected[1]])


def test_length_of_a_run():
    recipe = Config().train
    assert length(recipe, 432, 1) == (60, 25_920)  # S4 at batch 8, as in the paper
    recipe.iters, recipe.accumulate = 1000, 2
    assert length(recipe, 432, 2) == (10, 1000)


def test_decay_spares_norms_and_embeddings_and_the_backbone_is_slower():
    from icf.model import ICF
    cfg = Config.from_dict(SMALL)
    model = ICF(cfg.model, cfg.loss)
    groups = parameter_groups(model, cfg.train)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    of = {id(p): group for group in groups for p in group["params"]}
    for module in model.modules():
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.Embedding)):
            assert all(of[id(p)]["weight_decay"] == 0 for p in module.parameters() if p.requires_grad)
    assert {of[id(p)]["lr"] for p in model.visual.parameters() if p.requires_grad} == {1e-4}
    assert {of[id(p)]["lr"] for p in model.decoder.parameters()} == {1e-3}


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, lambda part: part.write_text("old"))

    def fail(part):
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"not a safetensors file", b"\xff" * 64])
def test_broken_weights_are_named(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="w.safetensors is not a safetensors file"):
        load_model(tmp_path / "w.safetensors")


def test_foreign_weights_are_named(tmp_path):
    from safetensors.torch import save_file
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="holds no icf configuration"):
        load_model(tmp_path / "w.safetensors")
    save_weights(tmp_path / "v.safetensors", {"x": torch.zeros(1)}, Config.from_dict(SMALL))
    with pytest.raises(ValueError, match="does not fit the model"):
        load_model(tmp_path / "v.safetensors")
