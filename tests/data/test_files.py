"""Names that come out of files, and files that are whole or not there."""

import errno
import os
import stat
import threading

import pytest

from pointformer._files import TEMPORARY_PREFIX, atomic_path, path_inside


@pytest.mark.parametrize("name", ["a.png", "b/a.png", "./a.png", "b//a.png", "..a", "a b.png", "é"])
def test_names_inside_of_a_folder(tmp_path, name):
    path = path_inside(tmp_path, name)
    assert path == tmp_path / name
    assert path.resolve().is_relative_to(tmp_path.resolve())


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "./", "..", "../a.png", "b/../../a.png", "b/..", "/a.png", "//host/share/a.png",
        "\\a.png", "..\\a.png", "b\\..\\..\\a.png", "\\\\host\\share\\a.png", "C:\\a.png",
        "C:/a.png", "C:a.png", "c:..\\a.png", ".. /a.png", "a\0.png", None, 7, b"a.png",
    ],
)  # fmt: skip
def test_names_that_lead_out_of_a_folder(tmp_path, name):
    with pytest.raises(ValueError, match="expected"):
        path_inside(tmp_path, name)


def test_the_error_names_the_name_briefly(tmp_path):
    with pytest.raises(ValueError, match=r"'\.\./secret\.png'"):
        path_inside(tmp_path, "../secret.png")
    with pytest.raises(ValueError, match="name of a file") as caught:
        path_inside(tmp_path, "../" + "a" * 10_000)
    assert len(str(caught.value)) < 300


def test_links_that_lead_out_of_a_folder(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    data.mkdir()
    other.mkdir()
    (data / "link").symlink_to(other)
    (data / "self").symlink_to(data)
    (tmp_path / "alias").symlink_to(data)
    with pytest.raises(ValueError, match=r"'link/a.png': leaves .* through a link"):
        path_inside(data, "link/a.png")
    assert path_inside(data, "link/a.png", follow_links=True) == data / "link/a.png"
    assert path_inside(data, "self/a.png") == data / "self/a.png"
    assert path_inside(tmp_path / "alias", "new/a.png") == tmp_path / "alias/new/a.png"


def test_a_link_in_the_last_place_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "data").mkdir()
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "data/a.txt").symlink_to(precious)
    with atomic_path(path_inside(tmp_path / "data", "a.txt")) as path:
        path.write_text("new")
    assert precious.read_text() == "precious"
    assert (tmp_path / "data/a.txt").read_text() == "new"
    assert not (tmp_path / "data/a.txt").is_symlink()


@pytest.mark.parametrize("replace", [True, False])
def test_a_file_is_whole_or_not_there(tmp_path, replace):
    path = tmp_path / "a.txt"
    with atomic_path(path, replace=replace) as temporary:
        assert temporary.suffix == ".txt"
        assert temporary.name.startswith(TEMPORARY_PREFIX)
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("ha")
        raise KeyboardInterrupt
    assert path.read_text() == "whole"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "folder"])
def test_what_came_meanwhile_stays(tmp_path, monkeypatch, links, kind):
    if not links:  # as on FAT

        def link(source, target):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    path, other = tmp_path / "a.txt", tmp_path / "other.txt"
    if kind != "dangling link":
        other.write_text("other")
    with pytest.raises(FileExistsError), atomic_path(path, replace=False) as temporary:  # noqa: PT012
        temporary.write_text("new")
        if kind == "file":
            path.write_text("other")
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to(other)
    assert path.is_dir() if kind == "folder" else path.is_symlink() or path.read_text() == "other"
    assert other.exists() == (kind != "dangling link")
    assert not list(tmp_path.glob(f"{TEMPORARY_PREFIX}*"))
    with atomic_path(tmp_path / "free.txt", replace=False) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "free.txt").read_text() == "new"


def test_of_many_writers_that_may_not_replace_one_wins(tmp_path):
    path, won, lost = tmp_path / "a.txt", [], []
    start = threading.Barrier(8)

    def write(number):
        start.wait()
        try:
            with atomic_path(path, replace=False) as temporary:
                temporary.write_text(str(number))
            won.append(str(number))
        except FileExistsError:
            lost.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [path.read_text()]
    assert len(lost) == 7


def test_permissions_are_what_the_umask_leaves(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    "name", ["n" * 255, "n" * 251 + ".txt", "n." + "s" * 253, "a.b" + "é" * 126]
)
def test_names_as_long_as_names_can_be(tmp_path, name):
    with atomic_path(tmp_path / name) as temporary:
        temporary.write_text("x")
    assert (tmp_path / name).read_text() == "x"


def test_errors_of_writing_name_the_file_that_was_asked_for(tmp_path):
    """Not the temporary one; a full disk has no name at all."""
    for path in (tmp_path / "no/a.txt", tmp_path / "b.txt"):
        with pytest.raises(OSError, match="No s") as error, atomic_path(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        assert error.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as error, atomic_path(tmp_path / "b.txt") as temporary:
        (temporary.parent / "input").read_text()
    assert error.value.filename == str(tmp_path / "input")
    assert list(tmp_path.iterdir()) == []
