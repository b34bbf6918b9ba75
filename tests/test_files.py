"""What is written: whole or not at all, readable by whom the user lets read it, on every system."""
import errno
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from icf.files import flush, write_atomic


@pytest.fixture
def umask():
    """Sets it for one test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX")
@pytest.mark.parametrize("mask, expected", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600), (0o027, 0o640)])
def test_files_have_the_mode_that_the_umask_asks_for(tmp_path, umask, mask, expected):
    umask(mask)
    file, folder = tmp_path / "w.safetensors", tmp_path / "folder"

    def fill(path):
        path.mkdir()
        save_file({"x": torch.zeros(1)}, path / "w.safetensors")

    write_atomic(file, lambda path: save_file({"x": torch.zeros(1)}, path))
    write_atomic(folder, fill)
    assert mode(file) == mode(folder / "w.safetensors") == expected and mode(folder) & 0o500 == 0o500
    assert {*os.listdir(tmp_path)} == {"w.safetensors", "folder"}


def test_a_folder_that_cannot_be_waited_for_does_not_stop_the_writing(tmp_path, monkeypatch):
    """As on some file systems of networks."""
    fsync, waited = os.fsync, []

    def only_files(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        waited.append(fsync(handle))

    monkeypatch.setattr(os, "fsync", only_files)
    (tmp_path / "file").write_text("x")
    flush(tmp_path)
    assert len(waited) == 1
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(OSError, match="I/O"):
        flush(tmp_path)


def test_files_are_waited_for_where_folders_cannot_be_opened(tmp_path, monkeypatch):
    """As on Windows."""
    opened, waited, real = [], [], os.open

    def open_file(path, flags):
        assert not os.path.isdir(path) and flags & os.O_RDWR
        opened.append(path)
        return real(path, flags)

    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("icf.files.os.name", "nt")
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", waited.append)
    items = [tmp_path, tmp_path / "file"]
    monkeypatch.setattr(type(tmp_path), "rglob", lambda self, pattern: items[1:] if self == tmp_path else [])
    flush(tmp_path)
    monkeypatch.undo()
    assert opened == [tmp_path / "file"] and len(waited) == 1
