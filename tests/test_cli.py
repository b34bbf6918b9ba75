"""The command line as a person meets it: what it prints, writes and refuses."""
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from icf.cli import main, presets
from icf.config import Config, DataConfig, ToyConfig, config_parser


def run(capsys, *args) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    status = 0
    try:
        main(list(args))
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("preset", presets())
def test_every_preset_is_valid_and_round_trips(preset, capsys):
    status, out, _ = run(capsys, "train", preset, "--print_config")
    assert status == 0
    cfg = Config.from_dict(yaml.safe_load(out))
    assert Config.from_dict(cfg.to_dict()) == cfg


def test_presets_of_the_paper_are_there():
    assert {"toy-s4", "toy-ms3", "toy-avss"} | {f"{s}-{b}" for s in ("s4", "ms3", "avss") for b in ("pvt", "r50")} <= {
        *presets()}


def test_options_override_files_and_files_override_presets(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("train: {lr: 0.5, batch: 3}")
    _, out, _ = run(capsys, "train", "toy-s4", "--config", str(tmp_path / "mine.yaml"), "--train.lr", "0.25",
                    "--print_config")
    train = yaml.safe_load(out)["train"]
    assert (train["lr"], train["batch"]) == (0.25, 3)


@pytest.mark.parametrize("args, message", [
    (["train", "no-such-preset"], "no preset or YAML file 'no-such-preset'; presets: "),
    (["train", "--train.lr", "fast"], 'Parser key "train.lr"'),
    (["train", "--train.typo", "1"], "unrecognized arguments: --train.typo 1"),
    (["train", "--data.size", "100"], "data.size: expected a positive multiple of 32, got 100"),
    (["train", "avss-pvt", "--model.classes", "1"], "model.classes: expected the number of classes"),
    (["train", "toy-s4", "--resume", "x"], "leave out 'toy-s4'"),
    (["train", "--ablation", "mit", "--resume", "x"], "leave out 'mit'"),
    (["train", "--ablation", "no-such-row"], "invalid choice: 'no-such-row'"),
    (["train", "ablations/mit"], "no preset or YAML file 'ablations/mit'"),
    (["train", "--resume", "no-such-run"], "no weights at no-such-run"),
    (["evaluate"], "a run folder or weights file is required"),
    (["evaluate", "no-such-run"], "no weights at no-such-run"),
    (["predict"], "a video file or a folder of frames is required"),
    (["predict", "clip.mp4", "--weights", "no-such-run"], "no weights at no-such-run"),
    (["ablate", "toy-ms3"], "--base names a preset"),
    (["ablate", "--table", "2", "--figure", "5"], "not allowed with argument"),
    (["ablate", "--rows", "mti"], "rows: expected some of baseline, mit, "),
    (["ablate", "--figure", "5", "--rows", "mit"], "rows: expected some of keep, alpha, start, snr_db, frame_mix"),
    (["fly"], "no command 'fly'; one of: train"),
    (["trian"], "no command 'trian' (did you mean 'train'?)"),
    (["train", "toy-ms"], "no preset or YAML file 'toy-ms' (did you mean 'toy-ms3'?)"),
    (["train", "--train.epohcs", "3"], "unrecognized arguments: --train.epohcs 3 (did you mean '--train.epochs'?)"),
    (["train", "--train.epoch", "3"], "unrecognized arguments: --train.epoch 3 (did you mean '--train.epochs'?)"),
    (["evaluate", "--save-mask"], "a run folder or weights file is required"),
])
def test_mistakes_end_in_one_line(args, message, capsys):
    status, out, err = run(capsys, *args)
    assert status != 0 and message in err
    assert "Traceback" not in out + err and len(err.strip().splitlines()) <= 2


def test_info_names_versions_libraries_and_every_backend(capsys):
    _, out, _ = run(capsys, "info")
    operators = "ms_deform_attn: reference: can run", "ms_deform_attn: cuda: "
    assert all(expected in out for expected in ("torch 2", "icf_kernels._C ", "timm ", *operators))


@pytest.mark.parametrize("command", ["train", "evaluate", "export", "predict", "compare", "ablate", "data", "info"])
def test_help_is_written(command, capsys):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0 and f"usage: icf {command}" in out


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "ablate", "profile"])
def test_help_is_short_and_names_what_people_change(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, command, "--help")
    assert len(out.splitlines()) <= 64 and max(map(len, out.splitlines())) <= 80
    assert "fields that people change" in out and "--help-fields [SECTION]" in out
    if command == "train":
        assert all(re.search(rf"^  {preset} ", out, re.M) for preset in presets())


def test_every_field_says_what_it_is(capsys):
    _, out, _ = run(capsys, "train", "--help-fields")
    for key in flat(Config().to_dict()):
        assert f"--{key} " in out, key
    parser = config_parser()
    assert [action.dest for action in parser._actions if not action.help] == []
    _, out, _ = run(capsys, "train", "--help-fields", "model.decoder")
    assert "--model.decoder.queries N" in out and "--train.lr" not in out
    status, _, err = run(capsys, "train", "--help-fields", "trian")
    assert status == 2 and "did you mean 'train'?" in err


def flat(values, prefix=""):
    return [key for name, value in values.items() for key in (
        flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"])]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell, capsys, tmp_path):
    _, script, _ = run(capsys, "completion", shell)
    assert all(word in script for word in ("toy-ms3", "--train.lr", "--ablation", "compose", "--weights"))
    if shell == "zsh" or shutil.which("bash") is None:
        return
    ask = 'COMP_WORDS=(icf {}); COMP_CWORD={}; _icf; echo "${{COMPREPLY[*]}}"'
    for words, place, found in (("ev", 1, "evaluate"), ("train toy-m", 2, "toy-ms3"), ("data com", 2, "compose"),
                                ("train --train.ep", 2, "--train.epochs"), ("predict --str", 2, "--strict")):
        out = subprocess.check_output(["bash", "-c", script + ask.format(words, place)], text=True)
        assert out.strip() == found


@pytest.mark.parametrize("command, option", [("toy", "--bias"), ("compose", "--pictures"), ("check", "--deep"),
                                             ("import", "--labels")])
def test_help_of_data_commands(command, option, capsys):
    status, out, _ = run(capsys, "data", command, "--help")
    assert status == 0 and option in out


def test_toy_benchmark_passes_its_own_check(tmp_path, capsys):
    clips = ["--clips", "[2,1,1]", "--subsets", "[ms3]"]
    assert run(capsys, "data", "toy", str(tmp_path), *clips)[0] == 0
    status, out, _ = run(capsys, "data", "check", str(tmp_path), "--subset", "ms3", "--json", str(tmp_path / "f.json"))
    assert status == 0 and (tmp_path / "f.json").is_file(), out


def test_importing_icf_is_light():
    code = "import sys, icf; print({'torch', 'timm', 'transformers', 'diffusers', 'matplotlib', 'av'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_configuration_survives_plain_values():
    cfg = Config(data=DataConfig(toy=ToyConfig(bias=0.5, visible=(1, 4))))
    assert Config.from_dict(cfg.to_dict()) == cfg
    with pytest.raises(ValueError, match="sizes"):
        Config.from_dict({"data": {"sizes": 3}})


@pytest.mark.parametrize("options, yaml_text", [
    (["--out=~/x", "--data.root=~/d"], ""), ([], "out: ~/x\ndata: {root: ~/d}")])
def test_the_users_home_is_found_wherever_a_path_is_written(options, yaml_text, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "own.yaml").write_text(yaml_text)
    seen = []
    monkeypatch.setattr("icf.engine.train.train", lambda cfg, resume: seen.append(cfg))
    main(["train", "toy-ms3", *(["--config", str(tmp_path / "own.yaml")] if yaml_text else options)])
    assert seen[0].out == tmp_path / "x" and seen[0].data.root == tmp_path / "d"


@pytest.mark.parametrize("args", [
    ["evaluate", "~/run"], ["train", "--resume=~/run"], ["predict", "c.mp4", "--weights=~/run"],
    ["export", "~/run", "m.safetensors"], ["compare", "~/run"], ["data", "check", "~/run", "--subset=s4"]])
def test_commands_look_for_the_users_home(args, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *args)
    assert status == 2 and str(tmp_path / "run") in out + err and "~" not in out + err


@pytest.mark.parametrize("args", [["version"], ["--version"]])
def test_the_version_is_told(args, capsys):
    assert run(capsys, *args) == (0, "icf 0.1.0\n", "")


@pytest.mark.parametrize("args", [["help"], ["help", "train"], ["help", "data"]])
def test_help_is_a_command_too(args, capsys):
    status, out, _ = run(capsys, *args)
    assert status == 0 and f"icf {args[1] if args[1:] else 'COMMAND'}" in out


def test_the_module_is_the_command():
    said = subprocess.run([sys.executable, "-m", "icf", "--version"], capture_output=True, text=True, check=True)
    assert said.stdout == "icf 0.1.0\n"
