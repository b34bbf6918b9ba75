"""Which clips are composed: from which picture, and what sounds in them."""
from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from icf.data.avsbench import SPLITS
from icf.data.compose.classes import ClassMap
from icf.data.compose.pictures import Picture, Seen
from icf.data.compose.sounds import Sound

IN_SIGHT = 0.02  # least share of the picture of a class that is said to be in sight
BOTH = 0.25  # share of the clips of two sounding classes or more in which two sound
OFF_SCREEN = 0.2  # share of clips with a sound from off the screen
STRANGE = 0.5  # share of these whose sound is of no class of any picture


@dataclass(frozen=True)
class Scene:
    """A picture, and which of its objects stands out and which can sound.

    Args:
        objects: classes in sight, the largest single object first.
        able: those of which the split has sounds.
    """

    picture: Picture
    seen: Seen
    objects: tuple[str, ...]
    able: tuple[str, ...]

    @property
    def salient(self) -> str:
        return self.objects[0]


@dataclass(frozen=True)
class Task:
    """A clip to be composed.

    Args:
        seed: of all that is random in it, and nothing else is.
        sounds: the class and the sound of what sounds.
        off_screen: sounds from off the screen.
    """

    name: str
    split: str
    seed: tuple[int, ...]
    scene: Scene
    sounds: tuple[tuple[str, Sound], ...]
    off_screen: tuple[Sound, ...]

    @property
    def aligned(self) -> bool:
        return self.scene.salient in dict(self.sounds)


@dataclass
class Stock:
    """What a split is composed of: scenes, and the sounds of every category."""

    scenes: list[Scene] = field(default_factory=list)
    categories: dict[str, list[Sound]] = field(default_factory=lambda: defaultdict(list))


def objects_of(seen: Seen) -> tuple[str, ...]:
    """Classes in sight, the one with the largest single object first."""
    names = [name for name, area in seen.area.items() if area >= IN_SIGHT]
    return tuple(sorted(names, key=lambda name: (-seen.largest[name], name)))


def plan(stock: Stock, split: str, count: int, bias: float, single: bool, seed: int, classes: ClassMap) -> list[Task]:
    """The clips of a split.

    Args:
        stock: its scenes and sounds.
        count: of clips.
        bias: probability that the most salient object sounds in a training clip of two objects or more; in other
            splits it is one by the number of objects.
        single: one object sounds throughout, and nothing off the screen.
        seed: of the choice.
        classes: which class makes which sound.
    """
    by_class: dict[str, list[str]] = defaultdict(list)
    for category in sorted(stock.categories):
        by_class[classes.class_of(category)].append(category)
    visible = {name for scene in stock.scenes for name in scene.seen.area}
    strange = [category for name, own in by_class.items() if name not in visible for category in own]
    tasks = []
    for index, (scene, first) in enumerate(_choose(stock.scenes, count, bias if split == "train" else None)):
        own_seed = (seed, SPLITS.index(split), index)
        rng = np.random.default_rng((*own_seed, 0))
        sounding, silent = [first], [name for name in scene.able if name not in (first, scene.salient)]
        if not single and silent and rng.random() < BOTH:
            sounding.append(silent[rng.integers(len(silent))])

        def draw(categories: Sequence[str], rng=rng) -> Sound:
            sounds = stock.categories[categories[rng.integers(len(categories))]]
            return sounds[rng.integers(len(sounds))]

        off_screen = ()
        if not single and rng.random() < OFF_SCREEN:
            others = strange if rng.random() < STRANGE and strange else sorted(stock.categories)
            free = [category for category in others if not classes.barred(category) & scene.seen.area.keys()]
            off_screen = (draw(free),) if free else ()
        sounds = tuple((name, draw(by_class[name])) for name in sounding)
        tasks.append(Task(f"composed_{split}_{index:05d}", split, own_seed, scene, sounds, off_screen))
    return tasks


def _choose(scenes: list[Scene], count: int, bias: float | None) -> Iterator[tuple[Scene, str]]:
    """Scenes, and what sounds first in each. Those of several objects come first, as long as there are enough for the
    share of clips in which the salient one sounds: before others those in which two can sound, once with each of them.
    Then those of a single object, as many of each class; then all over again."""
    scenes = [scene for scene in scenes if scene.able]
    several = sorted((scene for scene in scenes if len(scene.objects) > 1), key=lambda scene: len(scene.able) < 2)
    share = bias if bias is not None else float(np.mean([1 / len(scene.objects) for scene in several] or [1]))
    others = [[name for name in scene.able if name != scene.salient] for scene in several]
    rounds = max(map(len, others), default=0)
    queues = {True: [(scene, scene.salient) for scene in several if scene.salient in scene.able],
              False: [(scene, names[turn]) for turn in range(rounds)
                      for scene, names in zip(several, others, strict=True) if turn < len(names)]}
    singles = list(_in_turn([(scene, scene.objects[0]) for scene in scenes if len(scene.objects) == 1]))
    taken = 0
    while taken < count:
        left, before = {aligned: deque(items) for aligned, items in queues.items()}, taken
        for turn in range(count - taken):
            aligned = int((turn + 1) * share + 1e-9) > int(turn * share + 1e-9)
            if not left[aligned]:
                break
            yield left[aligned].popleft()
            taken += 1
        rest = singles if singles or taken > before else queues[True] or queues[False]
        for item in rest[:count - taken]:
            yield item
            taken += 1
        if taken == before:
            return


def _in_turn(items: list[tuple[Scene, str]]) -> Iterator[tuple[Scene, str]]:
    """The items of one class after those of another, in turn."""
    by_class: dict[str, deque] = defaultdict(deque)
    for scene, name in items:
        by_class[name].append((scene, name))
    while by_class:
        for name in list(by_class):
            yield by_class[name].popleft()
            if not by_class[name]:
                del by_class[name]


def counts(tasks: list[Task]) -> Counter:
    """How many clips show several objects, and in how many of these the salient one sounds."""
    several = [task for task in tasks if len(task.scene.objects) > 1]
    return Counter(clips=len(tasks), several=len(several), aligned=sum(task.aligned for task in several))
