"""Scores as rows, each with its mode and with who reports it so, and as tables for a terminal."""
from __future__ import annotations

from typing import NamedTuple

from rich.console import Group
from rich.table import Table

PIXELS = {"zero": "absent classes: zero", "seen": "absent classes: skip", "foreground": "without background"}
WORDS = {"all": "all classes", "seen": "classes that occur", "real": "real frames", "padded": "padding too",
         "include": "with background", "exclude": "without background", "public": "without the last class (sic)"}


def score_sections(results: dict) -> list[tuple[str, str, list[tuple[str, str, float | None, str]]]]:
    """Sections (title, remark, rows) of scores; a row is (score, mode, value, who reports it so)."""
    scores = results["scores"]
    rows = _semantic_rows(scores["AVSS"]) if "AVSS" in scores else _binary_rows(scores["J"], scores["F"])
    sections = [("Comparable with published numbers", "As the named code reports them.", rows[0]),
                ("Other modes", "Where the modes above are lenient, and other ways to average.", rows[1])]
    if "AVSS" in scores:
        forgiving = next(key for key in scores if key.startswith("AVSS, "))
        sections[1][2].extend(
            [*((key, f"{mode_words('all/real/include')}; predictions of {forgiving.removeprefix('AVSS, ')}",
                scores[forgiving][f"{key}/all/real/include"], "") for key in "JF"),
             *(("J", f"foreground as a whole; empty frames: {mode.removesuffix('/frame')}",
                scores["J of the foreground"][mode], "") for mode in ("background/frame", "strict/frame"))])
    if "combined" in results:
        sections[1][2].append(("combined", "J strict, mean over true sound, silence, noise and off-screen sound",
                               results["combined"], ""))
    pixels = [(*key.partition("/")[::2], value) for key, value in scores["pixels"].items()]
    sections.append(("All pixels together", "One confusion matrix, far above means over frames and not comparable.",
                     [(score, PIXELS.get(mode, ""), value, "CAVP" if (score, mode) == ("mIoU", "zero") else "")
                      for score, mode, value in pixels]))
    return sections


def _binary_rows(j: dict, f: dict) -> tuple[list, list]:
    who = {"batch:4": "AVSBench", "batch:2": "AVSegFormer", "per_video": "COMBO", "dataset": ""}
    public = [("J", "empty frames: background share", j["background/frame"], "AVSBench, AVSegFormer, COMBO"),
              *(("F", f"{group}; empty groups: zero", f[f"{group}/zero"], name) for group, name in who.items())]
    strict = [*(("F", f"{group}; empty groups: skip", f[f"{group}/skip"], "") for group in who),
              ("J", "empty frames: strict", j["strict/frame"], ""), ("J", "empty frames: skip", j["skip/frame"], ""),
              ("J", "empty frames: background share; mean of batch:4", j["background/batch:4"], ""),
              ("FPR", "frames without foreground", j["false_positive/empty"], "")]
    return public, strict


def _semantic_rows(scores: dict) -> tuple[list, list]:
    who = {"all/padded/include": "AVSBench, AVSegFormer", "all/padded/public": "AVSBench, AVSegFormer",
           "all/real/include": "COMBO", "all/real/public": "COMBO"}
    other = ("all/real/exclude", "seen/real/include", "seen/real/exclude")
    public = [(key, mode_words(mode), scores[f"{key}/{mode}"], name) for mode, name in who.items() for key in "JF"]
    return public, [(key, mode_words(mode), scores[f"{key}/{mode}"], "") for key in "JF" for mode in other]


def mode_words(mode: str) -> str:
    """A mode of AVSS in words; others as they are."""
    return ", ".join(WORDS.get(word, word) for word in mode.split("/"))


def modes_named(modes: dict[str, str]) -> str:
    """The modes that J and F without a mode beside them are in: `J background/frame, F per_video/zero`."""
    return ", ".join(f"{key} {mode.removeprefix(key + '/')}" for key, mode in modes.items())


def score_tables(results: dict) -> Group:
    """The scores for a terminal, those that compare with published numbers first."""
    counts = results["counts"]
    scores = Table(title=f"{results['subset']} {results['split']}: {counts['clips']} clips, "
                         f"{counts['scored_frames']} frames", title_justify="left")
    for column in ("score", "mode", "value", "reported by"):
        scores.add_column(column, justify="right" if column == "value" else "left")
    for title, _, rows in score_sections(results):
        scores.add_section()
        scores.add_row("", f"[bold]{title}")
        for score, mode, value, who in rows:
            scores.add_row(score, mode, format_value(value), who)
    tables = [scores]
    for found in (group_table(results), negative_table(results)):
        if found.rows:
            tables.append(Table(*found.header, caption=modes_named(results["default_modes"]), caption_justify="left"))
            for row in found.rows:
                tables[-1].add_row(*map(format_value, row))
    return Group(*tables)


class Rows(NamedTuple):
    """A table of the values that several named things have, a row each."""

    header: list[str]
    rows: list[list]

    @classmethod
    def of(cls, kind: str, things: dict[str, dict]) -> Rows:
        """Columns are those of the first one; the others may lack some."""
        columns = list(next(iter(things.values()), {}))
        return cls([kind, *columns], [[name, *map(values.get, columns)] for name, values in things.items()])


def group_table(results: dict) -> Rows:
    """Groups of clips, their gap, and who knows the answer in part."""
    rows = {name: {"clips": group["clips"], **{key: group[key] for key in ("J", "F", "J&F")}}
            for name, group in results["groups"].items()}
    if "gap" in results:
        rows["aligned - conflicting"] = {"clips": "", **results["gap"]}
    for name, oracle in results.get("oracles", {}).items():
        rows[f"oracle: {name}"] = {"clips": results["counts"]["clips"], "J": oracle["J"]}
    return Rows.of("group", rows)


def negative_table(results: dict) -> Rows:
    """Scores under each sound that replaced the true one."""
    names = {"FPR": "FPR", "strict": "empty frames", "J": "J", "F": "F", "sensitivity": "sensitivity",
             "change": "change of p"}
    return Rows.of("sound", {kind: {names[key]: scores[key] for key in names}
                             for kind, scores in results["negatives"].items()})


def format_value(value: object) -> str:
    """A value as the tables show it."""
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
