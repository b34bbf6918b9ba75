"""Pictures with masks as people have them: Pascal VOC, COCO, and the videos of DAVIS."""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from icf.data import IGNORE
from icf.data.avsbench import open_picture, read_label
from icf.data.compose.classes import ClassMap
from icf.data.compose.sounds import Unusable, reasons, terms_of
from icf.data.transforms import to_rgb
from icf.files import read_json, read_text

VOC_CLASSES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
               "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
VOC, COCO, DAVIS = "Pascal VOC", "COCO", "DAVIS"
TERMS = {VOC: "terms of flickr and of the photographers: host.robots.ox.ac.uk/pascal/VOC",
         COCO: "annotations CC BY 4.0",
         DAVIS: "non-commercial research: davischallenge.org"}
FPS = 24  # pictures a second of DAVIS
SMALLEST = 32  # pixels of the short edge
HIDDEN = 0.004  # share of the picture below which a class is hardly to be seen
HASH = 16  # side of the perceptual hash
TURNED = {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_90}  # by EXIF orientation: those that exchange width and height


@dataclass(frozen=True)
class Picture:
    """A photograph, or a video of `FPS` pictures a second, with labels.

    Args:
        name: unique in its source.
        frames: files; one of a photograph.
        classes: names of the values 1, 2, .. of a label.
        terms: under which it may be used.
    """

    name: str
    frames: tuple[Path, ...]
    classes: tuple[str, ...]
    terms: str
    source = ""

    @property
    def known(self) -> dict[str, float]:
        """Share of the picture of its classes, as far as it is known without opening files."""
        return {}

    def sources(self, index: int) -> list[Path]:
        """The files that a picture and its label are read from."""
        raise NotImplementedError

    def label(self, index: int) -> tuple[NDArray, NDArray | None]:
        """Of one picture: places in `classes` from 1, 0 and `IGNORE` uint8 [H,W], and numbers of single objects [H,W]
        where they are known. Raises Unusable, FileNotFoundError or ValueError."""
        raise NotImplementedError

    def read(self, index: int = 0) -> tuple[Image.Image, NDArray, NDArray | None]:
        """One picture, RGB and upright, with its label. Raises as `label`.

        A label that has the size of the file before it is turned as its EXIF data ask is turned with it.
        """
        with open_picture(self.frames[index], upright=False) as stored:
            size, orientation = stored.size, stored.getexif().get(0x0112, 1)
            image = to_rgb(ImageOps.exif_transpose(stored))
        values, objects = self.label(index)
        if values.shape[::-1] != image.size:
            if values.shape[::-1] != size:
                raise Unusable("with a mask of another size")
            values, objects = _turn(values, orientation), None if objects is None else _turn(objects, orientation)
        if min(image.size) < SMALLEST:
            raise Unusable(f"smaller than {SMALLEST} pixels")
        return image, values, objects


def _turn(values: NDArray, orientation: int) -> NDArray:
    return np.asarray(Image.fromarray(values).transpose(TURNED[orientation]))


def find_pictures(folder: Path, classes: ClassMap, left_out: Counter) -> list[Picture]:
    """All pictures below a folder, sorted, or below the folders in it that have one of the layouts.

    Args:
        folder: of Pascal VOC (`JPEGImages/`, `SegmentationClass/`), of COCO (`annotations/instances_*.json` and
            images), of DAVIS (`JPEGImages/480p/`, `Annotations/480p/`), or a folder of such folders.
        classes: names the objects of videos, and knows the other names of classes.
        left_out: counts what is named and cannot be used, by reason.

    Raises:
        FileNotFoundError: there is no folder.
        ValueError: it has none of the layouts, a list of pictures is not as published, or pycocotools is missing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"pictures: no folder {folder}")
    for folders in [folder], sorted(path for path in folder.iterdir() if path.is_dir()):
        found = [picture for path in folders for picture in _read_layout(path, classes, left_out)]
        if found:
            return sorted(found, key=lambda picture: (picture.source, picture.name))
    if left_out:
        raise ValueError(f"pictures: none of those in {folder} can be used: {reasons(left_out)}")
    raise ValueError(f"pictures: {folder} is no Pascal VOC (JPEGImages, SegmentationClass), no COCO (annotations/"
                     "instances_*.json) and no DAVIS (JPEGImages/480p, Annotations/480p)")


def _read_layout(folder: Path, classes: ClassMap, left_out: Counter) -> Iterator[Picture]:
    if (folder / "JPEGImages").is_dir() and (folder / "SegmentationClass").is_dir():
        yield from _voc(folder, classes, left_out)
    if (folder / "JPEGImages").is_dir() and (folder / "Annotations").is_dir():
        yield from _davis(folder, classes, left_out)
    for path in sorted((folder / "annotations").glob("instances_*.json")):
        yield from _coco(folder, path, classes, left_out)


# ---- Pascal VOC ----


@dataclass(frozen=True)
class VOCPhoto(Picture):
    """Masks of palette indices: 0 background, 1 to 20 the classes, 255 void."""

    mask: Path = Path()
    objects: Path | None = None
    source = VOC

    def sources(self, index: int) -> list[Path]:
        return [*self.frames, self.mask]

    def label(self, index: int) -> tuple[NDArray, NDArray | None]:
        values = _indices(self.mask)
        if ((values > len(self.classes)) & (values != IGNORE)).any():
            raise Unusable("with a mask of unknown indices")
        objects = None if self.objects is None else _indices(self.objects)
        if objects is not None and objects.shape != values.shape:
            raise Unusable("with a mask of another size")
        return values, objects


def _indices(path: Path) -> NDArray:
    values = read_label(path)
    if values.ndim != 2 or values.dtype not in (np.uint8, np.bool_):
        raise Unusable("with a mask of colours instead of indices")
    return values.astype(np.uint8)


def _voc(folder: Path, classes: ClassMap, left_out: Counter) -> Iterator[Picture]:
    terms, names = terms_of(VOC, folder, TERMS), tuple(map(classes.class_name, VOC_CLASSES))
    lists = folder / "ImageSets/Segmentation"
    found = [path for path in (lists / "trainval.txt", lists / "train.txt", lists / "val.txt") if path.is_file()]
    listed = [line.split()[0] for path in found for line in read_text(path).splitlines() if line.strip()]
    listed = listed or [path.stem for path in (folder / "SegmentationClass").glob("*.png")]
    for name in sorted({*listed}):
        photo, mask, objects = (folder / place / f"{name}.{ending}" for place, ending in (
            ("JPEGImages", "jpg"), ("SegmentationClass", "png"), ("SegmentationObject", "png")))
        if photo.is_file() and mask.is_file():
            yield VOCPhoto(name, (photo,), names, terms, mask, objects if objects.is_file() else None)
        else:
            left_out["missing"] += 1


# ---- COCO ----


@dataclass(frozen=True)
class COCOPhoto(Picture):
    """Polygons and run lengths; crowds, in which no object is marked by itself, are void.

    Args:
        size: height and width.
        objects: place in `classes` from 1, segmentation and area; 0 for a crowd.
        listing: the file they are from.
    """

    size: tuple[int, int] = (0, 0)
    objects: tuple[tuple[int, object, float], ...] = ()
    listing: Path = Path()
    source = COCO

    @property
    def known(self) -> dict[str, float]:
        areas = Counter()
        for value, _, area in self.objects:
            if value:
                areas[self.classes[value - 1]] += area / (self.size[0] * self.size[1])
        return dict(areas)

    def sources(self, index: int) -> list[Path]:
        return [*self.frames, self.listing]

    def label(self, index: int) -> tuple[NDArray, NDArray]:
        values, objects = np.zeros(self.size, np.uint8), np.zeros(self.size, np.int32)
        smaller_last = sorted(self.objects, key=lambda item: (item[0] > 0, -item[2]))  # crowds first of all
        for number, (value, segmentation, _) in enumerate(smaller_last, start=1):
            inside = _decode(segmentation, *self.size)
            values[inside], objects[inside] = value or IGNORE, number * (value > 0)
        return values, objects


def _decode(segmentation: list | dict, height: int, width: int) -> NDArray:
    """[height,width] bool. Raises Unusable."""
    from pycocotools import mask

    try:
        if isinstance(segmentation, list):
            inside = mask.decode(mask.frPyObjects(segmentation, height, width)).any(axis=2)
        elif isinstance(segmentation["counts"], list):
            inside = mask.decode(mask.frPyObjects(segmentation, *segmentation["size"]))
        else:
            inside = mask.decode(segmentation)
    except Exception as error:  # which is all that pycocotools raises
        raise Unusable("with a segmentation that cannot be decoded") from error
    if inside.shape != (height, width):
        raise Unusable("with a mask of another size")
    return inside.astype(bool)


def _coco(folder: Path, path: Path, classes: ClassMap, left_out: Counter) -> Iterator[Picture]:
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError:
        raise ValueError(f"pictures: {path} needs pycocotools: pip install 'icf[coco]'") from None
    listing = read_json(path)
    try:
        names = {entry["id"]: classes.class_name(entry["name"]) for entry in listing["categories"]}
        licences = {entry["id"]: f"{entry.get('name', '')} {entry.get('url', '')}".strip()
                    for entry in listing.get("licenses") or []}
        images = {entry["id"]: (entry["file_name"], (int(entry["height"]), int(entry["width"])), entry.get("license"))
                  for entry in listing["images"]}
        order = tuple(sorted({*names.values()}))
        if len(order) >= IGNORE:
            raise ValueError(f"{len(order)} categories")
        objects = defaultdict(list)
        for entry in listing["annotations"]:
            value = 0 if entry.get("iscrowd") else 1 + order.index(names[entry["category_id"]])
            segmentation = _usable(entry.get("segmentation"))
            if segmentation is None:
                left_out["object without area"] += 1
            else:
                objects[entry["image_id"]].append((value, segmentation, float(entry.get("area") or 0)))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"pictures: {path}: expected images, categories and annotations of COCO "
                         f"({type(error).__name__}: {error})") from None
    split, terms = path.stem.removeprefix("instances_"), terms_of(COCO, folder, TERMS)
    places = [folder / "images" / split, folder / split, folder / "images", folder]
    for number, (file, size, licence) in sorted(images.items(), key=lambda item: str(item[0])):
        photo = next((place / file for place in places if (place / file).is_file()), None)
        if photo is None:
            left_out["missing"] += 1
        elif number not in objects:
            left_out["without objects"] += 1
        else:
            own = "; ".join(filter(None, (licences.get(licence, ""), terms)))
            yield COCOPhoto(f"{split}/{file}", (photo,), order, own, size, tuple(objects[number]), path)


def _usable(segmentation: object) -> list | dict | None:
    """Run lengths as they are, of polygons those with three corners or more; None where nothing is left."""
    if isinstance(segmentation, dict) and segmentation.get("counts") and len(segmentation.get("size") or ()) == 2:
        return segmentation
    if isinstance(segmentation, list):
        polygons = [corners for corners in segmentation if isinstance(corners, list) and len(corners) >= 6
                    and len(corners) % 2 == 0 and np.isfinite(np.asarray(corners, dtype=float)).all()
                    and len({*zip(corners[::2], corners[1::2], strict=True)}) >= 3]
        return polygons or None
    return None


# ---- DAVIS ----


@dataclass(frozen=True)
class DAVISVideo(Picture):
    """Masks of the numbers of the objects, or of 0 and 255 for all objects together (DAVIS 2016).

    Args:
        values: the value in a label of the objects 1, 2, ..; one value stands for all objects.
    """

    masks: tuple[Path, ...] = ()
    values: tuple[int, ...] = ()
    source = DAVIS

    def sources(self, index: int) -> list[Path]:
        return [self.frames[index], self.masks[index]]

    def label(self, index: int) -> tuple[NDArray, NDArray | None]:
        numbers = _indices(self.masks[index])
        single = len(self.classes) == 1
        if numbers.max(initial=0) == IGNORE and not ((numbers > 0) & (numbers < IGNORE)).any():
            if not single:
                raise Unusable("with a mask that joins objects of several classes")
            return (numbers > 0).astype(np.uint8), None
        if single:
            return np.where(numbers == IGNORE, IGNORE, numbers > 0).astype(np.uint8), numbers
        table = np.full(256, 0, np.uint8)
        table[1:1 + len(self.values)], table[IGNORE] = self.values, IGNORE
        if ((numbers > len(self.values)) & (numbers != IGNORE)).any():
            raise Unusable("with more objects than it has classes")
        return table[numbers], numbers


def _davis(folder: Path, classes: ClassMap, left_out: Counter) -> Iterator[Picture]:
    terms = terms_of(DAVIS, folder, TERMS)
    resolutions = sorted((path.name for path in (folder / "JPEGImages").iterdir()
                          if path.is_dir() and (folder / "Annotations" / path.name).is_dir()),
                         key=lambda name: (name != "480p", name))
    for own in sorted((folder / "JPEGImages" / resolutions[0]).iterdir() if resolutions else ()):
        masks = folder / "Annotations" / resolutions[0] / own.name
        stems = sorted({path.stem for path in own.glob("*.jpg")} & {path.stem for path in masks.glob("*.png")}
                       ) if own.is_dir() else []
        if not own.is_dir():
            continue
        if own.name not in classes.videos:
            left_out["video whose class is not known"] += 1
        elif len(stems) <= FPS:
            left_out[f"video of less than {FPS + 1} pictures with masks"] += 1
        else:
            objects = [classes.class_name(name) for name in classes.videos[own.name]]
            names = tuple(sorted({*objects}))
            yield DAVISVideo(own.name, tuple(own / f"{stem}.jpg" for stem in stems), names, terms,
                             tuple(masks / f"{stem}.png" for stem in stems),
                             tuple(1 + names.index(name) for name in objects))


# ---- What is in a picture ----


@dataclass(frozen=True)
class Seen:
    """What a picture shows.

    Args:
        area: share of the picture of every class; of a video the most of any moment, or 0 if it is hardly to be seen at
            some moment.
        largest: share of the largest single object of every class, of all of it where objects are not told apart.
        print: [256] int8, nearly the same for a copy of other size, quality or brightness.
        mirrored: the same of the mirrored picture.
    """

    area: dict[str, float]
    largest: dict[str, float]
    print: NDArray
    mirrored: NDArray


def examine(picture: Picture) -> Seen | str:
    """What a picture shows, else why it cannot be used."""
    try:
        areas, largest = [], []
        for index in range(0, len(picture.frames), FPS // 4):
            image, values, objects = picture.read(index)
            if index == 0:
                thumbnail = image.convert("L")
            areas.append(np.bincount(values.reshape(-1), minlength=256) / values.size)
            largest.append(areas[-1] if objects is None else _largest(values, objects))
    except Unusable as reason:
        return str(reason)
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError, MemoryError):
        return "that cannot be read"
    area, most = np.max(areas, axis=0), np.max(largest, axis=0)
    names = {name: value for value, name in enumerate(picture.classes, start=1) if area[value] > 0}
    area[np.min(areas, axis=0) < HIDDEN] = 0
    if not names:
        return "without a class in sight"
    return Seen({name: float(area[value]) for name, value in names.items()},
                {name: float(most[value]) for name, value in names.items()},
                _hash(thumbnail), _hash(ImageOps.mirror(thumbnail)))


def _largest(values: NDArray, objects: NDArray) -> NDArray:
    """Share [256] of the picture of the largest object of every value."""
    pairs, counts = np.unique(objects.astype(np.int64) * 256 + values, return_counts=True)
    most = np.zeros(256)
    np.maximum.at(most, pairs % 256, counts / values.size)
    return most


def _hash(grey: Image.Image) -> NDArray:
    """Whether brightness rises (1) or falls (-1) from each of 16 x 17 areas to its right neighbour, or does not change
    (0): a difference hash that is not fooled by flat areas."""
    rise = np.diff(np.asarray(grey.resize((HASH + 1, HASH), Image.Resampling.BOX), dtype=np.int16), axis=1)
    return (np.sign(rise) * (np.abs(rise) > 1)).astype(np.int8).reshape(-1)
