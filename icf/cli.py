"""The command line, ``icf COMMAND``: parses, then calls one function each."""
from __future__ import annotations

import argparse
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from difflib import get_close_matches
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Literal

import yaml
from jsonargparse import ArgumentParser

from icf import __version__
from icf.config import SUBSETS, ComposeConfig, Config, ToyConfig, build_config, config_parser
from icf.help import completion, fields_help, short_help
from icf.machine import pick_device

DEFAULT_PRESET = "toy-ms3"
USAGE = """usage: icf COMMAND ...

  train [PRESET]       train a model, evaluate it on the test split and write a report
  evaluate RUN         score a run folder or weights file on a data set
  export RUN FILE      write what inference needs of a run, without the training objective
  predict SOURCE ...   segment what sounds in videos, or in folders of frames with a sound file
  compare RUN ...      runs side by side: scores, features, and the clips on which they differ
  ablate               train the paper's ablations, and set what is measured beside its numbers
  data toy FOLDER      write the toy benchmark
  data compose FOLDER  compose a benchmark of public pictures with masks and public sounds
  data check ROOT      validate a data set, file by file
  data import ROOT V.. add videos, and masks of them, to own labelled clips
  profile [PRESET]     trace a training step: time of its parts and operators, and a Chrome trace
  bench run            measure everything that can run here
  bench report         tables and pictures of saved measurements
  info                 versions, what was built, which operator can run where, and why not
  completion SHELL     a script that completes commands, presets and options in bash or zsh

`icf COMMAND --help` lists the options. `icf train` alone trains a small model on the toy benchmark."""


def presets() -> dict[str, Path]:
    """The presets that come with the package, by name."""
    return {path.stem: path for path in sorted(Path(str(files("icf.configs"))).glob("*.yaml"))}


def ablations() -> dict[str, Path]:
    """What each ablation changes in the full method, by name: YAML files to be laid over a preset."""
    return {path.stem: path for path in sorted(Path(str(files("icf.configs")), "ablations").glob("*.yaml"))}


def meant(word: str, names: Iterable[str]) -> str:
    """A question after what may be a slip of the pen."""
    close = get_close_matches(word, list(names), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def preset_file(name: str) -> str:
    if name not in presets() and not Path(name).is_file():
        raise ValueError(f"no preset or YAML file {name!r}{meant(name, presets())}; presets: {', '.join(presets())}")
    return str(presets().get(name, name))


def config_of(source: Path) -> str:
    """The configuration of a run folder or weights file, as YAML."""
    from icf.engine.checkpoint import read_config
    return yaml.safe_dump(read_config(source).to_dict())


def parse(own: argparse.ArgumentParser, args: list[str], base,
          several: bool = False) -> tuple[argparse.Namespace, Config]:
    """What a command was given: its own options, and the configuration.

    Args:
        own: the parser of the command's own options; leading arguments that are no options become its ``targets``, the
            first of them its ``target``.
        several: more than one of these is allowed.
        base: from the command's own options, the YAML files or texts that the configuration starts from, each laid
            over those before. The remaining options of ``args`` (``--train.lr 1e-3``) go on top.
    """
    options, configure = prepare(own, args, several)
    return options, configure(base(options))


def prepare(own: argparse.ArgumentParser, args: list[str],
            several: bool = False) -> tuple[argparse.Namespace, Callable[..., Config]]:
    """The command's own options, and a function that gives the configuration of the others, which lie between YAML
    files or texts ``below`` and, if given, ``above`` them."""
    fields = config_parser(prog=own.prog, usage=argparse.SUPPRESS, exit_on_error=False)
    if {"-h", "--help"} & {*args}:
        print(short_help(own.prog.split()[1], own.format_help(), fields, presets()))
        sys.exit()
    if "--help-fields" in args:
        section = next(iter(args[args.index("--help-fields") + 1:]), None)
        print(fields_help(fields, section))
        sys.exit()
    targets = list(takewhile(lambda arg: not arg.startswith("-"), args))
    if len(targets) > 1 and not several:
        raise ValueError(f"{own.prog.split()[1]}: expected one name, got {targets[0]!r} and {targets[1]!r}")
    options, rest = own.parse_known_args(args[len(targets):])
    options.targets = [os.path.expanduser(target) for target in targets]
    options.target = next(iter(options.targets), None)

    def configure(below: list[str], above: Sequence[str] = ()) -> Config:
        layers = [*(("--config", x) for x in below), rest, *(("--config", x) for x in above)]
        try:
            return build_config(fields, fields.parse_args([arg for layer in layers for arg in layer]))
        except argparse.ArgumentError as error:
            unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", str(error))
            known = [*fields._option_string_actions, *own._option_string_actions]
            if unknown is None:
                raise
            raise ValueError(f"{error}{meant(unknown[1], known)}") from None

    return options, configure


def train(args: list[str]) -> None:
    own = command("train [PRESET]", "Train a model, evaluate it on the test split and write a report.",
                  f"PRESET is one of those below, or a YAML file. The default is {DEFAULT_PRESET}.")
    own.add_argument("--ablation", choices=tuple(ablations()), metavar="NAME",
                     help=f"change the method as in a row of the paper's Table 2: {', '.join(ablations())}")
    own.add_argument("--resume", type=user_path, metavar="RUN", help="go on with the run in this folder")
    own.add_argument("--with-icf", action="store_true", help="--objective.enabled true, and -icf after the name of the "
                     "preset's run folder: the objective for models that come without it, as toy-tpavi")
    with_icf = "--with-icf" in args
    args = [*args, *(["--objective.enabled=true"] if with_icf else [])]

    def base(options) -> list[str]:
        if options.resume is None:
            changed = [str(ablations()[options.ablation])] if options.ablation else []
            return [preset_file(options.target or DEFAULT_PRESET), *changed]
        if named := options.target or options.ablation:
            raise ValueError(f"train: --resume brings its own configuration; leave out {named!r}")
        return [config_of(options.resume)]

    options, cfg = parse(own, args, base)
    from icf.engine.train import train as run
    cfg.out = options.resume or cfg.out
    if with_icf and not options.resume and not any(arg.startswith("--out") for arg in args):
        cfg.out = cfg.out.with_name(f"{cfg.out.name}-icf")
    with shown_log():
        run(cfg, resume=options.resume is not None)


def evaluate(args: list[str]) -> None:
    own = command("evaluate RUN", "Score a run folder or weights file, or the masks of any method.",
                  "RUN may be left out with --masks; the configuration then comes from --config and the fields.")
    own.add_argument("--split", choices=("train", "val", "test"), default="test", help="default: %(default)s")
    own.add_argument("--device", help="cpu, cuda, cuda:1, mps; by default a GPU if there is one")
    own.add_argument("--save-masks", action="store_true", help="write the predicted masks as PNG files")
    own.add_argument("--masks", type=user_path, help="score the masks of this folder instead of a model's")

    def base(options) -> list[str]:
        if options.target is None and options.masks is None:
            raise ValueError("evaluate: a run folder or weights file is required, as in: icf evaluate runs/toy-ms3")
        return [config_of(Path(options.target))] if options.target else []

    options, cfg = parse(own, args, base)
    from icf.engine.evaluate import evaluate as run
    from icf.engine.evaluate import evaluate_masks
    from icf.engine.summary import scores_in_words, started
    if options.target and options.masks is None:
        refuse_other_weights(cfg, Path(options.target))
    from icf.engine.results import scores_folder
    device = pick_device(options.device)
    if options.target and not any(arg.startswith("--out") for arg in args):  # beside the weights, wherever they are now
        cfg.out = scores_folder(Path(options.target), cfg, options.split, options.masks)
    print(started(f"evaluate {options.target or options.masks} on {cfg.data.subset} {options.split}", cfg.out, device))
    results = evaluate_masks(options.masks, cfg, options.split, cfg.out) if options.masks else run(
        load(options.target, device), cfg, options.split, cfg.out, device=device, save_masks=options.save_masks)
    print(f"{scores_in_words(results)}\nreport: {cfg.out / 'report.html'}")


def export(args: list[str]) -> None:
    own = argparse.ArgumentParser(prog="icf export", description="Write what inference needs of a run folder or "
                                  "weights file: no text tower, diffusion, contrast. `predict` reads all but .pt2.")
    own.add_argument("run", type=user_path)
    own.add_argument("file", type=user_path, help="its ending decides: .safetensors, weights; .onnx, for onnxruntime; "
                     ".pt2, for torch.export.load")
    options = own.parse_args(args)
    from icf.engine.checkpoint import export as run
    run(options.run, options.file)
    print(f"{options.file}: written; docs/deploy.md says what runs it")


def predict(args: list[str]) -> None:
    own = command("predict SOURCE ...", "Segment what sounds in videos, or in folders of frames with one sound file.",
                  "Writes the overlay video with its sound, the masks, a contact sheet and predictions.json of each. A "
                  "SOURCE may also be a folder of videos, or a pattern such as 'clips/*.mp4'.")
    own.add_argument("--weights", type=user_path, default=Path("runs") / DEFAULT_PRESET, metavar="RUN",
                     help="run folder or weights file (default: %(default)s)")
    own.add_argument("--output", type=user_path, help="folder to write to, of several sources one for each in it "
                     "(default: predictions/NAME of the source)")
    own.add_argument("--threshold", type=float, help="of the probability, for binary masks (default: that of the run)")
    own.add_argument("--device", help="cpu, cuda, cuda:1, mps; by default a GPU if there is one")
    own.add_argument("--overlap", type=int, default=0, metavar="SECONDS", help="overlap of neighbouring windows")
    own.add_argument("--batch", type=int, default=1, metavar="WINDOWS", help="windows per step (default: %(default)s)")
    own.add_argument("--amp", choices=("no", "bf16"), default="no", help="mixed precision (default: %(default)s)")
    own.add_argument("--silent-ok", action="store_true", help="treat a video without sound as silent")
    own.add_argument("--strict", action="store_true", help="refuse damaged videos; else what is damaged is left out")

    def base(options) -> list[str]:
        if options.target is None:
            raise ValueError("predict: a video file or a folder of frames is required, as in: icf predict CLIP.mp4")
        return [config_of(options.weights)]

    options, cfg = parse(own, args, base, several=True)
    from icf.data.folder import find_sources
    from icf.engine.checkpoint import read_notes
    from icf.engine.predict import output_folders
    from icf.engine.predict import predict as run
    from icf.engine.summary import started
    device = pick_device(options.device)
    refuse_other_weights(cfg, options.weights)
    sources = find_sources(options.targets)
    several = len(sources) > 1 or sources != [Path(options.target)]
    outs = output_folders(sources, options.output) if several else [
        options.output or Path("predictions") / sources[0].stem]
    classes, model = read_notes(options.weights).get("classes") or None, load(options.weights, device)
    if cfg.data.toy is not None:
        print("icf: these weights have seen the shapes of the toy benchmark alone; of other pictures and sounds expect "
              "nothing", file=sys.stderr)
    print(started(f"predict {sources[0]}{f' and {len(sources) - 1} more' if several else ''}", outs[0], device,
                  weights=str(options.weights)))
    failed = []
    for source, out in zip(sources, outs, strict=True):
        try:
            run(model, cfg, source, out, device=device, threshold=options.threshold, silent_ok=options.silent_ok,
                overlap=options.overlap, batch=options.batch, amp=options.amp, classes=classes, strict=options.strict)
        except ValueError as error:
            if not several:
                raise
            failed.append(source)
            print(f"icf: {error}", file=sys.stderr)
    if failed:
        raise ValueError(f"predict: {len(failed)} of {len(sources)} sources failed: {', '.join(map(str, failed))}")


def refuse_other_weights(cfg: Config, source: Path) -> None:
    """Raise ValueError where a setting differs from that of the weights which only training could bring into them."""
    parser = config_parser(exit_on_error=False)
    saved = build_config(parser, parser.parse_args(["--config", config_of(source)]))
    for key, (was, wanted) in cfg.differences(saved).items():
        if key.startswith(("model.", "loss.", "objective.", "train.")):
            raise ValueError(f"{key}: expected {was}, with which the weights were trained, got {wanted}")


def compare(args: list[str]) -> None:
    own = argparse.ArgumentParser(prog="icf compare", description="Show the same clips to the models of several runs "
                                  "and write compare.html: scores, t-SNE of the features, predictions side by side.")
    own.add_argument("sources", type=user_path, nargs="+", metavar="RUN", help="run folder or weights file")
    own.add_argument("--names", nargs="+", metavar="NAME", help="what to call the runs (default: their folders)")
    own.add_argument("--out", type=user_path, default=Path("compare"), help="folder to write to (default: %(default)s)")
    own.add_argument("--split", choices=("train", "val", "test"), default="test")
    own.add_argument("--clips", type=int, default=64, metavar="N", help="clips to look at (default: %(default)s)")
    own.add_argument("--rows", type=int, default=8, metavar="N", help="of these, to draw (default: %(default)s)")
    own.add_argument("--root", type=user_path, help="where the data is (default: where the first run had it)")
    own.add_argument("--device", help="cpu, cuda, cuda:1, mps; by default a GPU if there is one")
    options = vars(own.parse_args(args))
    from icf.studies.compare import compare as run
    options["device"] = pick_device(options["device"])
    print(run(**options))


def ablate(args: list[str]) -> None:
    own = command("ablate", "Train the rows of the paper's Table 2, or the sweeps of its Figure 5, and set what is "
                  "measured beside its numbers. Runs that are there are not trained again.",
                  "The fields of the configuration hold for all rows, but for what a row is about.")
    study = own.add_mutually_exclusive_group()
    study.add_argument("--table", type=int, choices=(2,), help="components and variants (the default)")
    study.add_argument("--figure", type=int, choices=(5,), help="sweeps and disturbances")
    study.add_argument("--compare", action="store_true", help="components, and the method with sounds that belong to "
                       "nothing, with intervals and tests: statistics.md, .json and .png")
    own.add_argument("--base", default="toy-ms3", metavar="PRESET", help="the full method (default: %(default)s)")
    own.add_argument("--rows", nargs="+", metavar="ROW", help="some only: ablations of the table, as of icf train "
                     "--ablation, or sweeps of the figure: keep, alpha, start, snr_db, frame_mix")
    own.add_argument("--seeds", nargs="+", default=["0-2"], metavar="SEED", help="numbers and ranges (default: 0-2)")
    own.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, of one thread each")
    own.add_argument("--out", type=user_path, default=Path("runs/ablations"), help="folder of the runs and the table "
                     "(default: %(default)s)")
    own.add_argument("--report-only", action="store_true", help="write the table of what there is, train nothing")
    options, configure = prepare(own, args)
    if options.target is not None:
        raise ValueError(f"ablate: expected options only, got {options.target!r}; --base names a preset")
    from icf.studies.ablate import ablate as run
    from icf.studies.ablate import comparison, figure_5, table_2
    plan = figure_5 if options.figure else comparison if options.compare else table_2
    base = preset_file(options.base)
    found = plan(lambda name: configure([base], [str(ablations()[name])]), options.rows)
    run(found, numbers("--seeds", options.seeds), options.out, pick_device(None), options.report_only, options.jobs)


def numbers(option: str, words: Sequence[str]) -> list[int]:
    """Numbers and ranges such as `0-9`, ends included. Raises ValueError for anything else."""
    found: list[int] = []
    for word in words:
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", word, re.ASCII)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{option}: expected numbers and ranges such as 3 or 0-9, got {word!r}")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return list(dict.fromkeys(found))


def data(args: list[str]) -> None:
    own = argparse.ArgumentParser(prog="icf data", description="Write the toy benchmark, compose one of public data, "
                                  "validate a data set, or add a video to own labelled clips.")
    own.add_argument("command", choices=tuple(DATA))
    DATA[own.parse_args(args[:1]).command](args[1:])


def data_toy(args: list[str]) -> None:
    own = ArgumentParser(prog="icf data toy", exit_on_error=False, description="Write the toy benchmark: real files in "
                         "the layouts of AVSBench, the same for the same seed.")
    own.add_argument("folder", type=user_path, nargs="?", default=Path("data/toy"))
    own.add_class_arguments(ToyConfig, as_group=False)
    own.add_argument("--subsets", type=list[Literal["s4", "ms3", "avss"]], default=["s4", "ms3", "avss"])
    options = vars(own.parse_args(args))
    from icf.data.toy import generate
    generate(options.pop("folder"), **options)


def data_compose(args: list[str]) -> None:
    own = ArgumentParser(prog="icf data compose", exit_on_error=False, description="Compose clips in the layouts of "
                         "AVSBench of pictures with masks (Pascal VOC, COCO, DAVIS) and sounds (ESC-50, VGGSound, a "
                         "folder per class). An interrupted command goes on where it was.")
    own.add_argument("folder", type=user_path)
    own.add_class_arguments(ComposeConfig, as_group=False)
    own.add_argument("--layout", choices=("ms3", "s4", "avss"), default="ms3")
    own.add_argument("--workers", type=int, help="processes (default: one per core)")
    options = vars(own.parse_args(args))
    folder, layout, workers = (options.pop(name) for name in ("folder", "layout", "workers"))
    from icf.data.compose import generate, show
    show(generate(folder, layout, ComposeConfig(**options), workers))


def data_check(args: list[str]) -> None:
    own = argparse.ArgumentParser(prog="icf data check", description="Validate a data set file by file. Exit status: 0 "
                                  "clean, 1 warnings, 2 errors.")
    own.add_argument("root", type=user_path)
    own.add_argument("--subset", choices=SUBSETS, required=True)
    own.add_argument("--deep", action="store_true", help="open every file instead of headers only")
    own.add_argument("--json", type=user_path, help="also write the findings to this file")
    options = own.parse_args(args)
    from icf.data.check import check
    report = check(options.root, options.subset, deep=options.deep)
    report.print()
    if options.json:
        report.write(options.json)
    sys.exit(report.exit_code)


def data_import(args: list[str]) -> None:
    own = argparse.ArgumentParser(prog="icf data import", description="Add videos to the own clips below ROOT, for "
                                  "data.subset=folder: one picture a second, the sound, and masks if there are any.")
    own.add_argument("root", type=user_path)
    own.add_argument("videos", nargs="+", metavar="VIDEO", help="files, folders of videos, or patterns")
    own.add_argument("--split", choices=("train", "val", "test"), required=True)
    own.add_argument("--labels", type=user_path, help="folder of masks named by their second, 0.png say; or a "
                     "folder of such folders, named as the videos without their endings")
    own.add_argument("--name", help="of the clip (default: of the file)")
    own.add_argument("--category", default="", help="what sounds")
    own.add_argument("--silent-ok", action="store_true", help="accept a video without sound")
    own.add_argument("--strict", action="store_true", help="refuse a damaged video")
    options = vars(own.parse_args(args))
    from icf.data.avsbench import read_classes
    from icf.data.folder import find_sources, import_clips
    options["videos"] = find_sources([os.path.expanduser(video) for video in options["videos"]])
    _, failed = import_clips(**options)
    root = options["root"]
    classes = read_classes(root) if (root / "label2idx.json").is_file() else []
    preset, count = ("own-semantic", f" --model.classes {len(classes)}") if classes else ("own", "")
    print(f"next: icf data check {root} --subset folder --deep\n      icf train {preset} --data.root {root}{count}")
    if failed:
        raise ValueError(f"{len(failed)} of {len(options['videos'])} videos failed:\n  " + "\n  ".join(failed))


DATA = {"toy": data_toy, "compose": data_compose, "check": data_check, "import": data_import}


def info(args: list[str]) -> None:
    argparse.ArgumentParser(prog="icf info", description="Versions, what was built, which operator can run where, and "
                            "why not.").parse_args(args)
    from importlib.metadata import PackageNotFoundError, version

    from icf_kernels.info import report
    print(f"icf {__version__}")
    print(report())
    for name in ("torchvision", "timm", "accelerate", "transformers", "diffusers", "triton", "laion_clap"):
        try:
            print(f"{name} {version(name)}")
        except PackageNotFoundError:
            print(f"{name} is not installed")


def profile(args: list[str]) -> None:
    own = command("profile [PRESET]", "Trace a training step on random clips: what its parts and operators take, and a "
                  "Chrome trace.", f"PRESET is one of those below, or a YAML file. The default is {DEFAULT_PRESET}.")
    own.add_argument("--trace", type=user_path, metavar="FILE", help="the Chrome trace (default: trace.json in --out)")
    own.add_argument("--steps", type=int, default=1, help="steps that are traced, after one that is not")
    own.add_argument("--device", help="cpu, cuda, ..; by default a GPU if there is one")
    own.add_argument("--nvtx", action="store_true", help="mark the parts as NVTX ranges instead, for nsys profile")
    options, cfg = parse(own, args, lambda options: [preset_file(options.target or DEFAULT_PRESET)])
    if options.steps < 1:
        raise ValueError(f"profile: --steps must be at least 1, got {options.steps}")
    device = pick_device(options.device)
    from icf.ops import use_backend
    from icf.studies import profile as profiling
    with use_backend(cfg.backend):
        if options.nvtx:
            profiling.emit_nvtx(cfg, options.steps, device)
        else:
            profiling.profile(cfg, options.trace or cfg.out / "trace.json", options.steps, device)


def bench(args: list[str]) -> None:
    own = argparse.ArgumentParser(prog="icf bench", description="Measure the operators and the training step, and "
                                  "report what was measured.")
    own.add_argument("command", choices=tuple(BENCH))
    BENCH[own.parse_args(args[:1]).command](args[1:])


def bench_run(args: list[str]) -> None:
    own = argparse.ArgumentParser(prog="icf bench run", description="Run the benchmarks of a checkout and save what "
                                  "they measure. Further options go to pytest, as -k step or --benchmark-compare.")
    own.add_argument("--json", type=user_path, metavar="FILE",
                     help="where to (default: benchmarks/results/cpu.json, or gpu-NAME.json)")
    own.add_argument("--benchmarks", type=user_path, default=Path("benchmarks"), help="folder of the benchmarks")
    options, rest = own.parse_known_args(args)
    from icf.studies.bench import run
    sys.exit(run(options.benchmarks, options.json, rest))


def bench_report(args: list[str]) -> None:
    own = argparse.ArgumentParser(prog="icf bench report", description="Turn saved measurements into tables and "
                                  "pictures, between the marks <!-- bench:begin NAME --> and <!-- bench:end NAME -->.")
    own.add_argument("--json", type=user_path, nargs="+", metavar="FILE", help="default: cpu*.json, gpu-*.json in "
                     "benchmarks/results")
    own.add_argument("--into", type=user_path, nargs="+", metavar="FILE", help="texts with marks (default: README.md "
                     "and benchmarks/README.md)")
    own.add_argument("--plots", type=user_path, default=Path("benchmarks/results"), metavar="FOLDER")
    options = own.parse_args(args)
    from icf.studies.bench import report, saved
    report(options.json or saved(Path("benchmarks/results")),
           options.into or [Path("README.md"), Path("benchmarks/README.md")], options.plots)


def complete(args: list[str]) -> None:
    own = argparse.ArgumentParser(prog="icf completion", description="Print a script that completes commands, presets "
                                  "and options: eval \"$(icf completion bash)\" in ~/.bashrc.")
    own.add_argument("shell", choices=("bash", "zsh"))
    shell = own.parse_args(args).shell
    fields = [option for option in config_parser()._option_string_actions if option.startswith("--")]
    words = {}
    for name in COMMANDS:
        text = io.StringIO()
        with redirect_stdout(text), suppress(SystemExit):
            COMMANDS[name](["--help"])
        found = re.findall(r"--[a-z][a-z-]*(?![\w.])", text.getvalue())
        found += fields if "--help-fields" in found else []
        found += [*presets()] if "[PRESET]" in text.getvalue() else []
        found += {"data": [*DATA], "bench": [*BENCH]}.get(name, [])
        words[name] = list(dict.fromkeys(found))
    print(completion(words, shell), end="")


BENCH = {"run": bench_run, "report": bench_report}

COMMANDS = {"train": train, "evaluate": evaluate, "export": export, "predict": predict, "compare": compare,
            "ablate": ablate, "data": data, "profile": profile, "bench": bench, "info": info, "completion": complete}


def user_path(text: str) -> Path:
    """A path of the command line, `~` the user's home, which a shell leaves alone in `--out=~/x`."""
    return Path(text).expanduser()


def command(usage: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"icf {usage}", description=description, epilog=epilog, add_help=False,
                                   allow_abbrev=False, exit_on_error=False)


@contextmanager
def shown_log():
    """Shows what the package logs, above a progress bar; of several processes on a machine, the first one's."""
    from tqdm.contrib.logging import logging_redirect_tqdm
    logger, handler = logging.getLogger("icf"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    if os.getenv("LOCAL_RANK", "0") != "0":
        yield
        return
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with logging_redirect_tqdm([logger]):
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def load(source: str | Path, device: str):
    from icf.engine.checkpoint import load_model
    return load_model(Path(source), device)[0]


def main(argv: list[str] | None = None) -> None:
    """Entry point. What a person can mend ends in one line on stderr and status 2; anything else is a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if argv else 2)
    if argv[0] in ("version", "--version"):
        print(f"icf {__version__}")
        return
    if argv[0] == "help":
        return main([*argv[1:], "--help"])
    if argv[0] not in COMMANDS:
        sys.exit(f"icf: no command {argv[0]!r}{meant(argv[0], COMMANDS)}; one of: {', '.join(COMMANDS)}")
    try:
        COMMANDS[argv[0]](argv[1:])
    except KeyboardInterrupt as stop:
        sys.exit(f"icf {argv[0]}: {stop or 'interrupted'}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, argparse.ArgumentError) as error:
        if os.getenv("ICF_TRACEBACK"):
            raise
        print(f"icf {argv[0]}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
