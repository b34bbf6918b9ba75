"""The report of an evaluation: one page that holds everything inside itself, and reads in light and in dark."""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from icf.engine.curves import curves
from icf.engine.pages import render
from icf.engine.pictures import Sample, contact_sheet, legend, strips
from icf.engine.score_tables import format_value, group_table, mode_words, modes_named, negative_table, score_sections
from icf.files import write_atomic


def write_report(out: Path, results: dict, samples: Sequence[Sample], classes: Sequence[str] = (),
                 history: dict | None = None) -> Path:
    """Write `report.html`, `overlays.jpg` (a contact sheet of the samples) and, with a history, `curves.png`.

    Args:
        results: what `icf.engine.evaluate.evaluate` returns.
        samples: clips to show, in this order.
        classes: their names with background, or none for binary masks.
        history: `metrics.json` of the run, see `curves`.
    Returns:
        The path of `report.html`.
    """
    plot = curves(history) if history and history.get("steps") else None
    if plot:
        write_atomic(out / "curves.png", lambda path: path.write_bytes(plot))
    if samples:
        sheet = contact_sheet(samples, classes)
        write_atomic(out / "overlays.jpg", partial(sheet.save, format="JPEG", quality=90))
    html = page(results, samples, classes, plot)
    write_atomic(out / "report.html", lambda path: path.write_text(html, encoding="utf-8"))
    return out / "report.html"


def page(results: dict, samples: Sequence[Sample], classes: Sequence[str] = (), plot: bytes | None = None) -> str:
    """The text of `report.html`."""
    settings = {**results["counts"], **results["settings"]}
    return render(
        "report.html", results=results, modes=modes_named(results["default_modes"]), cards=_cards(results),
        scores=score_sections(results),
        groups=group_table(results), negatives=negative_table(results), plot=plot, classes=classes,
        class_keys=[key for key in results["classes"][0] if key != "class"] if results["classes"] else [],
        class_rows=_class_rows(results["classes"]), legend=legend(samples, classes),
        samples=[(sample, strips(sample, classes)) for sample in samples],
        settings=[(key, _text(value)) for key, value in settings.items()])


def _cards(results: dict) -> list[tuple[str, float | None, str]]:
    """What stands first: name, value, remark."""
    modes = results["default_modes"]
    cards = [("J&F", results["J&F"], "mean of both"), ("J", results["J"], mode_words(modes["J"].removeprefix("J/"))),
             ("F", results["F"], mode_words(modes["F"].removeprefix("F/")))]
    if "shuffled" in results["negatives"]:
        cards.append(("J, sound shuffled", results["negatives"]["shuffled"]["J"], "on the original labels"))
    false = {kind: scores["FPR"] for kind, scores in results["negatives"].items() if kind != "shuffled"}
    if false:
        worst = max(false, key=false.get)
        cards.append(("False positives", false[worst], f"share of pixels, {worst}"))
    if "gap" in results:
        cards.append(("Bias gap of J", results["gap"]["J"], "aligned less conflicting"))
    return cards


def _class_rows(rows: Sequence[dict]) -> list[dict]:
    """Classes with the worst J first; classes that never count come last."""
    ordered = sorted(rows, key=lambda row: (row.get("frames") == 0, row["J"] is None, row["J"] or 0))
    return [{key: int(value) if key.endswith(("frames", "pixels")) else value for key, value in row.items()}
            for row in ordered]


def _text(value: object) -> str:
    """A setting."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else format_value(value)
