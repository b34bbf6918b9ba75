"""One clip, file by file."""
from __future__ import annotations

import hashlib
from pathlib import Path

from PIL import ImageOps

from icf.data.avsbench import Record, open_picture, stored_turned
from icf.data.check.findings import Clip, reason, relative
from icf.data.check.labels import check_colours, check_label
from icf.data.check.layout import LABELS, coloured_path
from icf.data.check.sounds import check_log_mel, check_sound
from icf.data.transforms import to_rgb

SIDE = 224  # pixels of S4's and MS3's frames


def examine(record: Record, folder: Path, subset: str, classes: list[str], deep: bool, manifest: dict) -> Clip:
    """`manifest`: what a benchmark that was made here says of itself."""
    clip, size = Clip(quirk="note" if manifest["clips"] else "warning"), manifest["settings"].get("size")
    side = None if subset not in ("s4", "ms3") else size if isinstance(size, int) else SIDE

    def present(path: Path, check: str, level: str = "error") -> bool:
        if not path.is_file():
            elsewhere = [label for label in LABELS if (folder / label / record.sound.parent.name).is_dir()]
            hint = f"missing; the clip is in {elsewhere[0]}" if subset == "avss" and elsewhere and \
                record.source not in elsewhere else "missing"
            clip.add(check, level, relative(path, folder), hint)
        return path.is_file()

    sizes = [_frame(path, folder, side, deep, clip) if present(path, "files") else None for path in record.frames]
    for frame, path in zip(sizes, record.masks[:record.labelled], strict=False):
        if path is not None and present(path, "files"):
            size, values = check_label(path, record, folder, classes, deep, clip, manifest["void"])
            if size and frame and size != frame:
                level = "warning" if side else "error"  # where both are squeezed into a square, they still match
                clip.add("labels", level, relative(path, folder), f"is {size[0]}x{size[1]}, its frame "
                                                                  f"{frame[0]}x{frame[1]}")
            if subset == "avss" and present(coloured_path(path), "colours", "warning") and values is not None:
                check_colours(coloured_path(path), values, folder, len(classes), clip)
    if present(record.sound, "files"):
        check_sound(record, folder, deep, clip)
    if record.log_mel is not None and record.log_mel.is_file():
        clip.counts["log-mel files"] += 1
        if deep:
            check_log_mel(record, folder, clip)
    return clip


def _frame(path: Path, folder: Path, side: int | None, deep: bool, clip: Clip) -> tuple[int, int] | None:
    """Width and height, or None for a broken file. `side`: expected of both, if anything is."""
    where = relative(path, folder)
    try:
        with open_picture(path, upright=False) as image:
            if stored_turned(image):
                clip.add("frames", "warning", where, "is stored turned (EXIF); it is read as it is shown, which its "
                         "label has to fit")
                ImageOps.exif_transpose(image, in_place=True)
            if deep:
                image.load()
                clip.first = clip.first or hashlib.sha256(to_rgb(image).tobytes()).hexdigest()
            size, mode = image.size, image.mode
    except ValueError as error:
        clip.add("frames", "error", where, reason(error))
        return None
    clip.counts["frames"] += 1
    if mode != "RGB":
        clip.add("frames", "warning", where, f"has mode {mode}, expected RGB")
    if side and size != (side, side):
        clip.add("frames", "warning", where, f"is {size[0]}x{size[1]}, expected {side}x{side}")
    return size
