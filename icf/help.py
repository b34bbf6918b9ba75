"""What `--help` and `--help-fields` print: presets, and fields of the configuration by their docstrings."""
from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable
from difflib import get_close_matches
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import get_args, get_origin

from jsonargparse import ArgumentParser

COMMON = {
    "train": ("data.root", "data.negatives", "train.batch", "train.epochs", "train.lr", "train.seed", "train.amp",
              "train.init_from", "objective.enabled", "out"),
    "evaluate": ("data.root", "data.subset", "eval.batch", "eval.threshold", "eval.negatives", "eval.snr_db",
                 "eval.frame_mix", "out"),
    "predict": ("backend",),
    "ablate": ("data.root", "train.batch", "train.epochs", "train.lr"),
    "profile": ("data.size", "train.batch", "train.amp", "objective.enabled", "backend"),
}
"""Fields that people change, by command."""
NAMES = {int: "N", float: "X", str: "NAME", Path: "PATH", bool: "true|false"}
INDENT = 24


def short_help(command: str, own: str, parser: ArgumentParser, presets: dict[str, Path]) -> str:
    """The help of a command: its own, the presets where it takes one, the fields that people change."""
    lines = [own.rstrip()]
    if "[PRESET]" in own:
        lines += ["", "presets:", *(_entry(name, first_sentence(path), lines=1) for name, path in presets.items())]
    more = (f"icf {command} --help-fields [SECTION] lists all {len(_keys(parser))}; sections: "
            f"{', '.join(sections(parser))}")
    lines += ["", "fields that people change (default):", *_fields(parser, COMMON[command], lines=2), "",
              textwrap.fill(more, _width())]
    return "\n".join(lines)


def fields_help(parser: ArgumentParser, section: str | None = None) -> str:
    """All fields by sections, or those of one. Raises ValueError where there is no such section."""
    known = sections(parser)
    if section is not None and section not in known:
        close = get_close_matches(section, known, n=1)
        raise ValueError(f"--help-fields: expected one of {', '.join(known)}, got {section!r}"
                         + (f" (did you mean {close[0]!r}?)" if close else ""))
    lines = []
    for name, heading in known.items():
        if section is None or name == section or name.startswith(f"{section}."):
            keys = [key for key in _keys(parser) if key.rpartition(".")[0] == ("" if name == "run" else name)]
            lines += ["", f"{name}: {heading}", *_fields(parser, keys)]
    return "\n".join(lines[1:])


COMPLETION = """{zsh}_icf() {{
    local cur="${{COMP_WORDS[COMP_CWORD]}}" words
    case "${{COMP_WORDS[1]}}" in
{cases}
        *) words="";;
    esac
    [ "$COMP_CWORD" = 1 ] && words="{commands}"
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o default -F _icf icf
"""


def completion(words: dict[str, list[str]], shell: str) -> str:
    """A script for `bash` or `zsh` that completes commands and, by command, these words; file names else."""
    cases = "\n".join(f'        {command}) words="{" ".join(own)}";;' for command, own in words.items())
    zsh = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return COMPLETION.format(zsh=zsh, cases=cases, commands=" ".join(words))


def sections(parser: ArgumentParser) -> dict[str, str]:
    """Headings of the sections that have fields, by name."""
    titles = {group._group_actions[0].dest: group.title for group in parser._action_groups[2:] if group._group_actions}
    names = dict.fromkeys(key.rpartition(".")[0] for key in _keys(parser))
    return {"run": "where, and by which operators", **{name: _plain(titles.get(name, "")) for name in names if name}}


def first_sentence(path: Path) -> str:
    """Of the comment that a YAML file begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return re.split(r"\. (?=[A-Z0-9`]|$)", f"{comment} ")[0].strip()


def _keys(parser: ArgumentParser) -> list[str]:
    return [action.dest for action in parser._actions
            if hasattr(action, "_typehint") and not action.dest.endswith(".help")]


def _fields(parser: ArgumentParser, keys: Iterable[str], lines: int | None = None) -> list[str]:
    actions = {action.dest: action for action in parser._actions}
    return [_entry(f"--{key} {_metavar(actions[key]._typehint)}", _plain(actions[key].help or ""), lines,
                   f" ({_default(actions[key].default)})") for key in keys]


def _width() -> int:
    return min(shutil.get_terminal_size((80, 24)).columns, 120)


def _entry(name: str, text: str, lines: int | None = None, default: str = "") -> str:
    """`name` and its text beside it, or below where it is long; of a text for `lines` lines what these hold."""
    wrap = partial(textwrap.wrap, width=_width() - INDENT)
    if lines is not None and len(wrap(text + default)) > lines:
        text = " ".join(wrap(text, max_lines=lines, placeholder=" .." + "_" * len(default))).rstrip("_")
    found = wrap(text + default) or [""]
    head = f"  {name}"
    first = [f"{head:{INDENT}}{found[0]}"] if len(head) < INDENT else [head, " " * INDENT + found[0]]
    return "\n".join([*first, *(" " * INDENT + line for line in found[1:])])


def _metavar(kind: object) -> str:
    if kind in NAMES:
        return NAMES[kind]
    arguments = [argument for argument in get_args(kind) if argument not in (type(None), ...)]
    if get_origin(kind) in (tuple, list):
        return f"[{','.join(_metavar(argument) for argument in arguments)}]"
    if all(isinstance(argument, str) for argument in arguments) and arguments:
        return "|".join(arguments)
    return _metavar(arguments[0]) if arguments else "{..}"


def _default(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_default, value))}]"
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if not isinstance(value, (int, float)) \
        or isinstance(value, bool) else f"{value:g}"


def _plain(text: str) -> str:
    """A docstring without its markup, in one line."""
    return re.sub(r"\*\((.*?)\)\*", r"(\1)", " ".join(text.split())).replace("`", "").rstrip(".")
