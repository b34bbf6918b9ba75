"""What the pages for readers name is there: links, files, commands, settings, equations; and their Python code runs."""
import dataclasses
import re
import shlex
from functools import cache
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from icf import cli
from icf.config import ComposeConfig, Config, ToyConfig
from icf.ops import use_backend

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
         ROOT / "benchmarks/README.md", *sorted((ROOT / "kernels").glob("*/README.md"))]
NARROW = [page for page in PAGES if page.parent in (ROOT, ROOT / "docs")]
NAMES = {"PRESET": "toy-ms3", "NAME": "icf", "SUBSET": "s4", "SECONDS": "1"}  # that stand for what a reader chooses
SECTIONS = {"data", "model", "loss", "objective", "train", "eval", "context", "decoder", "mit", "sc", "cdcl"}
RUNNERS = ("icf.engine.train.train", "icf.engine.evaluate.evaluate", "icf.engine.evaluate.evaluate_masks",
           "icf.engine.predict.predict", "icf.engine.results.scores_folder", "icf.engine.checkpoint.export",
           "icf.engine.checkpoint.read_notes", "icf.engine.summary.started", "icf.engine.summary.scores_in_words",
           "icf.studies.ablate.ablate", "icf.studies.ablate.table_2", "icf.studies.ablate.figure_5",
           "icf.studies.ablate.comparison",
           "icf.studies.bench.report", "icf.studies.bench.run", "icf.studies.compare.compare",
           "icf.studies.profile.profile", "icf.studies.profile.emit_nvtx", "icf.data.check.check",
           "icf.data.toy.generate", "icf.data.compose.generate", "icf.data.compose.show",
           "icf_kernels.info.report", "icf.cli.load")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$|^    .*?$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def quoted(page: Path) -> list[str]:
    return [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page):
    text = prose(page)
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_files_are_there(page):
    for name in quoted(page):
        if re.fullmatch(r"(icf|kernels|csrc|configs|tests|benchmarks|docs)/[^ ,]*", name):
            pattern = re.sub(r"<\w+>|NAME", "*", name).rstrip("/")
            assert [*ROOT.glob(pattern)], name


@pytest.mark.parametrize("page", NARROW, ids=lambda page: page.name)
def test_lines_fit_the_screen(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 140 and not line.startswith("|")] == []


def commands(page: Path) -> list[list[str]]:
    """The arguments of each `icf` that a page names, and of `icf train` for settings that stand alone."""
    lines = re.findall(r"^ {4}(\S.*)$", page.read_text(encoding="utf-8").replace("\\\n", ""), flags=re.M)
    told = []
    for line in [re.sub(r"\s#.*", "", line) for line in lines] + quoted(page):
        if found := re.search(r"(?:^|&& |-m )icf(?:\.cli)? ([a-z].*)", line):
            told.append(found[1] if " -" in line or re.search(r"[^a-z ]", found[1]) else f"{found[1]} --help")
        elif re.match(r"--[a-z]+\.", line):
            told.append(f"train {line}")
    return [[NAMES.get(word, word) for word in shlex.split(command)] for command in told]


TOLD = sorted({shlex.join(command): command for page in PAGES for command in commands(page)}.items())


@pytest.mark.parametrize("args", [args for _, args in TOLD], ids=[name for name, _ in TOLD])
def test_commands_are_understood(args, monkeypatch):
    """They are parsed as ever; what they would do is left out."""
    for runner in RUNNERS:
        monkeypatch.setattr(runner, MagicMock())
    monkeypatch.setattr("icf.data.folder.import_clips", lambda root, videos, **_: ([], []))
    monkeypatch.setattr(cli, "config_of", lambda source: cli.preset_file("toy-ms3"))
    try:
        cli.main(args)
    except SystemExit as end:
        assert end.code != 2 and not isinstance(end.code, str), args


def test_pages_tell_commands():
    assert {args[0] for _, args in TOLD} == set(cli.COMMANDS)


@cache
def defaults() -> dict[str, object]:
    """Every field of the configuration, by its full name."""
    def fields(value, prefix):
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            yield prefix + field.name, inner
            if dataclasses.is_dataclass(inner):
                yield from fields(inner, f"{prefix}{field.name}.")

    config = Config()
    config.data.toy, config.data.compose = ToyConfig(), ComposeConfig()
    return dict(fields(config, ""))


def settings(name: str) -> list[str]:
    return [key for key in defaults() if f".{key}".endswith(f".{name}")]


@every_page
def test_settings_exist(page):
    for name in quoted(page):
        found = re.match(r"((?:[a-z]\w*\.)+)([a-z]\w*|\*)(?:$|: )", name)
        if found and found[1].split(".")[0] in SECTIONS and found[2] not in ("csv", "json", "jpg", "py"):
            assert settings(found[1].rstrip(".") if found[2] == "*" else found[1] + found[2]), name


def test_defaults_are_as_told():
    """In the tables of docs/method.md: what the third column begins with is the default of the switch in the first."""
    rows = re.findall(r"^\| `([a-z_.]+)` \|.*\| `(\w+)`[^|]*\|$", prose(ROOT / "docs/method.md"), flags=re.M)
    assert len(rows) > 10
    for name, told in rows:
        (key,) = settings(name)
        assert str(defaults()[key]).lower() == told, name


def numbers(first: str, last: str) -> list[int]:
    return [*range(int(first), int(last or first) + 1)]


def test_every_equation_has_one_folder():
    """The table of docs/method.md names each once, and the code of the folder that it names says so too."""
    row = r"^\| (\d+)(?:-(\d+))? \|.*?\| `([\w/]+)` \| `(\w+\.py)`"
    rows = re.findall(row, prose(ROOT / "docs/method.md"), flags=re.M)
    assert [n for first, last, *_ in rows for n in numbers(first, last)] == [*range(1, 20)]
    for first, last, folder, file in rows:
        assert (ROOT / folder / file).is_file()
        code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / folder).glob("*.py"))
        said = {n for found in re.findall(r"Eq\. (\d+)(?:-(\d+))?", code) for n in numbers(*found)}
        assert {*numbers(first, last)} <= said, (first, folder)


CODE = [(page, block) for page in PAGES
        for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.S | re.M)]


@pytest.mark.parametrize("page, code", CODE, ids=[f"{page.stem}-{i}" for i, (page, _) in enumerate(CODE)])
def test_python_code_runs(page, code):
    if "mmcv" in code:
        pytest.importorskip("mmcv")
    with use_backend("auto"):
        exec(compile(code, str(page), "exec"), {})


def test_start_is_two_commands():
    lines = re.findall(r"^ {4}(\S.*)$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    assert [re.sub(r"\s+#.*", "", line) for line in lines] == [
        "pip install -e . && icf train", "pip install -e '.[test]' && pytest"]
