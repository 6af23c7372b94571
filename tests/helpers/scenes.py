"""Small made-up data sets in the field's file formats, for tests."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from pointformer import data

SIZE = (96, 128)


def rng(seed=0):
    return np.random.default_rng(seed)


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def picture(path, size=SIZE):
    return save(path, rng(1).integers(0, 256, (*size, 3), dtype=np.uint8))


def encoded(values, kind="png"):
    """The bytes of a file with a picture."""
    content = io.BytesIO()
    Image.fromarray(values).save(content, {"jpg": "jpeg"}.get(kind, kind))
    return content.getvalue()


def pixels(seed=0, size=(12, 16)):
    return rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def shard(path, files):
    """A tar file of names and contents: bytes, or what `str` makes of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            content = content if isinstance(content, bytes) else str(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def dump(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def rectangles(ids, seed=0, size=SIZE):
    """A map with one rectangle for each id, later ones on top, that all stay visible."""
    random = rng(seed)
    for _ in range(100):
        values = np.zeros(size, np.int32)
        for value in ids:
            height, width = random.integers(8, 40, 2)
            y, x = random.integers(0, size[0] - height), random.integers(0, size[1] - width)
            values[y : y + height, x : x + width] = value
        if set(np.unique(values)) >= set(ids):
            return values
    raise AssertionError


def moved(masks, seed=0, largest=6):
    """Masks (N, H, W), each shifted a little."""
    random = rng(seed)
    shifts = random.integers(-largest, largest + 1, (len(masks), 2))
    shifted = [np.roll(mask, shift, (0, 1)) for mask, shift in zip(masks, shifts, strict=True)]
    return np.stack(shifted) if shifted else masks


def cityscapes(root, frames=3, split="val"):
    """Streets with cars, people, groups, a caravan, void, and objects too small to be scored."""
    for frame in range(frames):
        name = f"town_{frame:06d}_000019"
        image = root / "leftImg8bit" / split / "town" / f"{name}_leftImg8bit.png"
        picture(image)
        ids = [23, 11, 4, 26001, 24, 24000, 26000, 26, 26002, 29000, 24001, 33000]
        values = rectangles(ids, seed=frame)
        values[values == 0] = 7
        values[:3, :3] = 24002
        labels = np.where(values >= 1000, values // 1000, values)
        stem = root / "gtFine" / split / "town" / f"{name}_gtFine"
        save(stem.with_name(f"{stem.name}_instanceIds.png"), values.astype(np.uint16))
        save(stem.with_name(f"{stem.name}_labelIds.png"), labels.astype(np.uint8))
    return root


COCO_CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 3, "name": "car", "isthing": 1},
    {"id": 90, "name": "toothbrush", "isthing": 1},
    {"id": 187, "name": "sky", "isthing": 0},
]


def run_lengths(mask):
    """COCO's uncompressed form: runs of zeros and ones in turn, down the columns."""
    flat = mask.T.ravel().astype(int)
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends, len(flat)]).tolist()
    return {"counts": [0, *runs] if flat[0] else runs, "size": list(mask.shape)}


def coco_instances(root, images=4):
    """Objects of all of COCO's sizes, as polygons and as run lengths, with crowds and overlaps."""
    random, size = rng(3), (200, 240)
    rows, pictures = [], []
    for image in range(images):
        key = 1000 + 7 * image
        pictures.append({"id": key, "file_name": f"{key:012d}.jpg", "height": 200, "width": 240})
        picture(root / "val2017" / f"{key:012d}.jpg", size)
        for n in range(9):
            side = (14, 50, 130)[n % 3] + int(random.integers(0, 9))
            x, y = float(random.integers(0, 240 - side)), float(random.integers(0, 200 - side))
            mask = np.zeros(size, bool)
            mask[int(y) : int(y) + side, int(x) : int(x) + side] = True
            crowd = n == 8
            if crowd or n == 4:
                shape, area = run_lengths(mask), int(mask.sum())
            else:
                corners = [x, y, x + side, y + 0.4, x + side, y + side, x + 2.5, y + side]
                shape, area = [corners], side * side - 1.5
            rows.append(
                {
                    "id": len(rows) + 1,
                    "image_id": key,
                    "category_id": (1, 3, 90)[n % 3] if not crowd else 1,
                    "segmentation": shape,
                    "area": area,
                    "bbox": [x, y, side, side],
                    "iscrowd": int(crowd),
                }
            )
    pictures.append({"id": 5, "file_name": "empty.jpg", "height": 200, "width": 240})
    picture(root / "val2017" / "empty.jpg", size)
    content = {"images": pictures, "annotations": rows, "categories": COCO_CATEGORIES[:3]}
    return dump(root / "instances.json", content)


def error_of(action):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def instance_folder(root, ids, segments=None, classes=None):
    picture(root / "val/images/a.png", ids.shape)
    save(root / "val/instances/a.png", ids.astype(np.uint16))
    if segments is not None:
        dump(
            root / "segments.json",
            {
                "classes": classes or {"1": "cat", "7": "dog"},
                "images": {"a": {"segments": segments}},
            },
        )
    return root


def coco_panoptic(root):
    """Three pictures, written by us: (JSON, PNG folder, pictures, annotations)."""
    table = data.read_categories(dump(root / "table.json", COCO_CATEGORIES))
    pairs = []
    for n in range(3):
        ids = rectangles([3, 70_000, 16_777_215, 256], seed=n)
        segments = tuple(
            data.Segment(value, category, int((ids == value).sum()), crowd)
            for value, category, crowd in (
                (3, 0, False),
                (70_000, 0, True),
                (16_777_215, 3, False),
                (256, 1, False),
            )
        )
        image = picture(root / "images" / f"{n}.jpg")
        annotation = data.Annotation(str(n), image, ids.shape, 10 + n, None, ids, segments)
        pairs.append((annotation, annotation))
    data.write_coco_panoptic(root / "p.json", root / "p", pairs, table)
    return root / "p.json", root / "p", root / "images", [a for a, _ in pairs]
