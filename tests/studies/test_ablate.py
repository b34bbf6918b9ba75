"""The ablations: presets that do what they are called, and tables that hold what was measured and nothing else."""
import json
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
import yaml

from icf.cli import ablations, main, numbers, preset_file, presets
from icf.config import Config, build_config, config_parser
from icf.engine.results import SCORES
from icf.objective.objective import ICFObjective
from icf.studies import ablate as module
from icf.studies.ablate import ablate, comparison, figure_5, table_2
from icf.studies.paper import FIGURE_5, TABLE_2

BASE = {
    "data": {"subset": "ms3", "size": 64, "workers": 0, "toy": {"size": "tiny", "clips": [4, 2, 4]}},
    "model": {"visual": {"name": "resnet10t", "weights": "none"}, "context": {"dim": 16},
              "audio": {"weights": "none", "width": 0.125},
              "decoder": {"dim": 16, "heads": 2, "pixel_layers": 1, "pixel_ffn": 32, "layers": 1, "ffn": 32,
                          "queries": 4}},
    "objective": {"mit": {"frame": "hash", "video": "hash", "audio": "hash", "texts": 4},
                  "sc": {"dim": 16, "blocks": 2, "candidates": 3, "keep": 2, "ddim_steps": 2, "width": 16, "layers": 1,
                         "heads": 2},
                  "cdcl": {"dim": 16}},
    "train": {"batch": 4, "epochs": 1}, "eval": {"negatives": []},
}
PARSER = config_parser(exit_on_error=False)


@cache
def laid_over(base, name) -> Config:
    """An ablation of a YAML file or text."""
    return build_config(PARSER, PARSER.parse_args(["--config", base, "--config", str(ablations()[name])]))


def configure(name, **data) -> Config:
    """An ablation of `BASE`."""
    return laid_over(yaml.safe_dump({**BASE, "data": {**BASE["data"], **data}}), name)


def write_results(out, run, seed, j, f, *folders, **settings):
    folder = out.joinpath(f"{run}-{seed}", *folders)
    folder.mkdir(parents=True)
    if run in ablations():
        cfg = configure(run)
        cfg = replace(cfg, train=replace(cfg.train, seed=seed))
        out.joinpath(f"{run}-{seed}", "config.yaml").write_text(yaml.safe_dump(cfg.to_dict()))
    scores = {"J": j, "F": f, "J&F": None if f is None else (j + f) / 2}
    (folder / "results.json").write_text(json.dumps({
        "split": "test", "subset": "ms3", **scores, "clips": [], "negatives": {},
        "settings": {"toy": {"size": "tiny"}, "snr_db": None, "frame_mix": 0, **settings}}))


# Presets


def test_every_row_of_the_paper_has_a_preset_and_every_preset_a_row():
    assert {row.ablation for row in TABLE_2} == {*ablations()}
    assert not {*ablations()} & {*presets()}


TERMS = {"baseline": None, "mit": set(), "granularity_frame": set(), "granularity_frame_video": set(), "cdcl": {"va"},
         "mit_sc": {"cf"}, "mit_cdcl": {"va", "al", "vl"}, "pairs_vl": {"cf", "vl"}, "pairs_vl_al": {"cf", "al", "vl"},
         **dict.fromkeys(("pair_swap", "audio_replacement", "text_revision", "residual", "dropout"),
                         {"va", "al", "vl"})}


@pytest.mark.parametrize("name", ablations())
def test_an_ablation_has_the_loss_terms_that_are_left(name):
    """Full method: counterfactuals, and contrast of three pairs."""
    cfg = configure(name, captions="captions.json").objective
    terms = TERMS.get(name, {"cf", "va", "al", "vl"})
    assert cfg.enabled == (terms is not None)
    if terms is None:
        return
    torch.manual_seed(0)
    visual, audio = torch.randn(4, 3, 12, 4, 4), torch.randn(4, 3, 7)
    losses = ICFObjective(12, 7, cfg)(visual, audio, captions=[["a dog", "a cat"]] * 4)
    assert {"cf", "va", "al", "vl"} & losses.keys() == terms
    assert torch.isfinite(losses["total"]) and (losses["total"] > 0) == bool(terms)


def test_ablations_differ_from_the_full_method_in_the_objective_alone():
    """But for the one that is about the sounds of the training clips."""
    configs = {name: configure(name, captions="captions.json") for name in ablations()}
    negatives = configs.pop("icf_negatives")
    assert replace(negatives, data=configs["icf"].data) == configs["icf"] and negatives.data.negatives > 0
    objectives = {name: json.dumps(cfg.to_dict()["objective"]) for name, cfg in configs.items()}
    assert len({*objectives.values()}) == len(objectives)
    assert all(replace(cfg, objective=configs["icf"].objective) == configs["icf"] for cfg in configs.values())


@pytest.mark.parametrize("preset", ["toy-ms3", "avss-pvt"])
def test_a_run_takes_its_ablation_from_the_command_line(preset, capsys):
    def objective(*args):
        with pytest.raises(SystemExit):
            main(["train", preset, *args, "--print_config"])
        return yaml.safe_load(capsys.readouterr().out)["objective"]

    changed, plain = objective("--ablation", "inter", "--objective.sc.floor", "0.1"), objective()
    assert (changed["sc"]["mode"], changed["sc"]["floor"]) == ("inter", 0.1)
    assert {**changed, "sc": {**changed["sc"], "mode": "both", "floor": plain["sc"]["floor"]}} == plain


@pytest.mark.parametrize("preset", ["toy-tpavi", "toy-avsegformer", "toy-ms3"])
def test_an_ablation_switches_on_what_it_is_about(preset):
    base = preset_file(preset)
    configs = {name: laid_over(base, name) for name in ablations() if name != "text_revision"}  # needs captions
    assert {name for name, cfg in configs.items() if not cfg.objective.enabled} == {"baseline"}
    assert len({json.dumps(cfg.to_dict()) for cfg in configs.values()}) == len(configs)


# Sweeps


@pytest.mark.parametrize("base", ["toy-ms3", "ms3-pvt"])
def test_sweeps_change_one_thing_and_share_the_full_method(base):
    configure = partial(laid_over, preset_file(base))
    study, full = figure_5(configure), configure("icf")
    assert len(study.lines) == sum(len(sweep.values) * len(sweep.curves) for sweep in FIGURE_5)
    assert {"icf", "baseline", "mit_cdcl", "alpha_0.1-0.2", "start_50", "keep_12"} <= study.configs.keys()
    assert {line.run for line in study.lines} == study.configs.keys()
    chosen = next(line for line in study.lines if line.block == "interval of alpha" and line.setting == "0.7-0.8")
    assert chosen.run == "icf" and study.configs["icf"] == full
    for run, cfg in study.configs.items():
        sc, field = cfg.objective.sc, run.partition("_")[0]
        if field in ("keep", "alpha", "start"):
            rest = {"keep": "candidates", "start": "ddim_steps"}.get(field, field)
            there = full.objective.sc
            assert replace(sc, **{name: getattr(there, name) for name in (field, rest)}) == there
    assert study.configs["keep_12"].objective.sc.keep == 12
    assert study.configs["alpha_0.1-0.2"].objective.sc.alpha == (0.1, 0.2)


# Tables


def test_table_holds_mean_and_spread_of_what_was_run(tmp_path, capsys):
    for seed, j in enumerate((0.5, 0.6, 0.7)):
        write_results(tmp_path, "icf", seed, j, j + 0.1)
    write_results(tmp_path, "baseline", 0, 0.4, 0.5)
    write_results(tmp_path, "baseline", 2, 0.5, 0.6)
    (tmp_path / "mit-0").mkdir()  # still running
    write_results(tmp_path, "mit_sc", 0, 0.3, 0.3)
    rows = ablate(table_2(configure), [0], tmp_path, "cpu", report_only=True)
    assert json.loads((tmp_path / "table-2.json").read_text())["rows"] == rows and len(rows) == len(TABLE_2)
    for row, published in zip(rows, TABLE_2, strict=True):
        assert published.m3 is None or [*row["paper"]["M3"].values()] == [*published.m3]
        assert (row["measured"] is not None) == (published.ablation in ("icf", "baseline", "mit_sc"))
    full = [row for row in rows if row["run"] == "icf"]
    assert len(full) == 5
    for row in full:
        assert row["measured"]["seeds"] == [0, 1, 2]
        assert [row["measured"][key]["mean"] for key in SCORES] == pytest.approx([65, 60, 70])
        assert row["measured"]["J"]["std"] == pytest.approx(10)
        assert row["gain"]["measured"] == pytest.approx(15)  # seeds 0 and 2, which the baseline has too
        assert row["gain"]["paper"] == pytest.approx(5.38)
    single = next(row for row in rows if row["run"] == "mit_sc")["measured"]
    assert single["J&F"]["std"] is None and single["seeds"] == [0]
    text = (tmp_path / "table-2.md").read_text()
    assert "| 69.89 / 64.38 / 75.39 | 48.16 / 45.03 / 51.28 | 65.00 ± 10.00 | 60.00 ± 10.00 |" in text
    assert text.count("not run") == sum(row["measured"] is None for row in rows)
    printed = capsys.readouterr().out
    assert "65.00 ± 10.00" in printed and "text revision: needs data.captions" in printed


@pytest.mark.parametrize("change", [{"data": {"size": 96}}, {"objective": {"enabled": False}}, {"train": {"epochs": 9}},
                                    {"model": {"visual": {"name": "resnet18"}}}, {"train": {"seed": 5}}, None])
def test_a_row_takes_runs_of_its_whole_configuration_alone(tmp_path, capsys, change):
    """A folder of the right name is not enough; nor is one that says nothing of how it was made."""
    for seed, j in enumerate((0.5, 0.9)):
        write_results(tmp_path, "icf", seed, j, j)
    file = tmp_path / "icf-1" / "config.yaml"
    if change is None:
        file.unlink()
    else:
        values = yaml.safe_load(file.read_text())
        for section, fields in change.items():
            for name, value in fields.items():
                values[section][name] = {**values[section][name], **value} if isinstance(value, dict) else value
        file.write_text(yaml.safe_dump(values))
    rows = ablate(table_2(configure), [0], tmp_path, "cpu", report_only=True)
    full = next(row for row in rows if row["run"] == "icf")
    assert full["measured"]["J"]["mean"] == pytest.approx(50)
    assert "icf-1 is left out of the table" in capsys.readouterr().out


@pytest.mark.parametrize("key, value", [("workers", 3), ("cache", False)])
def test_what_changes_no_result_keeps_no_run_out(tmp_path, key, value):
    write_results(tmp_path, "icf", 0, 0.5, 0.5)
    file = tmp_path / "icf-0" / "config.yaml"
    values = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**values, "data": {**values["data"], key: value}, "out": "elsewhere"}))
    rows = ablate(table_2(configure), [0], tmp_path, "cpu", report_only=True)
    assert next(row for row in rows if row["run"] == "icf")["measured"]


def test_figure_takes_disturbed_scores_from_their_own_folders(tmp_path):
    write_results(tmp_path, "icf", 0, 0.6, 0.7)
    write_results(tmp_path, "icf", 0, 0.5, 0.6, "snr_db-20", snr_db=20.0)
    rows = ablate(figure_5(configure, ["snr_db"]), [0], tmp_path, "cpu", report_only=True)
    found = {(row["run"], row["setting"]): row["measured"]["J&F"]["mean"] for row in rows if row["measured"]}
    assert found == pytest.approx({("icf", "20"): 55, ("icf", "none"): 65})
    assert (tmp_path / "figure-5.png").stat().st_size > 1000


@pytest.mark.parametrize("change, message", [
    ({"snr_db": 20.0}, "expected results of snr_db None, got 20.0"), ({"toy": None}, "expected results of toy True"),
    ({"f": None}, "the scores are not defined")])
def test_results_of_something_else_are_refused(tmp_path, change, message):
    write_results(tmp_path, "icf", 0, **{"j": 0.5, "f": 0.5, **change})
    with pytest.raises(ValueError, match=message):
        ablate(table_2(configure, ["icf"]), [0], tmp_path, "cpu", report_only=True)


def test_rows_without_their_data_say_so():
    study = table_2(configure, ["audio_replacement", "text_revision"])
    assert [line.note for line in study.lines] == [
        "sounds of other clips, for data.replaced_audio is not set", "needs data.captions"]
    assert [*study.configs] == ["audio_replacement"]
    given = table_2(lambda name: configure(name, captions="c.json", replaced_audio="sounds"),
                    ["audio_replacement", "text_revision"])
    assert not any(line.note for line in given.lines)
    assert [*given.configs] == ["audio_replacement", "text_revision"]


def test_rows_are_trained_once_resumed_and_disturbed(tmp_path, monkeypatch, capsys):
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({**BASE, "data": {**BASE["data"], "root": str(tmp_path / "toy")}}))
    out = tmp_path / "out"
    args = ["ablate", "--base", str(base), "--seeds", "0", "--out", str(out)]
    main([*args, "--rows", "baseline", "icf"])
    rows = {row["run"]: row for row in json.loads((out / "table-2.json").read_text())["rows"]}
    for run in ("baseline", "icf"):
        results = json.loads((out / f"{run}-0" / "results.json").read_text())
        assert rows[run]["measured"]["J&F"]["values"] == [100 * results["J&F"]]

    calls = []

    def train(cfg, resume):
        calls.append((cfg.out.name, resume))
        (cfg.out / "moved.json").rename(cfg.out / "results.json")

    monkeypatch.setattr(module, "train", train)
    main([*args, "--rows", "baseline", "icf"])
    assert not calls
    (out / "icf-0" / "results.json").rename(out / "icf-0" / "moved.json")  # as if interrupted before it was scored
    main([*args, "--rows", "baseline", "icf"])
    assert calls == [("icf-0", True)]

    main([*args, "--figure", "5", "--rows", "frame_mix"])
    figure = json.loads((out / "figure-5.json").read_text())["rows"]
    assert len(figure) == 10 and all(row["measured"]["seeds"] == [0] for row in figure) and len(calls) == 1

    with pytest.raises(SystemExit):
        main([*args, "--rows", "icf", "--train.lr", "0.5"])
    assert "is a run of other settings: train.lr is 0.0001 there and 0.5 here" in capsys.readouterr().err


def test_a_comparison_has_the_components_and_the_method_with_negatives():
    study = comparison(configure)
    assert [line.run for line in study.lines] == [
        "baseline", "mit", "cdcl", "mit_sc", "mit_cdcl", "icf", "icf_negatives"]
    assert study.configs["icf_negatives"].data.negatives > 0 == study.configs["icf"].data.negatives


def test_runs_beside_one_another_are_those_in_turn_and_a_failure_is_named(tmp_path):
    """Two rows at a time; one whose folder is a file fails, and the other is done. The same command goes on with it."""
    study = comparison(lambda name: configure(name, root=str(tmp_path / "toy")), ["baseline", "mit"])
    (tmp_path / "mit-0").write_text("in the way")
    with pytest.raises(ValueError, match="1 of 2 runs failed: mit-0"):
        ablate(study, [0], tmp_path, "cpu", jobs=2)
    assert (tmp_path / "baseline-0/results.json").is_file() and (tmp_path / "mit-0.log").is_file()
    (tmp_path / "mit-0").unlink()
    rows = ablate(study, [0], tmp_path, "cpu", jobs=2)
    assert [row["measured"]["seeds"] for row in rows] == [[0], [0]]
    assert json.loads((tmp_path / "statistics.json").read_text())["rows"].keys() == {"baseline", "mit"}
    assert (tmp_path / "statistics.md").is_file() and (tmp_path / "statistics.png").is_file()


@pytest.mark.parametrize("words, found", [(["0-2"], [0, 1, 2]), (["3", "1-2", "2"], [3, 1, 2]), (["7-7"], [7])])
def test_seeds_are_numbers_and_ranges(words, found):
    assert numbers("--seeds", words) == found


@pytest.mark.parametrize("word", ["2-1", "-1", "a", "1-", "1.5"])
def test_other_seeds_are_refused(word):
    with pytest.raises(ValueError, match="--seeds: expected numbers and ranges"):
        numbers("--seeds", [word])
