"""Files of text that users bring along, read or refused in one error that names them; files written whole or not."""
from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml


def read_text(path: Path) -> str:
    """UTF-8 text, with or without a byte order mark. Raises FileNotFoundError, or ValueError for other bytes."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error})") from None


def read_json(path: Path) -> object:
    """Raises FileNotFoundError, or ValueError for what is not JSON."""
    return parse_json(read_text(path), path)


def parse_json(text: str, name: Path | str) -> object:
    """The values of a text, which an error calls `name`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: is not JSON ({error})") from None


def read_yaml(path: Path) -> dict:
    """Plain values by name. Raises FileNotFoundError, or ValueError for what is not YAML, or something else in it."""
    text = read_text(path)
    try:
        values = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:  # of odd tags, too
        raise ValueError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected values by name, got {type(values).__name__}")
    return values


class _Loader(yaml.SafeLoader):
    """Without aliases: in a few lines they stand for more values than fit into any memory."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not read", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)


def read_csv(path: Path) -> list[list[str]]:
    """The rows that are not empty, spaces trimmed. Raises FileNotFoundError, or ValueError for what is not CSV."""
    lines = csv.reader(io.StringIO(read_text(path), newline=""), skipinitialspace=True)
    try:
        rows = [[cell.strip() for cell in line] for line in lines]
    except csv.Error as error:
        raise ValueError(f"{path}: line {lines.line_num} is not CSV ({error})") from None
    return [row for row in rows if any(row)]


def write_atomic(path: Path, write: Callable[[Path], object], durable: bool = False) -> None:
    """Let ``write`` fill a temporary neighbour of ``path``, a file or a folder, then move it into place.

    Whatever happens on the way (a full disk, a kill), ``path`` holds the old content or the new, never a part; where it
    is ``durable``, after a power cut, too, for which it waits for the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        usual_modes(temporary)
        if durable:
            flush(temporary)
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def usual_modes(path: Path) -> None:
    """Give a file, or the files of a folder, the mode that the user's umask asks for. Writers that use a temporary
    file, as safetensors does, leave it readable by the user alone."""
    probe = path.with_name(f"{path.name}.mode.partial")
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for item in (path, *path.rglob("*")):
        if item.is_file() and item.stat().st_mode & 0o777 != mode:  # some file systems have no modes to change
            item.chmod(mode)


def flush(path: Path) -> None:
    """Wait until a file, or a folder with what is in it, is on the disk, and not only on its way there."""
    for item in (path, *path.rglob("*")):
        if item.is_dir() and os.name != "posix":  # elsewhere folders cannot be opened
            continue
        handle = os.open(item, os.O_RDONLY if item.is_dir() else os.O_RDWR)  # what is open to be read is not, elsewhere
        try:
            os.fsync(handle)
        except OSError as error:
            if not item.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
                raise  # some file systems, of networks for the most part, cannot wait for a folder
        finally:
            os.close(handle)
