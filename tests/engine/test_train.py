"""Training: what a run leaves behind, and that stopping it in any way and going on changes nothing."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import psutil
import pytest
import torch
import yaml
from accelerate import Accelerator, tracking
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.utils import counters
from torch.utils.tensorboard import SummaryWriter

from icf.cli import main
from icf.config import Config
from icf.engine.checkpoint import (
    find_weights,
    load_model,
    load_weights,
    read_config,
    save_state,
    save_weights,
    states,
    step_of,
    write_atomic,
)
from icf.engine.evaluate import evaluate
from icf.engine.predict import predict
from icf.engine.train import EpochSampler, length, lr_factor, machine_errors, parameter_groups, train, train_step
from icf_kernels._common.backend import PROBLEM
from icf_kernels._common.testing import Calls

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


def wait_for_step(process, cfg, step):
    while process.poll() is None and not (states(cfg.out) and step_of(states(cfg.out)[0]) >= step):
        time.sleep(0.01)


@contextmanager
def files_of(size: int):
    """No file may be larger, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def weights(run):
    return load_file(run / "last.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, toy_root):
    """An uninterrupted run."""
    cfg = config(tmp_path_factory.mktemp("runs") / "finished", toy_root)
    process = launch(cfg)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    cfg.out.with_suffix(".log").write_text(output)
    return cfg


def test_a_run_leaves_config_metrics_weights_scores_and_report(finished):
    run = finished.out
    assert read_config(run) == read_config(run / "best.safetensors") == finished
    history = json.loads((run / "metrics.json").read_text())
    assert [row["step"] for row in history["steps"]] == list(range(1, 9))  # 16 clips, 4 a step, 2 epochs
    assert len(history["evaluations"]) == 2
    assert {"J", "F", "J&F", "J other sound", "J heard"} <= history["evaluations"][0].keys()
    assert run.with_suffix(".log").read_text().count("goes by the picture alone") == (
        history["evaluations"][-1]["J heard"] < 0.05), "told once, at the end"
    assert (run / "results.json").is_file() and (run / "report.html").is_file() and any((run / "tensorboard").iterdir())
    assert not list(run.rglob("*.partial"))


def test_tensorboard_has_losses_speed_scores_settings_and_pictures(finished):
    folder = finished.out / "tensorboard"
    events = EventAccumulator(str(folder)).Reload()
    assert {"loss", "lr", "val/J&F", "clips/s"} <= {*events.Tags()["scalars"]}
    assert [event.step for event in events.Scalars("clips/s")] == list(range(1, 9))
    assert all(event.value > 0 for event in events.Scalars("clips/s"))
    assert [event.step for event in events.Images("val/clips")] == [4, 8]  # after each epoch
    assert min(events.Images("val/clips")[0].width, events.Images("val/clips")[0].height) > 300
    (settings,) = folder.glob("*/hparams.yml")
    settings = yaml.safe_load(settings.read_text())
    assert settings["train.lr"] == 1e-3 and settings["model.visual.name"] == "resnet10t"


@pytest.mark.parametrize("name, wrong", [("wandbb", "is none that Accelerate knows"), ("aim", "is not installed")])
def test_trackers_that_cannot_run_are_refused_before_anything_is_written(name, wrong, toy_root, tmp_path, monkeypatch):
    monkeypatch.setattr("icf.engine.trackers.get_available_trackers", lambda: ["tensorboard"])
    cfg = config(tmp_path / "run", toy_root, trackers=["tensorboard", name])
    with pytest.raises(ValueError, match=rf"^train.trackers: .*\(tensorboard\), got '{name}', which {wrong}$"):
        train(cfg)
    assert not cfg.out.exists()


def test_any_tracker_of_accelerate_gets_everything(toy_root, tmp_path, monkeypatch):
    got = {}

    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "trackio", False, None

        def __init__(self, run_name, **settings):
            super().__init__()
            self.run_name = run_name

        def start(self):
            got["project"] = self.run_name

        def store_init_configuration(self, values):
            got.update(values)

        def log(self, values, step, **_):
            got.update(values)

        def log_images(self, values, step):
            got.update({name: [picture.shape[-1] for picture in pictures] for name, pictures in values.items()})

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", Tracker)
    monkeypatch.setattr(tracking, "_available_trackers", ["trackio"])
    cfg = config(tmp_path / "run", toy_root, epochs=1, trackers=["trackio"])
    train(cfg)
    assert {"loss", "clips/s", "val/J&F", "train.lr"} <= got.keys()
    assert got["project"] == "icf" and got["val/clips"] == [3] and not (cfg.out / "tensorboard").exists()


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


@pytest.mark.skipif(bool(PROBLEM["_C"]), reason=f"icf_kernels._C {PROBLEM['_C']}")
def test_a_run_says_which_backends_it_takes_and_why(finished):
    said = [line for line in finished.out.with_suffix(".log").read_text().splitlines() if "fastest backend" in line]
    assert {line.split(":")[1].strip() for line in said} == {"ms_deform_attn", "gram_schmidt", "gw_contrast"}
    assert len(said) == 3 and all("cpp is the fastest backend that can run (cuda: " in line for line in said)


def test_backend_of_the_configuration_holds_for_the_run(finished, toy_root, tmp_path):
    frames = next((toy_root / "Multi-sources/ms3_data/visual_frames").iterdir())
    source = shutil.copytree(frames, tmp_path / "clip")
    shutil.copy(next((toy_root / "Multi-sources/ms3_data/audio_wav").rglob(f"{frames.name}.wav")), source)
    for backend in ("reference", "auto"):
        model, cfg = load_model(finished.out)
        cfg.backend, cfg.out = backend, tmp_path / backend
        with Calls() as calls:
            evaluate(model, cfg, "val", progress=False, report=False)
            evaluated = len(calls)
            predict(model, cfg, source, cfg.out / "predicted", progress=False)
        fast = backend == "auto" and not PROBLEM["_C"]
        assert (evaluated > 0, len(calls) > evaluated) == (fast, fast)


@pytest.mark.parametrize("backend, error", [("fast", "must be one of"), ("gw_contrst=cpp", "no operator gw_contrst")])
def test_a_backend_that_cannot_run_ends_a_run_before_it_begins(toy_root, tmp_path, backend, error):
    cfg = config(tmp_path / "out", toy_root)
    cfg.backend = backend
    with pytest.raises(ValueError, match=f"set_backend: .*{error}"):
        train(cfg)
    assert not cfg.out.exists()


def test_a_compiled_run_gives_the_same_losses_and_files(finished, toy_root, tmp_path):
    cfg = config(tmp_path / "run", toy_root, compile="eager")
    torch.compiler.reset(), counters.clear()
    train(cfg)
    assert {name: x.shape for name, x in weights(cfg.out).items()} == {
        name: x.shape for name, x in weights(finished.out).items()}
    losses = [[row["loss"] for row in json.loads((run / "metrics.json").read_text())["steps"]]
              for run in (cfg.out, finished.out)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # AdamW makes whole steps of gradients that are rounding
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


@pytest.mark.parametrize("how, after", [(signal.SIGINT, 2), (signal.SIGKILL, 2), (signal.SIGKILL, 5)])  # of 4 an epoch
def test_stopped_in_mid_epoch_and_resumed_equals_uninterrupted(finished, toy_root, tmp_path, how, after):
    cfg = config(tmp_path / "stopped", toy_root, save_every=1)
    process = launch(cfg)
    wait_for_step(process, cfg, after)
    process.send_signal(how)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and after <= step_of(states(cfg.out)[0]) < 8, output
    if how == signal.SIGINT:
        assert f"stopped and saved; icf train --resume {cfg.out} goes on" in output

    process = launch(cfg, "--resume", str(cfg.out))
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    for name, value in weights(finished.out).items():
        assert torch.equal(weights(cfg.out)[name], value), name
    first, second = (json.loads((run / "metrics.json").read_text()) for run in (finished.out, cfg.out))
    assert first == second


def test_resumed_with_clips_of_another_sound_equals_uninterrupted(toy_root, tmp_path, monkeypatch):
    monkeypatch.setattr("icf.engine.train.finish", lambda accelerator, model, cfg: {})
    heard = []
    monkeypatch.setattr("icf.engine.train.train_step", lambda accelerator, model, group, *rest: (
        heard.append(group[0].negative.tolist()), train_step(accelerator, model, group, *rest))[1])

    def run(name, iters, resume=False):
        cfg = config(tmp_path / name, toy_root, iters=iters, schedule="constant")
        cfg.data.negatives, cfg.data.workers, cfg.model.decoder.layers = 0.5, 0, 1
        train(cfg, resume)
        return weights(cfg.out)

    whole = run("whole", 3)
    run("stopped", 2)
    stopped = run("stopped", 3, resume=True)
    assert heard[:3] == heard[3:] and any(map(any, heard)) and not all(map(all, heard))
    assert whole.keys() == stopped.keys() and all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_dead_reader_and_full_disk_are_told_in_a_line_and_cost_the_step_in_flight(finished, toy_root, tmp_path):
    cfg = config(tmp_path / "failing", toy_root)
    process = launch(cfg)
    wait_for_step(process, cfg, 0)
    readers = []
    while process.poll() is None and not readers:
        time.sleep(0.01)
        readers = [child for child in psutil.Process(process.pid).children() if child.name() == "pt_data_worker"]
    readers[0].kill()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and "Traceback" not in said, said
    assert "DataLoader worker (pid" in said.splitlines()[-1]
    assert said.endswith(f"icf train --resume {cfg.out} goes on after step 0\n")  # no epoch is finished

    (cfg.out / "checkpoints" / ".step-00000007.partial").mkdir()  # as of a process that was killed
    (cfg.out / ".best.safetensors.1.partial").write_text("half")
    process = launch(cfg, "--resume", str(cfg.out), "--train.save_every", "1")
    wait_for_step(process, cfg, 2)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (10_000, 10_000))
    said = process.communicate(timeout=60)[0]
    step = step_of(states(cfg.out)[0])
    assert process.returncode == 2 and "Traceback" not in said and step < 8
    assert f"step-{step + 1:08d} could not be written" in said.splitlines()[-1]
    assert said.endswith(f"icf train --resume {cfg.out} goes on after step {step}\n")
    assert not list(cfg.out.rglob("*.partial"))

    process = launch(cfg, "--resume", str(cfg.out), "--train.save_every", "0")
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    for name, value in weights(finished.out).items():
        assert torch.equal(weights(cfg.out)[name], value), name
    assert json.loads((cfg.out / "metrics.json").read_text()) == json.loads((finished.out / "metrics.json").read_text())
    events = EventAccumulator(str(cfg.out / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in events] == list(range(1, 9))  # none twice, none missing


def test_machine_errors_name_the_way_on_and_others_pass(tmp_path):
    (tmp_path / "checkpoints" / "step-00000012").mkdir(parents=True)
    for error in (OSError(28, "No space left on device"), MemoryError(), RuntimeError("DataLoader worker (pid 1) is"),
                  RuntimeError("CUDA out of memory"), RuntimeError("could not create a primitive"),
                  RuntimeError("x: can't allocate memory")):
        said = rf"(space|memory|worker).*; icf train --resume {tmp_path} goes on after step 12$"
        with pytest.raises(OSError, match=said), machine_errors(tmp_path):
            raise error
    for error in (FileNotFoundError("data"), RuntimeError("shapes"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, machine_errors(tmp_path):
            raise error
        assert raised.value is error
    with pytest.raises(MemoryError), machine_errors(tmp_path / "nothing saved yet"):
        raise MemoryError


def test_full_disk_shows_no_traceback_of_tensorboards_thread(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    writer = SummaryWriter(tmp_path)
    with pytest.raises(OSError), machine_errors(tmp_path), files_of(100):
        for step in range(1000):
            writer.add_scalar("loss", step, step)
            writer.flush()
    assert not shown


def test_a_run_is_not_overwritten_and_nothing_resumes_from_nothing(finished, toy_root, tmp_path):
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(finished)
    with pytest.raises(FileNotFoundError, match="no training state"):
        train(config(tmp_path / "empty", toy_root), resume=True)


def test_init_from_keeps_what_fits(finished, tmp_path):
    from icf.model.icf import ICF
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
    from icf.model.icf import ICF
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


def test_full_disk_is_named_and_the_old_weights_stay(tmp_path):
    path, cfg = tmp_path / "w.safetensors", Config.from_dict(SMALL)
    save_weights(path, {"x": torch.zeros(1)}, cfg)
    with files_of(10_000), pytest.raises(OSError, match="w.safetensors could not be written, [0-9]+ MB are free"):
        save_weights(path, {"x": torch.ones(100_000)}, cfg)
    assert load_file(path)["x"].tolist() == [0] and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [1_000, 45_000])  # neither weights nor optimiser fit; the weights do
def test_full_disk_leaves_the_last_training_state(tmp_path, size):
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(100, 100)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    save_state(accelerator, tmp_path, 1)
    with files_of(size), pytest.raises(OSError, match="step-00000002 could not be written, [0-9]+ MB are free"):
        save_state(accelerator, tmp_path, 2)
    assert [state.name for state in states(tmp_path)] == ["step-00000001"] and not list(tmp_path.rglob("*.partial"))
    accelerator.load_state(str(states(tmp_path)[0]))


def test_weights_reach_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    names, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (names.append({*os.listdir(tmp_path)}), fsync(handle)))
    save_weights(tmp_path / "w.safetensors", {"x": torch.zeros(1)}, Config.from_dict(SMALL))
    assert names and all("w.safetensors" not in present for present in names)


def test_a_run_that_has_not_trained_yet_has_no_weights(tmp_path):
    first, later = (tmp_path / "checkpoints" / f"step-{step:08d}" / "model.safetensors" for step in (0, 3))
    first.parent.mkdir(parents=True)
    first.touch()
    with pytest.raises(FileNotFoundError, match="no weights at"):
        find_weights(tmp_path)
    later.parent.mkdir()
    later.touch()
    assert find_weights(tmp_path) == later


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
