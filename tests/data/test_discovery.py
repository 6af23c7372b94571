"""What counts as a picture in a folder."""

import pytest

from helpers.scenes import error_of
from pointformer.data.discovery import MAP_SUFFIXES, is_picture, picture_name, pictures_in


def made(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def names(folder, **options):
    return [path.relative_to(folder).as_posix() for path in pictures_in(folder, **options)]


def test_pictures_whatever_the_case_of_their_suffix(tmp_path):
    made(tmp_path, "b.PNG", "a.tif", "C.TIFF", "d.Jpeg", "10.png", "9.png", "a.ome.tif")
    expected = ["10.png", "9.png", "C.TIFF", "a.ome.tif", "a.tif", "b.PNG", "d.Jpeg"]
    assert names(tmp_path) == expected
    assert names(tmp_path, suffixes=MAP_SUFFIXES) == expected[:-1]


def test_formats_of_pictures(tmp_path):
    kinds = ".png .tif .tiff .bmp .gif .pgm .jpg .jpeg .jpe .jfif .jp2 .webp .avif .ppm .pbm .pnm"
    scans = ".btf .tf8 .lsm .stk .svs .ndpi .scn .qptiff"
    files = sorted(f"a{suffix}" for suffix in f"{kinds} {scans}".split())
    assert names(made(tmp_path, *files)) == files


def test_what_is_nobodys_picture(tmp_path):
    made(
        tmp_path, "._a.png", ".a.png", "Thumbs.db", ".DS_Store", "desktop.ini", "~$a.png",
        "a.png~", "a.png.part", "notes.txt", "png", ".png", "folder.png/x.txt",
        "__MACOSX/a.png", "@eaDir/a.jpg/SMALL.jpg", ".cache/a.png", "$RECYCLE.BIN/a.png",
    )  # fmt: skip
    (tmp_path / "broken.png").symlink_to(tmp_path / "gone.png")
    assert names(tmp_path, deep=True) == []
    assert not is_picture(tmp_path / "broken.png")
    assert names(tmp_path / "no such folder") == []


def test_folders_are_entered_when_asked(tmp_path):
    made(tmp_path, "b.png", "a/z.png", "a/b/c.png", "a-b/c.png")
    assert names(tmp_path) == ["b.png"]
    assert names(tmp_path, deep=True) == ["a/b/c.png", "a/z.png", "a-b/c.png", "b.png"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    made(tmp_path, "real/a.png", "data/own/b.png")
    (tmp_path / "data/linked").symlink_to(tmp_path / "real")
    (tmp_path / "data/own/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/c.png").symlink_to(tmp_path / "real/a.png")
    assert names(tmp_path / "data", deep=True) == ["c.png", "linked/a.png", "own/b.png"]


def test_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.iterdir", refused)
    assert error_of(lambda: pictures_in(tmp_path)) == (
        f"{tmp_path}: this folder cannot be listed: Permission denied"
    )


@pytest.mark.parametrize(
    ("file_name", "name"),
    [
        ("a.png", "a"), ("site1/a.TIF", "site1/a"), ("a.ome.tif", "a.ome"),
        ("e\u0301.png", "\u00e9"), ("scan.1", "scan.1"), ("x.y/a", "x.y/a"), ("a.png.png", "a.png"),
    ],
)  # fmt: skip
def test_names_of_pictures(file_name, name):
    assert picture_name(file_name) == name
