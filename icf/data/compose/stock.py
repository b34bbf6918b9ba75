"""What can be composed: every picture and sound that can be used, shared out among the splits."""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from icf.data.avsbench import SPLITS
from icf.data.compose import pictures, sounds
from icf.data.compose.classes import ClassMap
from icf.data.compose.pictures import Picture, Seen
from icf.data.compose.plan import IN_SIGHT, Scene, Stock, objects_of
from icf.data.compose.sounds import Sound, reasons
from icf.data.compose.split import assign, order, without_duplicates

if TYPE_CHECKING:
    from icf.config import ComposeConfig

DUPLICATE = "near-duplicate of one in another split"
OPENED = 20_000  # pictures at most whose content only their files tell
SPARE = 3  # pictures that are opened for each clip, where their content is known before
TAKES = 8  # sounds that are opened for each clip of a split, shared out among the categories

Run = Callable[[Callable, list, str], Iterable]
"""Maps a function over items in parallel, in their order, under a title."""


@dataclass
class Materials:
    """Args: stocks: by split; classes: that sound in some split; left_out: of pictures and sounds, by reason."""

    stocks: dict[str, Stock]
    classes: list[str]
    left_out: dict[str, Counter]


def gather(config: ComposeConfig, class_map: ClassMap, run: Run) -> Materials:
    """Find pictures and sounds, open them, and share them out. Raises FileNotFoundError or ValueError, in one line,
    for what is wrong with all of them."""
    left_out = {"pictures": Counter(), "sounds": Counter()}
    photos = pictures.find_pictures(Path(config.pictures).absolute(), class_map, left_out["pictures"])
    found = sounds.find_sounds(Path(config.sounds).absolute(), left_out["sounds"])
    wanted = tuple(count > 0 for count in config.clips)
    _require_match(photos, found, class_map)

    stocks = {split: Stock() for split in SPLITS}
    by_split = _open_sounds(found, config, left_out["sounds"], run)
    for split, kept in by_split.items():
        for sound in kept:
            stocks[split].categories[sound.category].append(sound)
    if not any(by_split.values()):
        raise ValueError(f"sounds: none of {len(found)} in {config.sounds} can be used: {reasons(left_out['sounds'])}")

    audible = {split: {class_map.class_of(category) for category in stocks[split].categories} for split in SPLITS}
    seen = _open_pictures(photos, set().union(*audible.values()), config, left_out["pictures"], run)
    if not seen:
        raise ValueError(f"pictures: none of {len(photos)} in {config.pictures} can be used: "
                         f"{reasons(left_out['pictures'])}")
    for split, scenes in _share_out(seen, config.seed, wanted, left_out["pictures"]).items():
        for picture, view in scenes:
            objects = objects_of(view)
            able = tuple(name for name in objects if name in audible[split])
            stocks[split].scenes.append(Scene(picture, view, objects, able))
    for split, count in zip(SPLITS, config.clips, strict=True):
        if count and not any(scene.able for scene in stocks[split].scenes):
            raise ValueError(f"clips: no picture of the {split} split shows a class that its sounds are of: there are "
                             f"{len(stocks[split].scenes)} pictures and {len(by_split[split])} sounds; "
                             "give more of them, or no clips to this split")
    classes = sorted({name for stock in stocks.values() for scene in stock.scenes for name in scene.able})
    return Materials(stocks, classes, left_out)


def _require_match(photos: list[Picture], found: list[Sound], class_map: ClassMap) -> None:
    """Raise ValueError where no class of the pictures has a sound."""
    shown = {name for picture in photos for name in picture.classes}
    heard = {sound.category for sound in found}
    if not shown & {class_map.class_of(category) for category in heard}:
        raise ValueError(f"classes: no class of the pictures makes one of the sounds; the classes are "
                         f"{_some(shown)}, the categories {_some(heard)}; --classes FILE.yaml tells which belong "
                         "together")


def _some(names: Iterable[str], most: int = 8) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _open_sounds(found: list[Sound], config: ComposeConfig, left_out: Counter, run: Run) -> dict[str, list[Sound]]:
    """The sounds of every split that can be used, of large data sets some of them."""
    seed, categories = config.seed, len({sound.category for sound in found})
    most = {split: count and max(4, -(-TAKES * count // categories))
            for split, count in zip(SPLITS, config.clips, strict=True)}
    split_of = assign(((sound.category, _recording(sound)) for sound in found), seed)
    groups: dict[tuple[str, str], list[Sound]] = defaultdict(list)
    for sound in sorted(found, key=lambda sound: order(seed, f"{_recording(sound)} {sound.path.name} {sound.start}")):
        groups[split_of[_recording(sound)], sound.category].append(sound)
    asked = [sound for key in sorted(groups) for sound in groups[key][:most[key[0]]]]
    usable = list(_usable(asked, run(sounds.examine, asked, "opening sounds"), left_out))
    by_split = {split: [pair for pair in usable if split_of[_recording(pair[0])] == split] for split in SPLITS}
    kept = without_duplicates({split: [print for _, print in pairs] for split, pairs in by_split.items()})
    left_out.update(DUPLICATE for flags in kept.values() for stays in flags if not stays)
    return {split: [sound for (sound, _), stays in zip(pairs, kept[split], strict=True) if stays]
            for split, pairs in by_split.items()}


def _recording(sound: Sound) -> str:
    return f"{sound.source} {sound.recording}"


def _usable(items: list, results: Iterable, left_out: Counter) -> Iterator[tuple]:
    for item, result in zip(items, results, strict=True):
        if isinstance(result, str):
            left_out[result] += 1
        else:
            yield item, result


def _open_pictures(photos: list[Picture], audible: set[str], config: ComposeConfig, left_out: Counter,
                   run: Run) -> list[tuple[Picture, Seen]]:
    """The pictures in which something can sound. Where it is known before what they show, those are opened first that
    show more of it."""
    promise = {}
    for picture in photos:
        known = picture.known
        promise[_key(picture)] = sum(name in audible and area >= IN_SIGHT for name, area in known.items()) if known \
            else None
    asked = sorted((picture for picture in photos if promise[_key(picture)] != 0),
                   key=lambda picture: (-min(promise[_key(picture)] or 0, 2), order(config.seed, _key(picture))))
    known = sum(promise[_key(picture)] is not None for picture in asked)
    left_out.update(["without a class that can sound"] * (len(photos) - len(asked)))
    asked = asked[:min(known, SPARE * sum(config.clips))] + asked[known:][:OPENED]
    seen = []
    for picture, view in _usable(asked, run(pictures.examine, asked, "opening pictures"), left_out):
        if audible & {*objects_of(view)}:
            seen.append((picture, view))
        else:
            left_out["without a class that can sound"] += 1
    return seen


def _share_out(seen: list[tuple[Picture, Seen]], seed: int, wanted: tuple[bool, ...],
               left_out: Counter) -> dict[str, list[tuple[Picture, Seen]]]:
    split_of = assign(((tuple(sorted(objects_of(view))), _key(picture)) for picture, view in seen), seed, wanted)
    seen = sorted(seen, key=lambda pair: order(seed, _key(pair[0])))
    by_split = {split: [pair for pair in seen if split_of[_key(pair[0])] == split] for split in SPLITS}
    kept = without_duplicates({split: [[view.print, view.mirrored] for _, view in pairs]
                               for split, pairs in by_split.items()})
    left_out.update(DUPLICATE for flags in kept.values() for stays in flags if not stays)
    return {split: [pair for pair, stays in zip(pairs, kept[split], strict=True) if stays]
            for split, pairs in by_split.items()}


def _key(picture: Picture) -> str:
    return f"{picture.source} {picture.name}"
