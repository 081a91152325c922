"""The answers on disk, for a person who looks after them: how many, where, away with them, export.

It reads the folders as `cache/disk.py` writes them. No client needs to exist.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, TextIO

from dspy_resilient.cache.disk import DiskCache, client_folders
from dspy_resilient.events import printable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_MANY = 2**40


def find(root: Path | None, client: str | None) -> list[Path]:
    """Return the folders of clients' answers, by name."""
    return [each for each in client_folders(root) if client is None or each.name == client]


def info(folders: Sequence[Path], out: TextIO) -> int:
    """Write one line for each folder: its answers, their size, and when the last one was stored."""
    if not folders:
        out.write("No answers on disk.\n")
        return 0
    out.write(f"In {folders[0].parent}:\n\n{'client':<32}{'answers':>9}{'size':>12}  newest\n")
    for folder in folders:
        found = [path.stat() for path in _entries(folder)]
        size = sum(facts.st_size for facts in found)
        newest = max((facts.st_mtime for facts in found), default=None)
        told = "-" if newest is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(newest))
        out.write(f"{printable(folder.name):<32}{len(found):>9,}{size / 2**20:>9.1f} MiB  {told}\n")
    return 0


def clear(folders: Sequence[Path], out: TextIO, *, ask: bool) -> int:
    """Delete the answers, after a question if `ask`."""
    count = sum(len(_entries(folder)) for folder in folders)
    if not count:
        out.write("No answers on disk.\n")
        return 0
    if ask:
        out.write(f"Delete {count:,} answers from {len(folders)} folders? [y/N] ")
        out.flush()
        if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
            out.write("Nothing was deleted.\n")
            return 1
    for folder in folders:
        DiskCache(folder, limit_bytes=_MANY).clear()
    left = sum(len(_entries(folder)) for folder in folders)
    out.write(f"Deleted {count - left:,} answers.\n")
    return 1 if left else 0


def export(folders: Sequence[Path], file: Path, out: TextIO) -> int:
    """Write each answer as a JSON object on a line of its own: client, key, and the stored entry."""
    try:
        target = out if str(file) == "-" else file.open("x")
    except OSError as error:
        out.write(f"{file}: {error.strerror}\n")
        return 1
    count = 0
    try:
        for folder in folders:
            for path in _entries(folder):
                try:
                    entry = json.loads(path.read_bytes().partition(b"\n")[2])
                except (OSError, ValueError):
                    continue  # damaged, or just gone
                row = {"client": folder.name, "key": path.stem, "entry": entry}
                target.write(json.dumps(row) + "\n")
                count += 1
    finally:
        if target is not out:
            target.close()
    if target is not out:
        out.write(f"Wrote {count:,} answers to {file}.\n")
    return 0


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9a-f][0-9a-f]/*.json"))
