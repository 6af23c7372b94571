"""COCO files with something wrong in them: what is left out, and that all else is as it was."""

import json
import math
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers import scenes
from helpers.scenes import error_of
from pointformer import data

CASES = Path(__file__).parents[1] / "cases" / "coco"
SQUARE = np.zeros((30, 40), bool)
SQUARE[5:15, 5:15] = True
POLYGON = [5, 5, 15, 5, 15, 15, 5, 15]
GOOD = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 100, "bbox": [5, 5, 10, 10]}
GOOD["segmentation"] = [POLYGON]
OTHER = {**GOOD, "id": 2, "segmentation": [[20, 20, 30, 20, 30, 28, 20, 28]]}


def read(path, **options):
    return data.read_coco_instances(path, CASES, **options)


def content(rows, images=(("a.png", 1),), categories=None):
    pictures = [{"id": n, "file_name": name, "height": 30, "width": 40} for name, n in images]
    categories = categories or [{"id": 1, "name": "cell"}]
    return {"images": pictures, "annotations": rows, "categories": categories}


def is_the_square(annotation):
    assert [segment.id for segment in annotation.segments] == [1]
    np.testing.assert_array_equal(annotation.segments[0].mask.dense(SQUARE.shape), SQUARE)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("climbing_file_name", "image 1: '../coco/a.png': expected the name of a file inside"),
        ("duplicate_image_id", "the pictures a.png and b.png have the id 1"),
    ],
)
def test_pictures_that_cannot_be_told(case, message):
    path = CASES / f"{case}.json"
    assert error_of(lambda: read(path)).startswith(f"{path}: {message}")
    assert message in error_of(lambda: read(path, skip_bad=True))  # no picture is left


def test_ambiguous_pictures_are_left_out_with_their_objects(tmp_path):
    images = [
        ("a.png", 1),
        ("b.png", 1),
        ("c.png", "1"),
        ("d.png", 4),
        ("e.png", 4.0),
        ("f.png", 5),
    ]
    for name, _ in images:
        scenes.picture(tmp_path / name, (30, 40))
    rows = [GOOD, {**OTHER, "image_id": 4}, {**OTHER, "id": 3, "image_id": 5}]
    path = scenes.dump(tmp_path / "a.json", content(rows, images))
    dataset = data.read_coco_instances(path, tmp_path, skip_bad=True)
    assert [(a.name, [s.id for s in a.segments]) for a in dataset] == [("f", [3])]
    assert dataset.skipped == dict.fromkeys(
        "abc", f"{path}: the pictures a.png and b.png have the id 1"
    ) | dict.fromkeys("de", f"{path}: the pictures d.png and e.png have the id 4")


def test_a_malformed_row_makes_its_twin_ambiguous(tmp_path):
    broken = content([GOOD])
    broken["images"].append({"id": 1, "file_name": None})
    dataset_file = scenes.dump(tmp_path / "a.json", broken)
    assert "found none (2 skipped" in error_of(lambda: read(dataset_file, skip_bad=True))


@pytest.mark.parametrize(
    "name",
    [
        "/etc/a.png", "../a.png", "b/../a.png", "b/../../a.png", "..", ".", "", "C:\\a.png",
        "..\\a.png", "\\\\host\\a.png", "a\0.png", "a\n.png", "\ud800.png", 7, None, [],
    ],
)  # fmt: skip
def test_file_names_stay_in_their_folder(tmp_path, name):
    path = scenes.dump(tmp_path / "a.json", content([GOOD], [("a.png", 1), (name, 2)]))
    assert error_of(lambda: read(path)).startswith(f"{path}: image 2: ")
    dataset = read(path, skip_bad=True)
    assert list(dataset.skipped) == ["image 2"]
    is_the_square(dataset[0])


@pytest.mark.parametrize("name", ["a.png", "./a.png", "x/a.png", "x\\a.png", "linked/a.png"])
def test_file_names_with_folders(tmp_path, name):
    for folder in (tmp_path, tmp_path / "x", tmp_path.parent / f"{tmp_path.name}_elsewhere"):
        scenes.picture(folder / "a.png", (30, 40))
    (tmp_path / "linked").symlink_to(folder)
    path = scenes.dump(tmp_path / "a.json", content([GOOD], [(name, 1)]))
    dataset = data.read_coco_instances(path, tmp_path)
    assert dataset[0].name == name.replace("\\", "/").removeprefix("./").removesuffix(".png")
    is_the_square(dataset[0])


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_accents_in_file_names(tmp_path, stored):
    scenes.picture(tmp_path / "images" / unicodedata.normalize(stored, "Zoë/é.png"), (30, 40))
    for form in ("NFC", "NFD"):
        images = [(unicodedata.normalize(form, "Zoë/é.png"), 1)]
        scenes.dump(tmp_path / "a.json", content([GOOD], images))
        dataset = data.open_dataset(tmp_path, task="instance")
        is_the_square(dataset[0])
        assert dataset[0].name == unicodedata.normalize("NFC", "Zoë/é")
        assert dataset[0].image.is_file()


def test_one_name_in_two_folders(tmp_path):
    for site in ("site1", "site2"):
        scenes.picture(tmp_path / site / "a.png", (30, 40))
    images = [("site1/a.png", 1), ("site2/a.png", 2)]
    rows = [GOOD, {**OTHER, "image_id": 2}]
    path = scenes.dump(tmp_path / "a.json", content(rows, images))
    dataset = data.read_coco_instances(path, tmp_path)
    assert [(a.name, a.image.parent.name) for a in dataset] == [
        ("site1/a", "site1"),
        ("site2/a", "site2"),
    ]
    assert [[s.id for s in a.segments] for a in dataset] == [[1], [2]]
    scenes.picture(tmp_path / "site2/a.jpg", (30, 40))
    path = scenes.dump(tmp_path / "a.json", content(rows, [*images, ("site2/a.jpg", 3)]))
    dataset = data.read_coco_instances(path, tmp_path, skip_bad=True)
    assert (len(dataset), list(dataset.skipped)) == (1, ["site2/a"])
    assert "there is another picture" in dataset.skipped["site2/a"]


FAR = [[5, 5, 1e9, 5, 15, 15]]
OBJECT_FAULTS = {
    "no polygon": {"segmentation": []},
    "empty polygon": {"segmentation": [[]]},
    "two points": {"segmentation": [[1, 1, 9, 9]]},
    "odd": {"segmentation": [[1, 1, 9, 9, 1, 9, 3]]},
    "null": {"segmentation": None},
    "object": {"segmentation": {}},
    "text": {"segmentation": "polygon"},
    "flat": {"segmentation": [5, 5, 15, 5, 15, 15]},
    "points": {"segmentation": [[[5, 5], [15, 5], [15, 15]]]},
    "texts": {"segmentation": [["5", "5", "15", "5", "15", "15"]]},
    "true": {"segmentation": [[True, 5, 15, 5, 15, 15]]},
    "NaN": {"segmentation": [[math.nan, 5, 15, 5, 15, 15]]},
    "infinity": {"segmentation": [[math.inf, 5, 15, 5, 15, 15]]},
    "huge": {"segmentation": [[10**400, 5, 15, 5, 15, 15]]},
    "far": {"segmentation": FAR},
    "two points, closed": {"segmentation": [[1, 1, 9, 9, 1, 1]]},
    "one point": {"segmentation": [[3, 3] * 4]},
    "line": {"segmentation": [[1, 1, 9, 9, 5, 5, 3, 3]]},
    "outside": {"segmentation": [[50, 5, 60, 5, 60, 15]]},
    "one bad of two": {"segmentation": [POLYGON, [1, 1, 9, 9]]},
    "other size": {"segmentation": {"size": [40, 30], "counts": [0, 1200]}},
    "short": {"segmentation": {"size": [30, 40], "counts": [0, 1199]}},
    "halves": {"segmentation": {"size": [30, 40], "counts": [0.5, 1199.5]}},
    "wraps around": {"segmentation": {"size": [30, 40], "counts": [2**62] * 3 + [2**62 + 1200]}},
    "counts as texts": {"segmentation": {"size": [30, 40], "counts": ["0", "1200"]}},
    "negative run": {"segmentation": {"size": [30, 40], "counts": [-1, 1201]}},
    "string of nothing": {"segmentation": {"size": [30, 40], "counts": ""}},
    "unknown category": {"category_id": 7},
    "category true": {"category_id": True},
    "category 1.5": {"category_id": 1.5},
    "category null": {"category_id": None},
    "unknown image": {"image_id": 77},
    "image true": {"image_id": True},
    "image null": {"image_id": None},
    "negative area": {"area": -4},
    "area text": {"area": "100"},
    "area NaN": {"area": math.nan},
    "huge area": {"area": 10**400},
    "crowd 2": {"iscrowd": 2},
    "crowd text": {"iscrowd": "no"},
    "score text": {"score": "high"},
}


@pytest.mark.parametrize("fault", OBJECT_FAULTS)
def test_a_bad_object_is_left_out_alone(tmp_path, fault):
    path = scenes.dump(tmp_path / "a.json", content([GOOD, {**OTHER, **OBJECT_FAULTS[fault]}]))
    message = error_of(lambda: read(path)[0])
    assert message.startswith(f"{path}: annotation 2: ")
    assert message.endswith("; skip_bad (--skip-bad) leaves out what is bad")
    assert len(message) < 300 + len(str(path))
    assert error_of(lambda: list(read(path))) == message
    dataset = read(path, skip_bad=True)
    (annotation,) = dataset
    is_the_square(annotation)
    assert list(dataset.skipped) == ["annotation 2"]
    assert message.startswith(dataset.skipped["annotation 2"])


@pytest.mark.parametrize("key", ["id", "image_id", "category_id", "segmentation"])
def test_a_missing_value_is_that_objects_problem(tmp_path, key):
    bad = {name: value for name, value in OTHER.items() if name != key}
    path = scenes.dump(tmp_path / "a.json", content([GOOD, bad, "no object", None]))
    dataset = read(path, skip_bad=True)
    is_the_square(next(iter(dataset)))
    entries = [f"entry {n} of the annotations" for n in (1, 2, 3)]
    assert sorted(dataset.skipped) == sorted(
        [*(entries if key == "id" else ["annotation 2", *entries[1:]])]
    )


def test_polygons_that_are_unusual_but_have_an_area(tmp_path):
    """A bow tie, whose signed areas cancel, a part that is a line beside one that is not, and one
    that is thinner than a pixel, which is no object but no error."""
    bow_tie = [[5, 5, 15, 15, 15, 5, 5, 15]]
    tiny = [[5.2, 5.2, 5.4, 5.2, 5.4, 5.4]]
    with_line = [*GOOD["segmentation"], [1, 1, 3, 3, 2, 2]]
    rows = [
        {**GOOD, "id": n, "segmentation": parts}
        for n, parts in enumerate((bow_tie, tiny, with_line))
    ]
    path = scenes.dump(tmp_path / "a.json", content(rows))
    dataset = read(path)
    first, second = dataset[0].segments
    assert first.mask.area > 40
    assert (second.mask.dense(SQUARE.shape) >= SQUARE).all()
    assert dataset.skipped == {"annotation 1": f"{path}: annotation 1: has no pixel"}


def test_run_lengths_without_a_pixel_are_no_object(tmp_path):
    empty = {"size": [30, 40], "counts": [1200]}
    path = scenes.dump(tmp_path / "a.json", content([{**OTHER, "segmentation": empty}, GOOD]))
    dataset = read(path)
    is_the_square(dataset[0])
    assert dataset.skipped == {"annotation 2": f"{path}: annotation 2: has no pixel"}


def test_normalized_coordinates_are_no_pixels(tmp_path):
    """Whether they would reach the middle of the first pixel or not; of that pixel is a mask."""
    for number, polygon in enumerate(([0.1, 0.1, 0.2, 0.1, 0.2, 0.3], [0.2, 0, 1, 0, 1, 1, 0, 1])):
        row = {**GOOD, "segmentation": [polygon]}
        path = scenes.dump(tmp_path / f"{number}.json", content([row]))
        assert error_of(lambda path=path: read(path)[0]).startswith(
            f"{path}: annotation 1: has all corners within 0 to 1, got [{polygon[0]}, "
        )
    pixel = {**GOOD, "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]]}
    (segment,) = read(scenes.dump(tmp_path / "a.json", content([pixel])))[0].segments
    assert segment.mask.box == (0, 0, 1, 1)


def test_objects_with_one_id(tmp_path):
    rows = [GOOD, OTHER, {**OTHER, "id": 2.0}, {**OTHER, "id": "2"}]
    path = scenes.dump(tmp_path / "a.json", content(rows))
    assert "annotation 2: there are several with this id" in error_of(lambda: read(path))
    dataset = read(path, skip_bad=True)
    is_the_square(dataset[0])
    assert list(dataset.skipped) == ["annotation 2"]


@pytest.mark.parametrize(
    "fields",
    [
        {"area": None}, {"id": 1.0}, {"image_id": 1.0}, {"image_id": "1"}, {"category_id": 1.0},
        {"category_id": "1"}, {"iscrowd": None}, {"iscrowd": False}, {"bbox": None},
        {"iscrowd": "0"}, {"bbox": "none"}, {"extra": {"a": [1]}}, {"score": None},
        {"segmentation": [[-3, 5, 15, 5, 15, 15, -3, 15]]},
        {"segmentation": {"size": [30.0, 40.0], "counts": scenes.run_lengths(SQUARE)["counts"]}},
    ],
)  # fmt: skip
def test_what_is_written_otherwise_but_plain(tmp_path, fields):
    path = scenes.dump(tmp_path / "a.json", content([{**GOOD, **fields}]))
    (annotation,) = read(path)
    (segment,) = annotation.segments
    expected = SQUARE.copy()
    if "segmentation" in fields and isinstance(fields["segmentation"], list):
        expected[5:15, :5] = True  # what lies over the border is cut off
    np.testing.assert_array_equal(segment.mask.dense(expected.shape), expected)
    assert (segment.id, segment.area, segment.crowd, segment.category) == (1, 100, False, 0)


@pytest.mark.parametrize("key", ["area", "iscrowd", "bbox"])
def test_what_an_object_need_not_have(tmp_path, key):
    row = {name: value for name, value in GOOD.items() if name != key}
    path = scenes.dump(tmp_path / "a.json", content([row]))
    is_the_square(read(path)[0])
    assert read(path)[0].segments[0].area == 100


def test_pictures_without_a_size_have_their_own(tmp_path):
    broken = content([GOOD])
    broken["images"][0] = {"id": 1, "file_name": "a.png", "height": None}
    is_the_square(read(scenes.dump(tmp_path / "a.json", broken))[0])
    broken["images"][0] = {"id": 1.0, "file_name": "a.png", "height": 30.0, "width": "40"}
    annotation = read(scenes.dump(tmp_path / "a.json", broken))[0]
    assert (annotation.id, type(annotation.id), annotation.size) == (1, int, (30, 40))


@pytest.mark.parametrize(("orientation", "turned"), [(1, False), (6, True)])
def test_sizes_swapped_by_an_orientation_tag(tmp_path, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = tmp_path / "a.jpg"
    Image.new("L", (40, 30) if turned else (30, 40)).save(image, exif=exif)
    path = scenes.dump(tmp_path / "a.json", content([GOOD], [(image.name, 1)]))
    message = error_of(lambda: data.read_coco_instances(path, tmp_path)[0])
    expected = f"{path}: expected the height and width of {image}, (40, 30), got (30, 40)"
    assert message.startswith(expected)
    assert ("its orientation tag turns the picture" in message) == turned


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings(tmp_path, encoding):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content([GOOD])), encoding=encoding)
    is_the_square(read(path)[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [], "images": []}', "expected JSON, but an object has the key 'images' twice"),
        ("[]", "expected a JSON dict, got list"),
        ("", "expected JSON, but"),
        ("[" * 100_000, "expected JSON, but"),
        (f'{{"images": [{"9" * 5000}]}}', "expected JSON, but"),
    ],
)
def test_what_is_no_such_file(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert error_of(lambda: read(path)).startswith(f"{path}: {message}")


def test_a_heading_of_categories_is_no_class(tmp_path):
    path = CASES / "unused_root_category.json"
    dataset = read(path)
    assert [category.name for category in dataset.categories] == ["cell"]
    assert dataset[0].segments[0].category == 0
    assert dataset.skipped == {
        "category 0": f"{path}: category 0, 'cells', is no class: it is the supercategory of "
        "others and not annotated itself"
    }
    assert data.read_categories(path) == dataset.categories


@pytest.mark.parametrize(
    ("categories", "classes"),
    [
        # Roboflow's heading may have the name of its only class.
        ([(0, "cell", "none"), (1, "cell", "cell")], [1]),
        # A class that is not used is one: classes do not depend on the split.
        ([(1, "cell", "none"), (2, "dirt", "none"), (3, "hair", None)], [1, 2, 3]),
        # COCO's person is of the supercategory person, and is not used by others.
        ([(1, "person", "person"), (2, "dog", "animal")], [1, 2]),
        # What is annotated is a class, whatever others say of it.
        ([(1, "animal", "none"), (2, "dog", "animal")], [1, 2]),
    ],
)
def test_which_categories_are_classes(tmp_path, categories, classes):
    rows = [
        {"id": n, "name": name} | ({"supercategory": above} if above else {})
        for n, name, above in categories
    ]
    path = scenes.dump(tmp_path / "a.json", content([GOOD], categories=rows))
    assert [category.id for category in read(path).categories] == classes


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([{"id": 1, "name": "a"}, {"id": 1.0, "name": "b"}], "different ids, got 1 twice"),
        ([{"id": 1, "name": "a"}, {"id": 2, "name": "a"}], "different names, got 'a' twice"),
        ([{"id": True, "name": "a"}], "entry 0 of the categories: expected a whole number as 'id'"),
        ([{"id": 1.7, "name": "a"}], "entry 0 of the categories: expected a whole number as 'id'"),
        ([{"id": 1, "name": None}], "entry 0 of the categories: expected a text as 'name'"),
        ([{"id": 1, "name": "a", "isthing": "no"}], "entry 0 of the categories: expected 0 or 1"),
    ],
)
def test_categories_that_are_not_clear(tmp_path, categories, message):
    path = scenes.dump(tmp_path / "a.json", content([], categories=categories))
    for skip_bad in (False, True):
        assert message in error_of(lambda skip_bad=skip_bad: read(path, skip_bad=skip_bad))


def test_colors_that_are_none_are_no_reason_to_refuse(tmp_path):
    for color in ("#ff0000", [1, 2], [1, 2, 300], None):
        rows = [{"id": 1, "name": "a", "color": color}]
        path = scenes.dump(tmp_path / "a.json", content([], categories=rows))
        assert max(read(path).categories[0].color) < 256


def test_classes_of_another_split(tmp_path):
    path = scenes.dump(tmp_path / "a.json", content([GOOD, {**OTHER, "category_id": 2}]))
    table = (data.Category(0, "none"), data.Category(1, "cell"))
    dataset = read(path, categories=table, skip_bad=True)
    assert dataset.categories == table
    assert [s.category for s in dataset[0].segments] == [1]
    assert "annotation 2: is of the unknown category 2" in dataset.skipped["annotation 2"]


def test_results_with_something_wrong_are_refused(tmp_path):
    annotation = read(CASES / "unused_root_category.json")[0]
    row = {"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": GOOD["segmentation"]}
    path = tmp_path / "results.json"

    def objects(*rows):
        table = [data.Category(1, "cell")]
        return data.CocoResults(scenes.dump(path, rows), table).objects(annotation)

    assert len(objects(row, {**row, "image_id": 1.0}, {**row, "image_id": "1"}).scores) == 3
    for fields in (
        {"image_id": None}, {"category_id": True}, {"score": None}, {"score": math.nan},
        {"score": "0.5"}, {"segmentation": None}, {"segmentation": FAR}, {"iscrowd": "x"},
    ):  # fmt: skip
        message = error_of(lambda fields=fields: objects(row, {**row, **fields}))
        assert message.startswith(f"{path}: entry 1 of the results: ")


ANYTHING: list[object] = [
    None, True, False, 0, 1, 3, -7, 1007, 0.5, 1e30, 10**30, math.nan, math.inf, "", "x", "1",
    "../x.png", "/x.png", "a\nb", [], {}, [[]], [None], {"a": 1}, [[1, 2, 3, 4]],
    {"counts": [1], "size": 3},
]  # fmt: skip


def places(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def changed(value, path, new):
    """A copy with another value at a place, or without it if `new` is `...`."""
    copy = value.copy()
    if len(path) > 1:
        copy[path[0]] = changed(value[path[0]], path[1:], new)
    elif new is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = new
    return copy


def small_scene(folder):
    """The objects of three pictures: (JSON's content, masks by picture and annotation)."""
    path = scenes.coco_instances(folder, images=2)
    whole = json.loads(path.read_text())
    rows = [row for row in whole["annotations"] if row["id"] % 9 in (1, 2, 5)]
    whole["annotations"] = rows
    scenes.dump(path, whole)
    return path, whole


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene")
    path, whole = small_scene(folder)
    dataset = data.read_coco_instances(path, folder / "val2017")
    return folder, whole, objects_of(dataset)


def objects_of(dataset):
    """By picture: id, category's id, area, crowd and mask of each object."""
    return {
        annotation.name: {
            segment.id: (
                dataset.categories[segment.category].id,
                segment.area,
                segment.crowd,
                segment.mask.box,
                hash(segment.mask.pixels.tobytes()),  # short, for what a failure prints
            )
            for segment in annotation.segments
        }
        for annotation in dataset
    }


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_change_leaves_all_else_right_or_is_refused(scene, draw):
    """Whatever one value becomes: other pictures' objects are as they were, or the file is refused.

    Of the pictures that the changed row is or was about, an object that stays is as it was too.
    """
    folder, whole, expected = scene
    place = draw.draw(st.sampled_from([p for p in places(whole) if p]))
    broken = changed(whole, place, draw.draw(st.sampled_from([..., *ANYTHING])))
    path = scenes.dump(folder / "broken.json", broken)
    try:
        found = objects_of(data.read_coco_instances(path, folder / "val2017", skip_bad=True))
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert str(error).startswith(str(path))  # noqa: PT017
        assert len(str(error)) < 1000  # noqa: PT017
        return
    if len(place) < 2 or place[0] == "categories":
        # An id that is taken away takes its objects along; what is left is unchanged.
        for name, objects in found.items():
            assert objects.items() <= expected[name].items()
        return
    old = whole[place[0]][place[1]]
    rows = broken[place[0]]
    new = rows[place[1]] if place[1] < len(rows) else None
    keys = ("id",) if place[0] == "images" else ("image_id",)
    touched = {row.get(key) for row in (old, new) if isinstance(row, dict) for key in keys
               if not isinstance(row.get(key), dict | list)}  # fmt: skip
    touched |= {str(key) for key in touched}
    # An object that now shares its id with another one takes that along.
    twin = str(new.get("id")) if place[0] == "annotations" and place[2:] == ("id",) else None
    for row in whole["images"]:
        name = row["file_name"].removesuffix(".jpg")
        kept = {key: value for key, value in expected[name].items() if str(key) != twin}
        if not {row["id"], str(row["id"])} & touched:
            assert found.get(name) == kept, place
        elif name in found and place[0] == "annotations":
            kept.pop(old["id"], None)
            assert kept.items() <= found[name].items()


@pytest.mark.parametrize(
    ("polygon", "box"),
    [
        ([30, 5, 75, 5, 75, 15, 30, 15], (30, 5, 40, 15)),
        ([-38, 5, 8, 5, 8, 15, -38, 15], (0, 5, 8, 15)),
        ([32, 20, 39, 20, 39, 70, 32, 70], (32, 20, 39, 30)),
        ([5, -35, 15, -35, 15, 4, 5, 4], (5, 0, 15, 4)),
    ],
)
def test_what_lies_over_a_border_is_cut_off(tmp_path, polygon, box):
    path = scenes.dump(tmp_path / "a.json", content([{**GOOD, "segmentation": [polygon]}]))
    (segment,) = read(path)[0].segments
    assert segment.mask.box == box
    assert segment.mask.pixels.all()


@pytest.mark.parametrize(
    "place", [(-15, 5), (-8, 5), (45, 5), (40, 5), (5, -15), (5, -6), (5, 32), (5, 30)]
)
def test_what_lies_beyond_any_border_is_outside(tmp_path, place):
    x, y = place
    polygon = [x, y, x + 8, y, x + 8, y + 6, x, y + 6]
    path = scenes.dump(tmp_path / "a.json", content([{**GOOD, "segmentation": [polygon]}]))
    assert error_of(lambda: read(path)[0]).startswith(
        f"{path}: annotation 1: lies outside of its picture of 30 x 40 pixels"
    )
