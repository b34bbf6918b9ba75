"""What is drawn and written from results: the table of scores, overlays, curves, and a page that needs no server.

`report.html` holds everything inside itself (styles, pictures as data URIs, no script) and reads in light and in dark.
matplotlib is imported where it draws, with a canvas of its own, so that no window system and no global state is used.
"""
from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Group
from rich.table import Table
from torch import Tensor

from icf.data.avsbench import class_palette
from icf.files import write_atomic

TRUTH = (38, 166, 154)                                                   # RGB of a binary truth
RIGHT, FALSE, MISSED = (38, 166, 154), (239, 83, 80), (92, 145, 255)     # RGB of a binary prediction's pixels
THUMB = 160                                                              # side of a frame in the pictures, pixels
DIM = 0.5                                                                # of a picture outside its mask
SILENCE, LOUD = -4.605, 4.0                                              # range of the log-mel picture
INK = "#808a96"                                                          # of curves; readable on white and on black


@dataclass
class Sample:
    """A clip with what was predicted for it; only its real frames.

    Args:
        frames: [T,3,H,W] uint8.
        log_mel: [T,1,96,64].
        truth: [T,H,W] uint8, 0/1 or class index, 255 ignored; meaningful where `labelled` [T].
        prediction: [T,H,W] uint8, 0/1 or class index.
        rank: `worst` or `best`.
    """

    name: str
    frames: Tensor
    log_mel: Tensor
    truth: Tensor
    labelled: Tensor
    prediction: Tensor
    j: float
    f: float | None
    rank: str
    groups: Sequence[str] = ()


# Scores as rows


def score_sections(results: dict) -> list[tuple[str, str, list[tuple[str, str, float | None, str]]]]:
    """Sections (title, remark, rows) of scores; a row is (score, mode, value, who reports it so)."""
    scores = results["scores"]
    rows = _semantic_rows(scores["AVSS"]) if "AVSS" in scores else _binary_rows(scores["J"], scores["F"])
    sections = [("Comparable with published numbers", "As the named code reports them.", rows[0]),
                ("Other modes", "Where the modes above are lenient, and other ways to average.", rows[1])]
    if "AVSS" in scores:
        forgiving = next(key for key in scores if key.startswith("AVSS, "))
        sections[1][2].extend(
            [*((key, f"{_mode('all/real/include')}; predictions of {forgiving.removeprefix('AVSS, ')}",
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
    who = {"all/padded/include": "AVSBench, AVSegFormer", "all/real/include": "COMBO", "all/real/public": "AVSBench"}
    other = ("all/real/exclude", "seen/real/include", "seen/real/exclude")
    public = [(key, _mode(mode), scores[f"{key}/{mode}"], name) for mode, name in who.items() for key in "JF"]
    return public, [(key, _mode(mode), scores[f"{key}/{mode}"], "") for key in "JF" for mode in other]


def _mode(mode: str) -> str:
    """A mode of AVSS in words; others as they are."""
    return ", ".join(WORDS.get(word, word) for word in mode.split("/"))


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
    for title, rows in (("group", _group_rows(results)), ("sound", _negative_rows(results))):
        if rows:
            columns = list(next(iter(rows.values())))
            table = Table(title, *columns)
            for name, row in rows.items():
                table.add_row(name, *(format_value(row.get(key)) for key in columns))
            tables.append(table)
    return Group(*tables)


def _group_rows(results: dict) -> dict[str, dict]:
    rows = {name: {"clips": group["clips"], **{key: group[key] for key in ("J", "F", "J&F")}}
            for name, group in results["groups"].items()}
    if "gap" in results:
        rows["aligned - conflicting"] = {"clips": "", **results["gap"]}
    for name, oracle in results.get("oracles", {}).items():
        rows[f"oracle: {name}"] = {"clips": results["counts"]["clips"], "J": oracle["J"]}
    return rows


def _negative_rows(results: dict) -> dict[str, dict]:
    names = {"FPR": "FPR", "strict": "empty frames", "J": "J", "F": "F", "sensitivity": "sensitivity",
             "change": "change of p"}
    return {kind: {names[key]: scores[key] for key in names} for kind, scores in results["negatives"].items()}


def format_value(value) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


# Pictures


def overlay(frame: Tensor | np.ndarray, mask: Tensor | np.ndarray, color: Sequence, alpha: float = 0.5,
            dim: float = 0.0) -> Image.Image:
    """A frame with a mask laid over it, its outline solid.

    Args:
        frame: [3,H,W] or [H,W,3], uint8 RGB.
        mask: [H,W], bool or 0/1 for one colour, or indices into `color`; 0 is left clear, and so is 255.
        color: RGB of the mask, or [C,3] one per index (that of 0 is not used).
        alpha: opacity inside the outline.
        dim: how much the picture is darkened where the mask is clear, 0 to 1.
    """
    picture, mask = np.asarray(frame, dtype=np.float32), np.asarray(mask, dtype=np.int64)
    if picture.shape[0] == 3 and picture.shape[-1] != 3:
        picture = picture.transpose(1, 2, 0)
    if picture.shape != (*mask.shape, 3):
        raise ValueError(f"overlay: expected frame [3,H,W] or [H,W,3] and mask [H,W] of one size, got "
                         f"{np.shape(frame)} and {mask.shape}")
    colors = np.asarray(color, dtype=np.float32)
    colors = np.stack([colors, colors]) if colors.ndim == 1 else colors
    mask = np.where(mask == 255, 0, mask)
    inside = mask > 0
    edge = np.pad(mask, 1, mode="edge")
    outline = inside & ((edge[:-2, 1:-1] != mask) | (edge[2:, 1:-1] != mask)
                        | (edge[1:-1, :-2] != mask) | (edge[1:-1, 2:] != mask))
    weight = np.where(outline, 1.0, np.where(inside, alpha, 0.0))[..., None]
    picture = picture * np.where(inside, 1.0, 1.0 - dim)[..., None]
    return Image.fromarray((picture * (1 - weight) + colors[mask] * weight).round().astype(np.uint8))


def class_colors(classes: int) -> np.ndarray:
    """Colours [classes,3] uint8 of AVSBench, lightened for pictures."""
    return (64 + 0.75 * class_palette(classes)).astype(np.uint8)


def mel_picture(log_mel: Tensor) -> Image.Image:
    """The log-mel examples [T,1,96,64] of a clip in a row, low frequencies at the bottom, a line at every second."""
    from matplotlib import colormaps

    bands = np.asarray(log_mel, dtype=np.float32).reshape(-1, log_mel.shape[-1]).T[::-1]      # [64, 96 T]
    level = np.clip((bands - SILENCE) / (LOUD - SILENCE), 0, 1)
    picture = (colormaps["magma"](level)[..., :3] * 255).astype(np.uint8)
    picture[:, log_mel.shape[2]::log_mel.shape[2]] = 120
    return Image.fromarray(picture)


def strips(sample: Sample, classes: Sequence[str]) -> dict[str, Image.Image]:
    """Pictures of all seconds side by side: `frames`, `truth`, `prediction`, and `sound` of the same width.

    A binary prediction is coloured by what is right, false and missed.
    """
    truth, known = sample.truth.numpy(), sample.labelled.numpy()[:, None, None]
    prediction, shown_colors = sample.prediction.numpy(), class_colors(len(classes))
    truth_colors = shown_colors
    if not classes:
        truth_colors, shown_colors = TRUTH, ((0, 0, 0), RIGHT, FALSE, MISSED)
        prediction = np.select([(prediction == 1) & ((truth == 1) | ~known), (prediction == 1) & (truth == 0),
                                (prediction == 0) & (truth == 1) & known], [1, 2, 3], 0)
    rows = {"frames": (truth * 0, TRUTH, 0.0), "truth": (truth * known, truth_colors, DIM),
            "prediction": (prediction, shown_colors, DIM)}
    pictures = {name: _side_by_side([overlay(frame, mask, colors, dim=dim) for frame, mask in
                                     zip(sample.frames, masks, strict=True)])
                for name, (masks, colors, dim) in rows.items()}
    sound = mel_picture(sample.log_mel).resize((pictures["frames"].width, 72), Image.Resampling.BILINEAR)
    return {**pictures, "sound": sound}


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (len(images) * (THUMB + 4) - 4, THUMB), (128, 128, 128))
    for place, image in enumerate(images):
        sheet.paste(image.resize((THUMB, THUMB), Image.Resampling.LANCZOS), (place * (THUMB + 4), 0))
    return sheet


def contact_sheet(samples: Sequence[Sample], classes: Sequence[str] = ()) -> Image.Image:
    """One picture of several clips: name and scores, then frames, truth, prediction and sound."""
    margin, font = 12, ImageFont.load_default(14)
    blocks = [(sample, list(strips(sample, classes).values())) for sample in samples]
    heights = [24 + sum(image.height + 4 for image in images) + margin for _, images in blocks]
    width = max((image.width for _, images in blocks for image in images), default=THUMB) + 2 * margin
    sheet = Image.new("RGB", (width, sum(heights) + margin), (255, 255, 255))
    draw, top = ImageDraw.Draw(sheet), margin
    for (sample, images), height in zip(blocks, heights, strict=True):
        draw.text((margin, top), f"{sample.name}   {_scores(sample)}", fill=(40, 44, 52), font=font)
        below = top + 24
        for image in images:
            sheet.paste(image, (margin, below))
            below += image.height + 4
        top += height
    return sheet


def curves(history: dict) -> bytes:
    """Training curves as PNG: losses by step, the learning rate, and J and F of the validation split.

    Args:
        history: `metrics.json` of a run: `steps` [{step, loss, lr, ...}], `evaluations` [{step, J, F, ...}].
    """
    from matplotlib.figure import Figure

    steps, evaluations = history.get("steps", []), history.get("evaluations", [])
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    terms = [key for key in steps[0] if key not in ("step", "lr")] if steps else []
    for rank, key in enumerate(terms):
        values = np.array([row.get(key, np.nan) for row in steps], dtype=float)
        axes[0].plot([row["step"] for row in steps], _smooth(values), label=key, lw=2 if key == "loss" else 1,
                     color=f"C{rank}", zorder=3 if key == "loss" else 2)
    axes[1].plot([row["step"] for row in steps], [row["lr"] for row in steps], color="C4")
    for key in ("J", "F"):
        axes[2].plot([row["step"] for row in evaluations], [row[key] for row in evaluations], "o-", ms=3, label=key)
    for axis, title in zip(axes, ("loss, smoothed", "learning rate", "validation"), strict=True):
        tint(axis, title, "step")
        axis.grid(alpha=0.25, color=INK)
        if axis.get_legend_handles_labels()[0]:
            beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if axis is axes[0] else {}  # terms may be many
            axis.legend(fontsize=7, frameon=False, labelcolor=INK, **beside)
    if any(value > 0 for row in steps for value in [row["loss"]]):
        axes[0].set_yscale("log")
    return png(figure)


def tint(axis, title: str, label: str) -> None:
    """Give an axis of matplotlib its title, the label below it, and colours that suit light and dark pages."""
    axis.set_title(title, color=INK, fontsize=10)
    axis.set_xlabel(label, color=INK, fontsize=9)
    axis.tick_params(colors=INK, labelsize=8)
    axis.set_facecolor("none")
    for spine in axis.spines.values():
        spine.set_color(INK)
        spine.set_alpha(0.4)


def png(figure) -> bytes:
    """A figure of matplotlib as PNG, its background clear."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.patch.set_alpha(0)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over the last n/20 values."""
    window = max(len(values) // 20, 1)
    padded = np.concatenate([np.full(window - 1, values[0]), values]) if len(values) else values
    return np.convolve(padded, np.full(window, 1 / window), mode="valid") if len(values) else values


# The page


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
    counts, title = results["counts"], f"{results['subset'].upper()} {results['split']}"
    header = ("score", "mode", "value", "reported by")
    scores = "".join(f"<h3>{escape(name)}</h3>{note(remark)}{html_table(header, rows, 'scores')}"
                     for name, remark, rows in score_sections(results))
    parts = [_cards(results), section("Scores", scores)]
    if groups := _group_rows(results):
        parts.append(section("Groups", _columns("group", groups)))
    if negatives := _negative_rows(results):
        parts.append(section("Sound replaced", note(NEGATIVES) + _columns("sound", negatives)))
    if plot:
        parts.append(section("Training", f'<img class=plot alt="training curves" src="{png_uri(plot)}">'))
    if results["classes"]:
        parts.append(section("Classes" if classes else "Categories", _class_table(results["classes"])))
    if samples:
        clips = "".join(_clip(sample, classes) for sample in samples)
        parts.append(section("Clips", legend(samples, classes) + clips))
    settings = {**counts, **results["settings"]}
    rows = [(key, _text(settings[key])) for key in settings]
    parts.append(section("Settings", html_table(("setting", "value"), rows)))
    return document(title, f"{title}, {counts['clips']} clips, {counts['scored_frames']} scored frames at "
                           f"{results['settings']['resolution']} pixels", parts)


def document(title: str, subtitle: str, parts: Sequence[str], style: str = "") -> str:
    """A whole page of finished parts, with `style` after the common one."""
    return (f'<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width, '
            f'initial-scale=1"><title>icf: {escape(title)}</title><style>{STYLE}{style}</style></head><body><header>'
            f"<h1>Audio-visual segmentation</h1><p>{escape(subtitle)}</p></header><main>{''.join(parts)}</main>"
            "</body></html>\n")


def note(text: str) -> str:
    return f"<p class=note>{escape(text)}</p>"


def _text(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else format_value(value)


def _cards(results: dict) -> str:
    modes = results["default_modes"]
    cards = [("J&F", results["J&F"], "mean of both"), ("J", results["J"], _mode(modes["J"].removeprefix("J/"))),
             ("F", results["F"], _mode(modes["F"].removeprefix("F/")))]
    if "shuffled" in results["negatives"]:
        cards.append(("J, sound shuffled", results["negatives"]["shuffled"]["J"], "on the original labels"))
    false = {kind: scores["FPR"] for kind, scores in results["negatives"].items() if kind != "shuffled"}
    if false:
        worst = max(false, key=false.get)
        cards.append(("False positives", false[worst], f"share of pixels, {worst}"))
    if "gap" in results:
        cards.append(("Bias gap of J", results["gap"]["J"], "aligned less conflicting"))
    return "<section class=cards>" + "".join(
        f"<div class=card><span>{escape(name)}</span><strong>{format_value(value)}</strong>"
        f"<small>{escape(mode)}</small></div>" for name, value, mode in cards) + "</section>"


def section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def html_table(header: Sequence[str], rows: Sequence[Sequence], style: str = "") -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    return f'<div class=scroll><table class="{style}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _columns(first: str, rows: dict[str, dict]) -> str:
    columns = list(next(iter(rows.values())))
    return html_table((first, *columns), [(name, *(row.get(key) for key in columns)) for name, row in rows.items()])


def _cell(value) -> str:
    number = value is None or isinstance(value, (int, float))
    return f"<td{' class=num' if number else ''}>{escape(format_value(value))}</td>"


def _class_table(rows: Sequence[dict]) -> str:
    """Classes with a bar for J, the worst first; classes that never count come last."""
    ordered = sorted(rows, key=lambda row: (row.get("frames") == 0, row["J"] is None, row["J"] or 0))
    keys = [key for key in rows[0] if key != "class"]
    head = "".join(f"<th>{escape(key)}</th>" for key in ("class", "", *keys))
    body = ""
    for row in ordered:
        cells = "".join(_cell(int(row[key]) if key.endswith(("frames", "pixels")) else row[key]) for key in keys)
        bar = f"<td class=bar><i style='width:{100 * (row['J'] or 0):.1f}%'></i></td>"
        body += f"<tr><td>{escape(row['class'])}</td>{bar}{cells}</tr>"
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def legend(samples: Sequence[Sample], classes: Sequence[str]) -> str:
    if classes:
        palette = class_colors(len(classes))
        shown = sorted({int(c) for sample in samples for mask in (sample.truth, sample.prediction)
                        for c in mask.unique() if 0 < c < len(classes)})
        entries = [(classes[c], tuple(palette[c])) for c in shown]
    else:
        entries = [("truth, or right", RIGHT), ("false", FALSE), ("missed", MISSED)]
    return "<p class=legend>" + "".join(f"<span><i style='background:rgb({r},{g},{b})'></i>{escape(name)}</span>"
                                        for name, (r, g, b) in entries) + "</p>"


def _clip(sample: Sample, classes: Sequence[str]) -> str:
    pictures = "".join(f"<div class=strip><span>{name}</span><img loading=lazy alt='{name} of {escape(sample.name)}' "
                       f"src='{jpeg_uri(image)}'></div>" for name, image in strips(sample, classes).items())
    tags = "".join(f"<b class={tag}>{escape(tag)}</b>" for tag in (sample.rank, *sample.groups))
    return f"<article><h3>{escape(sample.name)} {tags}<em>{_scores(sample)}</em></h3>{pictures}</article>"


def _scores(sample: Sample) -> str:
    return f"J {format_value(sample.j)}  F {format_value(sample.f)}"


def png_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def jpeg_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


PIXELS = {"zero": "absent classes: zero", "seen": "absent classes: skip", "foreground": "without background"}
WORDS = {"all": "all classes", "seen": "classes that occur", "real": "real frames", "padded": "padding too",
         "include": "with background", "exclude": "without background", "public": "without the last class (sic)"}
NEGATIVES = ("The frames stay, the sound is exchanged. Under silence, noise and off-screen sound every predicted pixel "
             "is false: FPR is their share (ideal 0), empty frames the share of frames without any. J and F are on the "
             "original labels. Sensitivity is what J loses; 0 means that the sound is ignored. Change of p is the mean "
             "absolute change of the prediction.")
STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1c2430;--soft:#5d6875;--line:#e2e6eb;--accent:#0f8b7e}
@media(prefers-color-scheme:dark){:root{--bg:#12161c;--card:#1a2029;--ink:#e6eaf0;--soft:#98a3b1;--line:#2b333f;
--accent:#3cc7b5}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main{max-width:1080px;margin:0 auto;padding:0 20px}
header{padding-top:36px}
h1{margin:0;font-size:26px;letter-spacing:-.01em}
header p,.note{color:var(--soft);margin:.2em 0 .8em}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 22px;margin:18px 0}
h2{margin:0 0 10px;font-size:18px}
h3{margin:16px 0 2px;font-size:15px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:14px;background:none;border:0;padding:0}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 16px;display:flex;
flex-direction:column}
.card span,.card small{color:var(--soft);font-size:13px}
.card strong{font-size:26px;font-variant-numeric:tabular-nums;line-height:1.35}
.card:first-child strong{color:var(--accent)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
th{font-weight:600;color:var(--soft);text-align:left}
th,td{padding:5px 12px 5px 0;border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:anywhere}
tr:last-child td{border-bottom:0}
.scores th:nth-child(1){width:11%}.scores th:nth-child(2){width:48%}.scores th:nth-child(3){width:13%}
.scores{table-layout:fixed;min-width:560px}
.num{font-variant-numeric:tabular-nums;white-space:nowrap}
.bar{width:120px;min-width:80px}
.bar i{display:block;height:8px;margin-top:7px;border-radius:4px;background:var(--accent)}
.plot{width:100%}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;color:var(--soft);font-size:13px;margin:0}
.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}
article{border-top:1px solid var(--line);padding:10px 0 14px}
article:first-of-type{border-top:0}
article h3{margin:4px 0 8px;overflow-wrap:anywhere}
article em{float:right;font-style:normal;font-weight:400;color:var(--soft);font-variant-numeric:tabular-nums}
article b{font-size:11px;font-weight:600;border-radius:9px;padding:2px 8px;margin-left:6px;border:1px solid var(--line);
color:var(--soft)}
article b.worst{color:#d9534f}article b.best{color:var(--accent)}
.strip{display:grid;grid-template-columns:78px 1fr;align-items:center;margin:3px 0}
.strip span{color:var(--soft);font-size:12px}
.strip img{width:100%;border-radius:4px;display:block}
@media print{section{break-inside:avoid}}
"""
