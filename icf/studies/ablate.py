"""The paper's ablations: train what is missing, and set what is measured beside the paper's numbers.

A folder holds an ordinary run `<row>-<seed>` for each network, so that a finished one is not trained again, an
interrupted one goes on, and runs trained elsewhere (`icf train PRESET --ablation ROW --train.seed SEED --out FOLDER`)
count as well. Beside them lie `table-2.md` and `.json`, `figure-5.md`, `.json` and `.png`.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import mean, stdev

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table

from icf.config import Config, DataConfig, denoises
from icf.data import build_dataset
from icf.engine.checkpoint import CONFIG, load_model, read_config, states
from icf.engine.evaluate import evaluate
from icf.engine.results import RESULTS, SCORES, read_results
from icf.engine.score_tables import modes_named
from icf.engine.tally import BINARY_DEFAULT, SEMANTIC_DEFAULT
from icf.engine.train import train
from icf.files import write_atomic
from icf.studies.paper import FIGURE_5, TABLE_2, Scores, Sweep
from icf.studies.statistics import draw_seeds, read_measured, statistics_table, summary

NOT_RUN = "not run"
INK = {"icf": "#26a69a", "baseline": "#808a96"}


@dataclass(frozen=True)
class Line:
    """A line of the table, or a point of the figure.

    Args:
        block, setting: its name.
        run: of its networks, which lie in `<run>-<seed>`.
        paper: scores by data set, where the paper has them.
        curve: of the figure.
        disturbance: fields of `eval` that finished networks are evaluated with; none: as they were after training.
        note: what a reader has to know.
    """

    block: str
    setting: str
    run: str
    paper: dict[str, Scores]
    curve: str = ""
    disturbance: dict[str, int] = field(default_factory=dict)
    note: str = ""

    def folder(self, out: Path, seed: int) -> Path:
        """Where its results are, for a seed."""
        return out.joinpath(f"{self.run}-{seed}", *(f"{key}-{value}" for key, value in self.disturbance.items()))


@dataclass(frozen=True)
class Study:
    """What is to be measured: `lines`, and the configuration of each of their runs that can be trained, but for seed
    and folder."""

    name: str
    lines: list[Line]
    configs: dict[str, Config]
    data: DataConfig


def ablate(study: Study, seeds: Sequence[int], out: Path, device: str, report_only: bool = False,
           jobs: int = 1) -> list[dict]:
    """Train and evaluate what is missing of a study, write its tables, and print them.

    Args:
        study: of :func:`table_2` or :func:`figure_5`.
        seeds: of the trainings. The tables hold all seeds that are found in `out`.
        out: folder of the runs and tables.
        device: that finished networks are evaluated on.
        report_only: train and evaluate nothing.
        jobs: runs that are trained at a time, each in a process of one thread with its output in `<run>-<seed>.log`.

    Returns:
        What the JSON file holds of each line.

    Raises:
        ValueError: a run in `out` has other settings, or was evaluated in another way, or some of `jobs` failed.
    """
    if jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {jobs}")
    if not report_only:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError("ablate: runs as one process; under several, train each row with icf train PRESET "
                             f"--ablation ROW --train.seed SEED --out {out}/ROW-SEED, then icf ablate --report-only")
        runs = [replace(cfg, train=replace(cfg.train, seed=seed), out=out / f"{name}-{seed}")
                for seed in seeds for name, cfg in study.configs.items()]
        for cfg in runs:
            check_same(cfg)
        if jobs > 1:
            train_beside([cfg for cfg in runs if not (cfg.out / RESULTS).is_file()], jobs)
        for number, cfg in enumerate(runs, start=1):
            if not (cfg.out / RESULTS).is_file():
                print(f"{cfg.out.name}, {number} of {len(runs)}", flush=True)
                train(cfg, resume=bool(states(cfg.out)))
                write(study, out)
            disturb(study, cfg, device)
    rows = write(study, out)
    Console().print(terminal_table(study, rows))
    return rows


# What is measured


def table_2(configure: Callable[[str], Config], wanted: Sequence[str] | None = None) -> Study:
    """The rows of Table 2, or those whose ablation is wanted.

    Args:
        configure: the configuration of an ablation by name.

    Raises:
        ValueError: there is no such ablation.
    """
    wanted, data = _known(wanted, [row.ablation for row in TABLE_2]), configure("icf").data
    notes = {}
    if data.captions is None:
        notes["text_revision"] = "needs data.captions"
    if data.replaced_audio is None:
        notes["audio_replacement"] = "sounds of other clips, for data.replaced_audio is not set"
    rows = [row for row in TABLE_2 if row.ablation in wanted]
    lines = [Line(row.block, row.setting, row.ablation, {"M3": row.m3, "AVSS": row.avss} if row.m3 else {},
                  note=notes.get(row.ablation, "")) for row in rows]
    trained = dict.fromkeys(line.run for line in lines if line.run != "text_revision" or data.captions is not None)
    return Study("table-2", lines, {run: configure(run) for run in trained}, data)


def comparison(configure: Callable[[str], Config], wanted: Sequence[str] | None = None) -> Study:
    """The components of Table 2, and the whole method with sounds that belong to nothing, to be told apart with
    statistics. Raises ValueError where there is no such row."""
    names = [row.ablation for row in TABLE_2 if row.block == "components" or row.ablation == "icf_negatives"]
    study = table_2(configure, sorted(_known(wanted, names)))
    lines = {line.run: line for line in reversed(study.lines)}  # the first of each network
    return replace(study, name="comparison", lines=[lines[line.run] for line in study.lines if line is lines[line.run]])


def figure_5(configure: Callable[[str], Config], wanted: Sequence[str] | None = None) -> Study:
    """The sweeps of Figure 5, or those wanted. A value at which the full method stands is its own run `icf`, and no
    counterfactuals at all are `mit_cdcl`.

    Raises:
        ValueError: there is no such sweep, or the other settings do not allow one of its values.
    """
    wanted, full = _known(wanted, [sweep.name for sweep in FIGURE_5]), configure("icf")
    lines, configs = [], {}
    for sweep in (sweep for sweep in FIGURE_5 if sweep.name in wanted):
        for curve, scores in sweep.curves.items():
            for value, paper in zip(sweep.values, zip(*scores, strict=True), strict=True):
                run, cfg = point(sweep, curve, value, configure, full)
                configs.setdefault(run, cfg)
                disturbance = {sweep.name: value} if value and not sweep.trained else {}
                lines.append(Line(sweep.axis, label(value), run, {"M3": paper}, curve, disturbance))
    return Study("figure-5", lines, configs, full.data)


def point(sweep: Sweep, curve: str, value, configure: Callable[[str], Config], full: Config) -> tuple[str, Config]:
    """Name and configuration of the run of a point. What a value does not leave room for in the full method, the number
    of candidates and of denoising steps, is the nearest that does."""
    if not sweep.trained:
        return curve, configure(curve)
    if value == 0:
        return "mit_cdcl", configure("mit_cdcl")
    cfg = deepcopy(full)
    sc = cfg.objective.sc
    setattr(sc, sweep.name, value)
    sc.candidates = max(sc.candidates, sc.keep)
    sc.ddim_steps = next((n for n in range(sc.ddim_steps, 0, -1) if denoises(sc.start, n, sc.steps)), sc.ddim_steps)
    cfg.check()
    return ("icf", full) if cfg == full else (f"{sweep.name}_{label(value)}", cfg)


def label(value) -> str:
    """A value of a sweep as text."""
    if value is None:
        return "none"
    return f"{value[0]:g}-{value[1]:g}" if isinstance(value, tuple) else f"{value:g}"


def _known(wanted: Sequence[str] | None, names: Sequence[str]) -> set[str]:
    if unknown := sorted({*(wanted or ())} - {*names}):
        raise ValueError(f"rows: expected some of {', '.join(dict.fromkeys(names))}, got {', '.join(unknown)}")
    return {*(wanted or names)}


# Measuring


def check_same(cfg: Config) -> None:
    """Raise ValueError where the run's folder holds a run of other settings, which would make the table a mixture."""
    if not (cfg.out / CONFIG).is_file():
        return
    if different := cfg.differences(read_config(cfg.out)):
        shown = ", ".join(f"{key} is {there} there and {here} here" for key, (there, here) in [*different.items()][:3])
        raise ValueError(f"{cfg.out} is a run of other settings: {shown}; --out names another folder")


def train_beside(runs: Sequence[Config], jobs: int) -> None:
    """Train runs, some at a time. One that fails does not stop the others; ValueError names all that did."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    failed = []

    def run(cfg: Config) -> None:
        settings, log = (cfg.out.with_name(f"{cfg.out.name}.{ending}") for ending in ("yaml", "log"))
        settings.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(settings, lambda path: path.write_text(yaml.safe_dump(cfg.to_dict(), sort_keys=False)))
        what = ["--resume", str(cfg.out)] if states(cfg.out) else [str(settings)]
        with log.open("a") as file:
            code = subprocess.run([sys.executable, "-m", "icf.cli", "train", *what], stdout=file, stderr=file,
                                  env=environment, stdin=subprocess.DEVNULL).returncode
        print(f"{cfg.out.name}: {'done' if not code else f'failed, see {log}'}", flush=True)
        failed.extend([cfg.out.name] if code else [])

    for cfg in runs:
        build_dataset(cfg.data, "train")  # written once, before all of them would
    with ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(run, runs))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # those that run were interrupted as well, and save their state
            raise
    if failed:
        raise ValueError(f"ablate: {len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; the same command "
                         "goes on with them")


def disturb(study: Study, cfg: Config, device: str) -> None:
    """Evaluate a finished run under the disturbances of the study under which it was not evaluated yet."""
    lines = [line for line in study.lines if line.disturbance and f"{line.run}-{cfg.train.seed}" == cfg.out.name]
    lines = [line for line in lines if not (line.folder(cfg.out.parent, cfg.train.seed) / RESULTS).is_file()]
    model = load_model(cfg.out, device)[0] if lines else None
    for line in lines:
        folder = line.folder(cfg.out.parent, cfg.train.seed)
        print(f"{cfg.out.name}, {folder.name}", flush=True)
        disturbed = replace(cfg, eval=replace(cfg.eval, negatives=(), **line.disturbance))
        evaluate(model, disturbed, "test", folder, device, progress=False, report=False)


def measured(line: Line, out: Path, study: Study) -> dict[int, Scores]:
    """The scores of a line in per cent, by seed. A folder counts if it holds a run of the line's whole configuration,
    the seed aside; others are told of and left out.

    Raises:
        ValueError: results of another data set or disturbance, or without defined scores.
    """
    found = {}
    for run in sorted(out.glob(f"{line.run}-*")):
        seed = run.name.removeprefix(f"{line.run}-")
        path = line.folder(out, seed) / RESULTS
        if seed.isdigit() and path.is_file() and belongs(run, int(seed), study.configs.get(line.run)):
            found[int(seed)] = _scores(path, line, study.data)
    return dict(sorted(found.items()))


@lru_cache
def told(what: str) -> None:
    """Say something once."""
    print(what, flush=True)


def belongs(run: Path, seed: int, cfg: Config | None) -> bool:
    """Whether a run has the configuration of its row and the seed of its name."""
    if cfg is None or not (run / CONFIG).is_file():
        told(f"{run} is left out of the table: " + ("the row is not part of this study" if cfg is None else
                                                    f"it holds no {CONFIG}"))
        return False
    different = replace(cfg, train=replace(cfg.train, seed=seed)).differences(read_config(run))
    if different:
        shown = ", ".join(f"{key} is {there} there and {here} here" for key, (there, here) in [*different.items()][:3])
        told(f"{run} is left out of the table, a run of other settings: {shown}")
    return not different


def _scores(path: Path, line: Line, data: DataConfig) -> Scores:
    results = read_results(path)
    settings = results.settings
    got = {"split": results.split, "subset": results.subset, "toy": settings.get("toy") is not None,
           "composed": settings.get("compose") is not None,
           "snr_db": settings.get("snr_db"), "frame_mix": settings.get("frame_mix")}
    expected = {"split": "test", "subset": data.subset, "toy": data.toy is not None,
                "composed": data.compose is not None, "snr_db": None, "frame_mix": 0,
                **line.disturbance}
    if wrong := [f"{key} {expected[key]}, got {got[key]}" for key in got if got[key] != expected[key]]:
        raise ValueError(f"{path}: expected results of {', '.join(wrong)}")
    if any(results.scores[key] is None for key in SCORES):
        raise ValueError(f"{path}: the scores are not defined, for no test clip has an object")
    return tuple(100 * results.scores[key] for key in SCORES)


# Tables


def write(study: Study, out: Path) -> list[dict]:
    """Write the tables of what has been measured so far; returns what the JSON file holds of each line."""
    scores = [measured(line, out, study) for line in study.lines]
    rows = [_row(line, found) for line, found in zip(study.lines, scores, strict=True)]
    if study.name != "figure-5":
        add_gains(rows, study, out)
    content = {"study": study.name, "data": _data_name(study.data), "rows": rows}
    write_atomic(out / f"{study.name}.json", lambda path: path.write_text(json.dumps(content, indent=1)))
    write_atomic(out / f"{study.name}.md", lambda path: path.write_text(markdown(study, rows)))
    if study.name == "figure-5":
        write_atomic(out / "figure-5.png", partial(draw, study, rows))
    if study.name == "comparison":
        write_comparison(study, out)
    return rows


def write_comparison(study: Study, out: Path) -> None:
    """`statistics.md`, `.json` (every run, and what they come to) and `.png` of a comparison."""
    runs = {line.run: {seed: read_measured(line.folder(out, seed)) for seed in measured(line, out, study)}
            for line in study.lines}
    runs = {name: found for name, found in runs.items() if found}
    base = runs.get("baseline", {})
    found = {name: summary(own, {} if name == "baseline" else base) for name, own in runs.items()}
    content = {"data": _data_name(study.data), "rows": found,
               "runs": {name: {seed: run.scores for seed, run in own.items()} for name, own in runs.items()}}
    names = {line.run: line.setting for line in study.lines}
    write_atomic(out / "statistics.json", lambda path: path.write_text(json.dumps(content, indent=1)))
    write_atomic(out / "statistics.md", lambda path: path.write_text(statistics_table(names, found, title(study))))
    if found:
        write_atomic(out / "statistics.png", partial(draw_seeds, names, runs))


def _row(line: Line, found: dict[int, Scores]) -> dict:
    spreads = {key: _spread(values) for key, values in zip(SCORES, zip(*found.values(), strict=True), strict=True)} \
        if found else {}
    return {"block": line.block, "setting": line.setting, "run": line.run, "note": line.note,
            "paper": {data: dict(zip(SCORES, scores, strict=True)) for data, scores in line.paper.items()},
            "measured": {"seeds": [*found], **spreads} if found else None}


def _spread(values: Sequence[float]) -> dict:
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "values": [*values]}


def add_gains(rows: list[dict], study: Study, out: Path) -> None:
    """Add what each row gains in J&F over the baseline, in the paper and measured: the mean over seeds of both."""
    baseline = next(row for row in TABLE_2 if row.ablation == "baseline")
    dataset = _comparable(study.data)
    reference = {"M3": baseline.m3, "AVSS": baseline.avss}[dataset][0]
    own = measured(Line(baseline.block, baseline.setting, baseline.ablation, {}), out, study)
    for row in rows:
        found = row["measured"] or {"seeds": [], "J&F": {"values": []}}
        gains = [score - own[seed][0] for seed, score in zip(found["seeds"], found["J&F"]["values"], strict=True)
                 if seed in own]
        row["gain"] = {"paper": row["paper"][dataset]["J&F"] - reference if row["paper"] else None,
                       "measured": mean(gains) if gains else None}


def _comparable(data: DataConfig) -> str:
    """The paper's data set that is nearest to the measured one."""
    return "AVSS" if data.subset == "avss" else "M3"


def _data_name(data: DataConfig) -> str:
    kind = "toy " if data.toy is not None else "composed " if data.compose is not None else ""
    return f"{kind}{data.subset}"


def markdown(study: Study, rows: list[dict]) -> str:
    """All that is known of each line."""
    datasets = ["M3"] if study.name == "figure-5" else ["M3", "AVSS"]
    gains = study.name != "figure-5"
    head = ["block", "setting", "run", *(f"paper {data}: J&F / J / F" for data in datasets),
            *(f"measured {key}" for key in SCORES),
            *([f"gain in paper, {_comparable(study.data)}", "gain measured"] if gains else []), "seeds", "note"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        found, paper = row["measured"], row["paper"]
        published = [" / ".join(f"{paper[data][key]:.2f}" for key in SCORES) if paper else "" for data in datasets]
        own = [_with_spread(found[key]) for key in SCORES] if found else [NOT_RUN, "", ""]
        gain = [_signed(row["gain"][key]) for key in ("paper", "measured")] if gains else []
        lines.append([row["block"], row["setting"], row["run"], *published, *own, *gain, _seeds(row), row["note"]])
    return f"{title(study)}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def terminal_table(study: Study, rows: list[dict]) -> Group:
    """J&F of each line, narrow enough for a terminal."""
    data, gains = _comparable(study.data), study.name != "figure-5"
    data = data if gains else "M3"
    table = Table("J&F", box=SIMPLE_HEAD)
    for column in (f"paper {data}", "measured", *(("gain, paper", "gain") if gains else ()), "seeds"):
        table.add_column(column, justify="right")
    block = None
    for row in rows:
        if row["block"] != block:
            block = row["block"]
            table.add_section()
            table.add_row(f"[bold]{block}")
        published = f"{row['paper'][data]['J&F']:.2f}" if row["paper"] else ""
        own = _with_spread(row["measured"]["J&F"]) if row["measured"] else NOT_RUN
        gain = [_signed(row["gain"][key]) for key in ("paper", "measured")] if gains else []
        name = row["setting"] if gains else f"{row['setting']}, {row['run']}"
        table.add_row(f"  {name}", published, own, *gain, _seeds(row))
    notes = [f"{row['setting']}: {row['note']}" for row in rows if row["note"]]
    return Group(title(study), table, *notes)


def _seeds(row: dict) -> str:
    return " ".join(map(str, row["measured"]["seeds"])) if row["measured"] else ""


def _with_spread(value: dict) -> str:
    return f"{value['mean']:.2f}" + ("" if value["std"] is None else f" ± {value['std']:.2f}")


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def title(study: Study) -> str:
    name = study.name.replace("-", " ").capitalize()
    modes = SEMANTIC_DEFAULT if study.data.subset == "avss" else BINARY_DEFAULT
    return (f"{name} of the paper (PVT-v2), and measured on the test split of {_data_name(study.data)}: per cent, mean "
            f"and standard deviation over seeds; measured are {modes_named(modes)}")


def draw(study: Study, rows: list[dict], path: Path) -> None:
    """The sweeps as a picture: J&F of the paper dashed, measured with its spread."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(line.block for line in study.lines))
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        of_panel = [(line, row) for line, row in zip(study.lines, rows, strict=True) if line.block == panel]
        values = list(dict.fromkeys(line.setting for line, _ in of_panel))
        for curve in dict.fromkeys(line.curve for line, _ in of_panel):
            points = [(values.index(line.setting), row) for line, row in of_panel if line.curve == curve]
            axes.plot([x for x, _ in points], [row["paper"]["M3"]["J&F"] for _, row in points], "--",
                      color=INK[curve], alpha=0.6, label=f"{curve}, paper (M3)")
            known = [(x, row["measured"]["J&F"]) for x, row in points if row["measured"]]
            axes.errorbar([x for x, _ in known], [score["mean"] for _, score in known],
                          [score["std"] or 0 for _, score in known], color=INK[curve], marker="o", capsize=3,
                          label=f"{curve}, {_data_name(study.data)}")
        axes.set_xticks(range(len(values)), values, rotation=45 if len(values) > 7 else 0)
        axes.set(xlabel=panel, ylabel="J&F")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=110)
