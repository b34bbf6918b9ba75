"""What the benchmarks measured, as tables and pictures in the texts of the repository, and their run.

The input are files of pytest-benchmark (`--benchmark-json`); what the tables need beside times is in the `extra_info`
of each benchmark. A text says where it wants which table by the marks ``<!-- bench:begin NAME -->`` and
``<!-- bench:end NAME -->``, a line each; what is between them is replaced.
"""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from icf.files import write_atomic

BACKENDS = ("reference", "cpp", "triton", "cuda")       # plain PyTorch first, to which the others are compared
INK = "#808a96"                                         # readable on white and on black
MARK = re.compile(r"<!-- bench:(begin|end) (\S+) -->")


@dataclass
class Run:
    """The benchmarks that one file holds.

    Args:
        name: of the file, without suffix; that of its pictures.
        source: what was measured, where, with what, in one line.
        benchmarks: as pytest-benchmark writes them.
    """

    name: str
    source: str
    benchmarks: list[dict]


@dataclass
class Table:
    headers: Sequence[str]
    rows: list[Sequence[str]]

    def __str__(self) -> str:
        lines = [self.headers, ["---", *["---:"] * (len(self.headers) - 1)], *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def run(folder: Path, target: Path | None, options: Sequence[str] = ()) -> int:
    """Run the benchmarks of `folder` under pytest, with `options`, and save what they measure to `target`.

    Returns:
        The exit status of pytest.

    Raises:
        FileNotFoundError: `folder` holds no benchmarks; they come with a checkout, not with the installed package.
    """
    if not any(folder.glob("bench_*.py")):
        raise FileNotFoundError(f"{folder} holds no bench_*.py: run this in a checkout, or name their folder "
                                "by --benchmarks")
    target = target or folder / "results" / f"{_machine()}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", str(folder), "--benchmark-only", f"--benchmark-json={target}", *options]
    return subprocess.run(command, env={**os.environ, "PYTHONSAFEPATH": "1"}).returncode


def _machine() -> str:
    import torch
    return "gpu-" + re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()) if torch.cuda.is_available() else "cpu"


def saved(folder: Path) -> list[Path]:
    """The measurements that `folder` holds, of CPUs first."""
    return [*sorted(folder.glob("cpu*.json")), *sorted(folder.glob("gpu-*.json"))]


def report(files: Sequence[Path], texts: Sequence[Path], plots: Path) -> None:
    """Write the tables of `files` into `texts`, between their marks, and pictures into the folder `plots`.

    Raises:
        FileNotFoundError: no file to read.
        ValueError: a file is not of pytest-benchmark, or the marks of a text are unknown or do not match.
    """
    if not files:
        raise FileNotFoundError("no measurements to report: expected files of --benchmark-json in benchmarks/results, "
                                "as icf bench run writes them, or --json FILE")
    runs = [read(file) for file in files]
    for text in texts:
        sections(text.read_text(), str(text))
    pictures = [path for run in runs for path in draw(run, plots)]
    for text in texts:
        before = text.read_text()
        after = fill(before, runs, [os.path.relpath(path, text.parent) for path in pictures])
        if after != before:
            write_atomic(text, lambda path, after=after: path.write_text(after))
        print(f"{text}: {'updated' if after != before else 'as it was'}")


def read(file: Path) -> Run:
    try:
        values = json.loads(file.read_text())
        machine, commit = values["machine_info"], values["commit_info"].get("id") or "unknown"
        benchmarks = sorted(values["benchmarks"], key=lambda bench: bench["group"] or bench["name"])
        extra = next((b["extra_info"] for b in benchmarks if "device" in b["extra_info"]), {})
        device = extra.get("device", "cpu")
        device = machine.get("cpu", {}).get("brand_raw", "CPU") if device == "cpu" else device
        facts = [device, extra and f"{extra['threads']} threads, torch {extra['torch']}", values["datetime"][:10],
                 f"commit {commit[:8]}{'+' if values['commit_info'].get('dirty') else ''}", f"`{file.name}`"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: expected what pytest --benchmark-json writes, got {type(error).__name__}: {error}"
                         ) from None
    return Run(file.stem, ", ".join(filter(None, facts)), benchmarks)


def sections(text: str, name: str = "text") -> list[str]:
    """What the marks of `text`, known as `name`, ask for; ValueError where they are unknown or do not match."""
    marks = [match.groups() for match in MARK.finditer(text)]
    for (first, section), (last, same) in zip(marks[::2], [*marks[1::2], ("", "")], strict=False):
        if (first, last, same) != ("begin", "end", section):
            raise ValueError(f"{name}: expected <!-- bench:end {section} --> after its begin, got {first}, "
                             f"{last} {same}")
        if section not in (*SECTIONS, "plots"):
            raise ValueError(f"{name}: expected a mark of {', '.join((*SECTIONS, 'plots'))}, got {section!r}")
    return [section for first, section in marks if first == "begin"]


def fill(text: str, runs: Sequence[Run], pictures: Sequence[str]) -> str:
    """`text` with the tables of `runs` between its marks, and `pictures`, as it is to name them. Filling twice changes
    nothing."""
    for section in sections(text):
        text = re.sub(rf"(<!-- bench:begin {section} -->\n).*?(<!-- bench:end {section} -->)",
                      lambda match, section=section: f"{match[1]}{_section(section, runs, pictures)}\n{match[2]}",
                      text, flags=re.DOTALL)
    return text


def _section(section: str, runs: Sequence[Run], pictures: Sequence[str]) -> str:
    if section == "plots":
        parts = [f"![{Path(path).stem}]({path})" for path in pictures]
    else:
        tables = [(run, SECTIONS[section](run.benchmarks)) for run in runs]
        parts = [f"{run.source}\n\n{table}" for run, table in tables if table.rows]
    return "\n\n".join(parts) or "Not measured yet."


# Tables


def operators(benchmarks: Sequence[dict]) -> Table:
    """Every operator on every backend: milliseconds, and how many times faster than plain PyTorch the fastest is."""
    groups = _by_backend(benchmarks)
    backends = [name for name in BACKENDS if any(name in times for times in groups.values())]
    rows = [[group, *(_ms(times.get(name)) for name in backends), _times(_speedup(times))]
            for group, times in groups.items()]
    return Table(["ms", *backends, "speed-up"], rows)


def peers(benchmarks: Sequence[dict]) -> Table:
    """What else computes the same, as a multiple of our time, and how near ours is to the machine's limit."""
    limits, rows = _limits(benchmarks), []
    for bench in benchmarks:
        others = ", ".join(f"{name} {_times(ratio)}" for name, ratio in _ratios(bench).items())
        if others:
            rows.append([bench["group"], _ms(_seconds(bench)), others, _share(_roofline(bench, limits))])
    return Table(["", "ours, ms", "others, times ours", "of the roofline"], rows)


def step(benchmarks: Sequence[dict]) -> Table:
    """The training step in each version."""
    rows = []
    for bench, extra in _steps(benchmarks):
        what = f"{bench['group']}: {extra['encoder']}, B={extra['clips']}, {extra['size']}², {extra['dtype']}"
        rows += [[f"{what}, {version}", _ms(seconds), _times(extra["times_fast"].get(version, 1)),
                  f"{extra['clips_per_s'][version]:.3g}", _number(extra["peak_memory_growth_mb"][version])]
                 for version, seconds in extra["seconds"].items()]
    return Table(["training step", "ms", "times fast", "clips/s", "memory growth, MB"], rows)


def parts(benchmarks: Sequence[dict]) -> Table:
    """What each part of the training step, and each operator in it, takes in each version."""
    rows, versions = [], _versions(extra["parts"] for _, extra in _steps(benchmarks))
    for bench, extra in _steps(benchmarks):
        for kind in ("parts", "operators"):
            total = {version: sum(map(sum, spent.values())) for version, spent in extra[kind].items()}
            names = dict.fromkeys(name for spent in extra[kind].values() for name in spent)
            for name in (n for n in names if kind == "parts" or n not in ("rest", "optimiser")):
                spent = {version: sum(times.get(name, (0, 0))) for version, times in extra[kind].items()}
                cells = [f"{_number(spent[v])} ({_share(spent[v] / total[v])})" if v in spent else "-"
                         for v in versions]
                rows.append([f"{bench['group']}: {name}", *cells])
    return Table(["forward and backward, ms (share)", *versions], rows)


def share(benchmarks: Sequence[dict]) -> Table:
    """The training objective's share of the step at the paper's sizes."""
    shares = [bench["extra_info"]["share"] for bench in benchmarks if "share" in bench["extra_info"]]
    versions = _versions(shares)
    rows = [[part, *(_share(share[version][part] if version in share else None) for version in versions)]
            for share in shares for part in share["fast"]]
    return Table(["share of the step", *versions], rows)


def rates(benchmarks: Sequence[dict]) -> Table:
    """Reading and scoring."""
    rows = [[bench["name"], _ms(_seconds(bench)), f"{bench['extra_info'][key]:.4g} {unit}"]
            for bench in benchmarks for key, unit in RATES.items()
            if isinstance(bench["extra_info"].get(key), float | int)]
    return Table(["", "ms", "rate"], rows)


SECTIONS = {"operators": operators, "peers": peers, "step": step, "parts": parts, "share": share, "rates": rates}
RATES = {"clips_per_s": "clips/s", "frames_per_second": "frames/s"}


def _seconds(bench: dict) -> float:
    return bench["stats"]["median"]


def _by_backend(benchmarks: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Median seconds of each backend, by group."""
    groups: dict[str, dict[str, float]] = {}
    for bench in benchmarks:
        if "backend" in (bench["params"] or {}):
            groups.setdefault(bench["group"], {})[bench["params"]["backend"]] = _seconds(bench)
    return groups


def _speedup(times: dict[str, float]) -> float | None:
    others = [seconds for name, seconds in times.items() if name != "reference"]
    return times["reference"] / min(others) if others and "reference" in times else None


def _turns(bench: dict) -> dict[str, float]:
    """Ratios to ours of versions that took turns."""
    ratios = bench["extra_info"].get("times_ours") or bench["extra_info"].get("ratios") or {}
    return ratios.get("in turn", ratios)


def _ratios(bench: dict) -> dict[str, float]:
    """Of others to ours; settings of ours and the floor left out."""
    return {name: ratio for name, ratio in _turns(bench).items() if not name.startswith("ours") and name != "floor"}


def _steps(benchmarks: Sequence[dict]) -> list[tuple[dict, dict]]:
    return [(bench, bench["extra_info"]) for bench in benchmarks if "clips_per_s" in bench["extra_info"]
            and "times_fast" in bench["extra_info"]]


def _versions(measured: Iterable[dict]) -> list[str]:
    """The keys of all, in the order in which they occur."""
    return list(dict.fromkeys(version for versions in measured for version in versions))


def _limits(benchmarks: Sequence[dict]) -> dict[str, float] | None:
    """Bytes and float32 operations per second that the machine reached, where that was measured."""
    extra = {key: value for bench in benchmarks for key, value in bench["extra_info"].items()}
    keys = {"bytes": "copy_bytes_per_s", "flops": "matmul_flops_per_s"}
    return {name: extra[key] for name, key in keys.items()} if {*keys.values()} <= extra.keys() else None


def _roofline(bench: dict, limits: dict[str, float] | None) -> float | None:
    """Share of the speed that bytes to be moved and operations to be done allow."""
    extra = bench["extra_info"]
    if "floor" in _turns(bench):
        return _turns(bench)["floor"]
    floor = extra.get("floor") or {"flops": 1e9 * (extra.get("gemm_gflop", 0) + extra.get("rotation_gflop", 0))}
    least = max(floor[key] / limits[key] for key in floor) if limits else 0
    return least / _seconds(bench) if least else None


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    return (f"{value:.0f}" if value >= 100 else f"{value:.3g}") + unit


def _ms(seconds: float | None) -> str:
    return _number(None if seconds is None else 1e3 * seconds)


def _times(ratio: float | None) -> str:
    return _number(ratio, " x")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


# Pictures


def draw(run: Run, folder: Path) -> list[Path]:
    """The pictures that `run` has the numbers for, as PNG files."""
    pictures = {"speedup": _draw_speedup, "roofline": _draw_roofline, "contrast": _draw_contrast,
                "memory": _draw_memory}
    written = []
    for kind, draw_into in pictures.items():
        figure = draw_into(run.benchmarks)
        if figure is not None:
            written.append(folder / f"{run.name}-{kind}.png")
            figure.suptitle(run.source.replace("`", ""), color=INK, fontsize=7)
            figure.patch.set_alpha(0)
            write_atomic(written[-1], lambda path, figure=figure: figure.savefig(
                path, format="png", dpi=120, metadata={"Software": None}))
    return written


def _figure(rows: float = 8, columns: int = 1):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.22 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.tick_params(colors=INK, labelsize=7)
        axis.patch.set_alpha(0)
        for spine in axis.spines.values():
            spine.set_color(INK)
    return figure, axes


def _log_ticks(axis, which: str, digits: Sequence[int]) -> None:
    """A logarithmic axis, with ticks at powers of ten times `digits`, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    scaled = axis.xaxis if which == "x" else axis.yaxis
    axis.set(**{f"{which}scale": "log"})
    scaled.set_major_locator(LogLocator(subs=digits))
    scaled.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    scaled.set_minor_formatter(NullFormatter())


def _bars(values: dict[str, float], title: str, limit: float | None = None, log: bool = False):
    """A horizontal bar for each value, the first on top, with a line at `limit`."""
    if not values:
        return None
    figure, (axis,) = _figure(len(values))
    drawn = axis.barh([*values], [*values.values()], color="C0")
    axis.bar_label(drawn, [_number(value) for value in values.values()], color=INK, fontsize=7, padding=2)
    axis.invert_yaxis()
    axis.set_title(title, color=INK, fontsize=9)
    if log:
        _log_ticks(axis, "x", (1, 2, 5))
    if limit is not None:
        axis.axvline(limit, color=INK, lw=0.8, ls="--")
    return figure


def _draw_speedup(benchmarks):
    values = {group: _speedup(times) for group, times in _by_backend(benchmarks).items()}
    values |= {f"{bench['group']}: {name}": ratio for bench, extra in _steps(benchmarks)
               for name, ratio in extra["times_fast"].items()}
    return _bars({name: value for name, value in values.items() if value}, "times faster than plain PyTorch", 1.0, True)


def _draw_roofline(benchmarks):
    limits = _limits(benchmarks)
    shares = {bench["group"]: _roofline(bench, limits) for bench in benchmarks}
    return _bars({name: 100 * share for name, share in shares.items() if share}, "% of the roofline", 100.0)


def _draw_memory(benchmarks):
    values = {f"{bench['group']}: {name}": grown for bench, extra in _steps(benchmarks)
              for name, grown in extra["peak_memory_growth_mb"].items() if grown}
    return _bars(values, "peak memory growth of a training step, MB")


def _draw_contrast(benchmarks):
    """Time of the contrast and its peers against the batch at one width, and against the width at one batch."""
    sizes = {tuple(bench["params"][key] for key in "BTd"): bench for bench in benchmarks
             if "rotation_gflop" in bench["extra_info"]}
    if not sizes:
        return None
    figure, axes = _figure(10, 2)
    for axis, place, label in zip(axes, (0, 2), ("clips B", "width d"), strict=True):
        lines: dict[tuple, list] = {}
        for size in sizes:
            lines.setdefault(tuple(s for i, s in enumerate(size) if i != place), []).append(size)
        longest = sorted(max(lines.values(), key=len))
        curves = {"ours": {size[place]: _seconds(sizes[size]) for size in longest}}
        for size in longest:
            for name, ratio in _ratios(sizes[size]).items():
                curves.setdefault(name, {})[size[place]] = ratio * _seconds(sizes[size])
        for name, curve in curves.items():
            axis.plot([*curve], [1e3 * seconds for seconds in curve.values()], "o-", ms=3, label=name)
        _log_ticks(axis, "x", (1, 2, 4, 8))
        _log_ticks(axis, "y", (1,))
        fixed = dict(zip("BTd", longest[0], strict=True))
        axis.set_title(", ".join(f"{key}={value}" for i, (key, value) in enumerate(fixed.items()) if i != place),
                       color=INK, fontsize=9)
        axis.set_xlabel(label, color=INK, fontsize=8)
        axis.set_ylabel("forward and backward, ms", color=INK, fontsize=8)
        axis.legend(fontsize=6, frameon=False, labelcolor=INK)
    return figure
