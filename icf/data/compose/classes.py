"""Which class of a picture makes which sound: the built-in map, and what a file of the user's changes in it."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from icf.files import read_yaml

BUILT_IN = Path(__file__).with_name("classes.yaml")
LISTS = ("names", "sounds", "unclear", "videos")


def plain(name: str) -> str:
    """A name as names are compared: lower case, one space between words."""
    return " ".join(name.lower().replace("_", " ").split())


@dataclass(frozen=True)
class ClassMap:
    """By class, each a tuple of names or patterns; `videos` by video.

    Args:
        names: other names of the class.
        sounds: categories of sounds that the class makes.
        unclear: categories that it may have a part in: never heard while it is in sight.
        videos: classes of the objects of a video, by their numbers from 1; one stands for all.
    """

    names: dict[str, tuple[str, ...]]
    sounds: dict[str, tuple[str, ...]]
    unclear: dict[str, tuple[str, ...]]
    videos: dict[str, tuple[str, ...]]

    def class_name(self, name: str) -> str:
        """The one name of a class, whatever a data set calls it."""
        name = plain(name)
        return next((own for own, others in self.names.items() if name in others), name)

    def class_of(self, category: str) -> str:
        """The class that makes sounds of a category; the category itself where it is in no list."""
        category = plain(category)
        return next(iter(_owners(category, self.sounds)), self.class_name(category))

    def barred(self, category: str) -> frozenset[str]:
        """Classes that must not be in sight where a sound of the category comes from off the screen."""
        category = plain(category)
        return frozenset([self.class_of(category), *_owners(category, self.unclear)])


def _owners(category: str, lists: dict[str, tuple[str, ...]]) -> Iterable[str]:
    return (name for name, patterns in lists.items() if any(fnmatchcase(category, pattern) for pattern in patterns))


def read_class_map(path: Path | None = None) -> ClassMap:
    """The built-in map with the lists of a YAML file added, or in its place where the file says `replace: true`.

    Raises FileNotFoundError, or ValueError for a file that holds something else, or no sounds at all.
    """
    built_in = _read(BUILT_IN)
    if path is None:
        return ClassMap(**built_in)
    own = _read(path)
    lists = {}
    for key in LISTS:
        base = {} if own["replace"] else built_in[key]
        lists[key] = {name: (*own[key].get(name, ()), *base.get(name, ())) for name in {**own[key], **base}}
    lists["videos"] |= own["videos"]  # the objects of a video are a list that has an order
    if not any(lists["sounds"].values()):
        raise ValueError(f"classes: {path} leaves no class with sounds; expected sounds: {{class: [category, ..]}}")
    other = {name: own_name for own_name, names in lists["names"].items() for name in names}
    for key in ("sounds", "unclear"):  # a file may call a class by another of its names
        merged: dict[str, tuple[str, ...]] = {}
        for name, patterns in lists[key].items():
            merged[other.get(name, name)] = merged.get(other.get(name, name), ()) + patterns
        lists[key] = merged
    return ClassMap(**lists)


def _read(path: Path) -> dict:
    values = read_yaml(path)
    replace = values.pop("replace", False)
    if unknown := [key for key in values if key not in LISTS] or not isinstance(replace, bool):
        raise ValueError(f"classes: {path}: expected replace: true or false, and {', '.join(LISTS)}, "
                         f"got {unknown if isinstance(unknown, list) else f'replace: {replace}'}")
    for key in LISTS:
        lists = values.get(key)
        lists = {} if lists is None else lists
        if not isinstance(lists, dict) or not all(
                isinstance(name, str) and isinstance(items, list) and all(isinstance(item, str) for item in items)
                for name, items in lists.items()):
            raise ValueError(f"classes: {path}: expected {key} to be lists of names by name")
        values[key] = {name if key == "videos" else plain(name): tuple(map(plain, items))
                       for name, items in lists.items()}
    return values if path == BUILT_IN else {"replace": replace, **values}
