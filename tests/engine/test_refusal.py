"""A command that is refused has changed nothing, and what would fail after hours is refused before the first step."""
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from PIL import Image

from icf.cli import main
from icf.engine.checkpoint import read_config, states, step_of
from icf.engine.train import train


def contents(folder):
    return {path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five clips to train with, two in each of the other splits."""
    from icf.data.toy import generate
    root = tmp_path_factory.mktemp("data")
    generate(root, "tiny", clips=(5, 2, 2), subsets=("ms3",), workers=1, progress=False)
    return root


@pytest.fixture
def configure(small, data, tmp_path):
    def configure(root=data, **changes):
        train_settings = {"batch": 2, "epochs": 1, "log_every": 1, **changes.pop("train", {})}
        data = {"root": str(root), "subset": "ms3", "size": 32, "workers": 0, **changes.pop("data", {})}
        return small(data=data,
                     train=train_settings, eval={"negatives": ["silence"]}, out=str(tmp_path / "run"),
                     objective={"enabled": False}, **changes)
    return configure


@pytest.fixture
def run(configure):
    cfg = configure()
    train(cfg)
    return cfg


@pytest.mark.parametrize("options", [["--model.decoder.dim", "64"], ["--data.root", "nowhere"],
                                     ["--model.visual.name", "resnet10t"], ["--data.subset", "s4"],
                                     ["--model.classes", "3"], ["--backend", "cuda"], ["--train.batch", "0"]])
def test_a_refused_resume_leaves_the_run_as_it_was(run, options, capsys):
    before = contents(run.out)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--resume", str(run.out), *options])
    said = capsys.readouterr().err
    assert stop.value.code and "Traceback" not in said and said.strip()
    assert contents(run.out) == before
    assert read_config(run.out) == run


@pytest.mark.parametrize("iters", [1, 2, 4, 5, 7])
def test_a_run_goes_on_to_as_many_steps_as_asked_for(configure, iters):
    """Three steps an epoch: a run that ended within one goes on within it."""
    cfg = configure(train={"iters": 1})
    train(cfg)
    train(replace(cfg, train=replace(cfg.train, iters=iters)), resume=True)
    assert step_of(states(cfg.out)[0]) == iters
    steps = [row["step"] for row in json.loads((cfg.out / "metrics.json").read_text())["steps"]]
    assert steps == list(range(1, iters + 1))


def test_going_on_step_by_step_is_the_run_in_one_go(configure, tmp_path):
    steady = {"accumulate": 2, "schedule": "constant", "warmup": 0}
    whole, parts = configure(train={"iters": 5, **steady}), configure(train={"iters": 1, **steady})
    whole.out = tmp_path / "whole"
    train(whole)
    train(parts)
    for iters in (2, 3, 5):
        train(replace(parts, train=replace(parts.train, iters=iters)), resume=True)
    losses = [[row["bce"] for row in json.loads((cfg.out / "metrics.json").read_text())["steps"]]
              for cfg in (whole, parts)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("changes, said", [
    ({"model": {"classes": 4}}, "model.classes: expected that of the train split .* got 4"),
    ({"eval": None}, "eval.negatives: .*offscreen needs at least two clips, got 1"),
])
def test_what_would_fail_after_training_is_said_before_it(configure, tmp_path, changes, said):
    from icf.data.toy import generate
    generate(tmp_path / "few", "tiny", clips=(3, 1, 1), subsets=("ms3",), workers=1, progress=False)
    if changes.pop("eval", 0) is None:
        cfg = configure(root=tmp_path / "few")
        cfg.eval = replace(cfg.eval, negatives=("silence", "offscreen"))
    else:
        cfg = configure(**changes)
    with pytest.raises(ValueError, match=said):
        train(cfg)
    assert not cfg.out.exists()


@pytest.mark.parametrize("kind, what", [("picture", "visual_frames"), ("label", "gt_masks"), ("sound", "audio_wav")])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_missing_files_of_any_split_are_counted_before_the_first_step(configure, data, tmp_path, kind, what, split):
    root = shutil.copytree(data, tmp_path / "damaged")
    ends = "*.wav" if kind == "sound" else "*.png"
    files = sorted(path for path in (root / "Multi-sources").rglob(ends) if what in str(path) and split in str(path))
    files[0].unlink()
    files[-1].unlink()
    cfg = configure(root=root)
    with pytest.raises(FileNotFoundError, match=f"2 files of the data set are missing, as .*{files[0].name}"):
        train(cfg)
    assert not cfg.out.exists()


@pytest.mark.parametrize("options", [["--data.size", "64"], ["--eval.threshold", "0.7"], ["--eval.snr_db", "20"],
                                     ["--data.root", "other"], ["--split", "val"]])
def test_other_scores_than_the_runs_own_have_a_folder_of_their_own(run, data, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, "other")
    before = contents(run.out)
    main(["evaluate", str(run.out), *options])
    after = contents(run.out)
    assert {name: after[name] for name in before} == before
    assert len([name for name in after if name.name == "results.json"]) == 2


def test_other_weights_and_masks_do_not_replace_the_scores_of_the_best(run, tmp_path):
    before = contents(run.out)
    main(["evaluate", str(run.out / "last.safetensors"), "--save-masks"])
    masks = next(run.out.glob("evaluations/*/masks"))
    main(["evaluate", str(run.out), "--masks", str(masks)])
    after = contents(run.out)
    assert {name: after[name] for name in before} == before
    assert len([name for name in after if name.name == "results.json"]) == 3
    main(["evaluate", str(run.out)])  # its own test again
    assert len([name for name in contents(run.out) if name.name == "results.json"]) == 3


@pytest.mark.parametrize("command", [["evaluate", "RUN"], ["predict", "clip.mp4", "--weights", "RUN"],
                                     ["compare", "RUN"], ["profile", "toy-ms3"]])
def test_a_device_that_is_not_here_is_refused_in_a_line(run, command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*(str(run.out) if word == "RUN" else word for word in command), "--device", "gpu"])
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in said and "device: expected one of cpu" in said and "'gpu'" in said


def test_own_clips_that_the_check_calls_wrong_are_not_trained_on(configure, tmp_path):
    """A label of 0 and 2 in a binary set, in the last clip of the last split."""
    rows = ["name,split"]
    for number, split in enumerate(("train", "train", "val", "test", "test")):
        for folder in ("frames", "labels"):
            (tmp_path / f"own/{number}" / folder).mkdir(parents=True)
        values = np.zeros((32, 32), np.uint8)
        values[8:20] = 2 if number == 4 else 255
        Image.fromarray(values).convert("RGB").save(tmp_path / f"own/{number}/frames/0.png")
        Image.fromarray(values).save(tmp_path / f"own/{number}/labels/0.png")
        soundfile.write(tmp_path / f"own/{number}/audio.wav", 0.1 * np.sin(np.arange(16000)), 16000)
        rows.append(f"{number},{split}")
    (tmp_path / "own/clips.csv").write_text("\n".join(rows) + "\n")
    cfg = configure(root=tmp_path / "own", data={"subset": "folder"})
    with pytest.raises(ValueError, match=r"data.root: 4/labels/0.png: holds 0, 2, expected 0 and 255.*; icf data check "
                                         r".*own --subset folder lists all 1 errors"):
        train(cfg)
    assert not cfg.out.exists()
