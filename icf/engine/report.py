"""The report of an evaluation: one page that holds everything inside itself, and reads in light and in dark."""
from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
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
    html = page(results, samples, classes, plot, out.resolve().name)
    write_atomic(out / "report.html", lambda path: path.write_text(html, encoding="utf-8"))
    return out / "report.html"


def page(results: dict, samples: Sequence[Sample], classes: Sequence[str] = (), plot: bytes | None = None,
         run: str = "") -> str:
    """The text of `report.html`; run: name of the folder."""
    settings = {**results["counts"], **results["settings"]}
    return render(
        "report.html", results=results, facts=_facts(results, run), glossary=glossary(results),
        modes=modes_named(results["default_modes"]), cards=_cards(results), scores=score_sections(results),
        groups=group_table(results), negatives=negative_table(results), plot=plot, classes=classes,
        class_keys=[key for key in results["classes"][0] if key != "class"] if results["classes"] else [],
        class_rows=_class_rows(results["classes"]), legend=legend(samples, classes),
        samples=[(sample, strips(sample, classes)) for sample in samples],
        settings=[(key, _text(value)) for key, value in settings.items()])


GLOSSARY = {
    "J": "Intersection over union of the predicted and the labelled pixels of a frame, averaged over frames; with "
         "classes, of a frame and class. 1 is perfect.",
    "F": "Harmonic mean of precision and recall, with precision weighing more (beta^2 = 0.3), at the best threshold of "
         "a group of frames. The larger the group, the lower the number.",
    "J&F": "The mean of J and F. The weights of the best one on the validation split are kept.",
    "FDR": "False detection rate: share of the predicted pixels that are wrong.",
    "FPR": "False positives: share of the pixels that are predicted where nothing in the picture sounds. 0 is perfect.",
    "empty frames": "Share of such frames without any predicted pixel. 1 is perfect.",
    "background, strict, skip": "What J of a frame without a labelled pixel is worth: its share of pixels predicted as "
                                "background; 1 if nothing is predicted, else 0; or nothing, it is left out.",
    "per_video, batch:2, batch:4, dataset": "The group of frames that F takes one threshold for: a clip, two or four "
                                            "clips in file order, all. Published code differs in it.",
    "zero, skip (of groups)": "What F of a group without any labelled pixel is worth: 0, or nothing, it is left out.",
    "aligned, conflicting": "Clips whose most salient object is, or is not, one that sounds. A model that goes by the "
                            "picture alone fails on the conflicting ones; the bias gap is the difference.",
    "oracle": "Who knows a part of the answer and has perfect masks: of the most salient object (salience), of what is "
              "heard (audio), of all that could sound.",
    "silence, noise, offscreen, shuffled": "Sounds put in place of the clip's own: none; white noise; that of a clip "
                                           "with other classes; that of any other clip.",
    "sensitivity": "What J loses under a sound that was put in place. 0: the sound is ignored.",
    "combined": "J without forgiveness for empty frames, averaged over the true and the unheard sounds.",
}


def glossary(results: dict) -> dict[str, str]:
    """The words that a report of these results uses."""
    unused = set() if results["negatives"] else {"FPR", "empty frames", "sensitivity", "combined",
                                                 "silence, noise, offscreen, shuffled"}
    unused |= set() if "gap" in results else {"aligned, conflicting", "oracle"}
    if results["classes"] and "frames" in results["classes"][0]:
        unused |= {"background, strict, skip", "per_video, batch:2, batch:4, dataset", "zero, skip (of groups)"}
    return {word: text for word, text in GLOSSARY.items() if word not in unused}


def _facts(results: dict, run: str) -> dict[str, str]:
    """What this is a report of."""
    settings = results["settings"]
    facts = {"run": run, **{name: settings.get(name) for name in ("network", "encoders", "objective", "training seed")},
             "data": settings.get("root"), "weights": (settings.get("weights_sha256") or "")[:12],
             "icf": settings.get("icf"), "torch": settings.get("torch"), "written": f"{datetime.now():%Y-%m-%d %H:%M}"}
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


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
