"""Answers in a folder, one JSON file each, so that they outlive the process.

A file is written beside its place and renamed into it, so a reader sees a whole entry or none, and
a killed writer loses only the entry it was writing. There is no lock, no index and no connection:
any number of threads and processes share a folder, a fork inherits nothing, and one broken file is
one miss. Every fault is a miss, with one warning per cache. This module does not know what expires.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dspy_resilient.cache.codec import decode, encode
from dspy_resilient.events import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dspy_resilient.cache.answer import Answer

_FORMAT = b"dspy_resilient answer 1 "
_GROUP_BYTES = 4 * 2**20
_SHARDS = 256
_BLOCK = 4096
_ABANDONED = 3600.0
_DRAFT = ".tmp"
_SHARD = re.compile("[0-9a-f]{2}")
_OURS = re.compile(rf"[0-9a-f]{{64}}\.json(\.[0-9a-f]{{12}}\{_DRAFT})?")
# A link or a pipe in an entry's place is no entry; opening a pipe would block for ever.
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_READ |= getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


class DiskCache:
    """A folder of answers; safe for threads, processes and forks. Nothing is opened before use.

    Args:
        folder: Where the entries are. It is made, private to the user, at the first store.
        limit_bytes: How much the entries may take up, about. When it is reached, the entries
            stored longest ago go. The folder is cut into groups that are kept small one by one,
            so that no store has to look at all of it.
        clock: The client's clock, by which `Answer.stored_at` counts.
        wall: Wall-clock seconds, which are all that a later process can compare with.

    Attributes:
        errors: Faults met so far.
        skipped: Answers not kept because JSON cannot hold them, or because of their size.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        limit_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,  # noqa: TID251  # entries outlive the process
    ) -> None:
        self.folder = os.fspath(folder)
        self.errors = 0
        self.skipped = 0
        self._clock = clock
        self._wall = wall
        self._groups = min(max(limit_bytes // _GROUP_BYTES, 1), _SHARDS)
        self._group_limit = limit_bytes // self._groups
        self._faults = itertools.count(1)

    def get(self, key: str) -> Answer | None:
        """Return the answer stored under `key`, or None; never raise, never wait for anybody."""
        try:
            text = self._read(self._path(key))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._fault("read", error)
            return None
        try:
            head, _, body = text.partition(b"\n")
            if head != _head(key, body):
                raise ValueError("damaged entry")  # noqa: TRY301  # as any other damage
            answer, stored = decode(body)
        except Exception as error:  # noqa: BLE001  # whatever is in there is no answer
            self._fault("read", error)
            self.evict(key)
            return None
        # An entry from the future (a clock was set back) must not live for ever.
        answer.stored_at = self._clock() - abs(self._wall() - stored)
        answer.key = key
        return answer

    def put(self, key: str, answer: Answer) -> bool:
        """Store `answer` under `key` and return whether it is there now; never raise."""
        try:
            body = encode(answer, self._wall() - (self._clock() - answer.stored_at))
        except Exception:  # noqa: BLE001  # a value that JSON cannot hold, of whatever kind
            self.skipped += 1
            return False
        text = b"%s\n%s" % (_head(key, body), body)
        if len(text) > self._group_limit:
            self.skipped += 1
            return False
        try:
            self._write(self._path(key), text)
        except (OSError, ValueError) as error:
            self._fault("write", error)
            return False
        if self._is_turn_of(key, len(text)):
            self._trim(key)
        return True

    def evict(self, key: str) -> None:
        """Remove the entry of `key`, if there is one."""
        try:
            Path(self._path(key)).unlink(missing_ok=True)
        except (OSError, ValueError) as error:
            self._fault("remove", error)

    def clear(self) -> None:
        """Remove every entry of the folder, other processes' too, and nothing that is not ours."""
        try:
            for shard in self._shards():
                for _, _, path in self._removable(shard):
                    Path(path).unlink(missing_ok=True)
        except (OSError, ValueError) as error:
            self._fault("clear", error)

    def _path(self, key: str) -> str:
        return f"{self.folder}/{key[:2]}/{key}.json"

    def _read(self, path: str) -> bytes:
        file = os.open(path, _READ)
        try:
            facts = os.fstat(file)
            if not stat.S_ISREG(facts.st_mode) or facts.st_size > self._group_limit:
                raise ValueError("not an entry")
            return os.read(file, facts.st_size + 1)
        finally:
            os.close(file)

    def _write(self, path: str, text: bytes) -> None:
        place = Path(path)
        draft = Path(f"{path}.{os.urandom(6).hex()}{_DRAFT}")
        try:
            try:
                file = draft.open("xb")
            except FileNotFoundError:
                Path(self.folder).mkdir(mode=0o700, parents=True, exist_ok=True)
                place.parent.mkdir(exist_ok=True)
                file = draft.open("xb")
            with file:
                file.write(text)
            # To rename over a file makes some file systems write it out at once, which takes
            # milliseconds; no entry for a moment is only a miss.
            place.unlink(missing_ok=True)
            draft.replace(place)
        except BaseException:
            with suppress(OSError, ValueError):
                draft.unlink()
            raise

    def _shards(self) -> list[os.DirEntry[str]]:
        return [each for each in _listed(self.folder) if _SHARD.fullmatch(each.name)]

    def _is_turn_of(self, key: str, size: int) -> bool:
        """Whether to look after the group now: about once per sixteenth of its limit written.

        Keys are hashes, so a part of the key is as good as a random number, and no process has
        to remember what others have written.
        """
        return int(key[2:10], 16) / 16**8 * self._group_limit < 16 * max(size, _BLOCK)

    def _trim(self, key: str) -> None:
        """Bring the group of `key` under seven eighths of its limit, if it is over the limit."""
        group = int(key[:2], 16) % self._groups
        try:
            shards = (each for each in self._shards() if int(each.name, 16) % self._groups == group)
            found = sorted(facts for shard in shards for facts in self._removable(shard))
            total = sum(size for _, size, _ in found)
            surplus = total - self._group_limit * 7 // 8 if total > self._group_limit else 0
            for _, size, path in found:
                if surplus > 0 or path.endswith(_DRAFT):
                    Path(path).unlink(missing_ok=True)
                    surplus -= size
        except OSError as error:
            self._fault("trim", error)

    def _removable(self, shard: os.DirEntry[str]) -> Iterator[tuple[float, int, str]]:
        """Yield time of change, bytes taken up and path of each entry and each abandoned draft."""
        abandoned = self._wall() - _ABANDONED
        for file in _listed(shard.path):
            if _OURS.fullmatch(file.name):
                with suppress(FileNotFoundError):
                    facts = file.stat(follow_symlinks=False)
                    if not file.name.endswith(_DRAFT) or facts.st_mtime < abandoned:
                        yield facts.st_mtime, -(-facts.st_size // _BLOCK) * _BLOCK, file.path

    def _fault(self, doing: str, error: Exception) -> None:
        self.errors = next(self._faults)
        if self.errors == 1:
            # Only the system's own words: another error may quote the answer.
            what = error if isinstance(error, OSError) else type(error).__name__
            logger.warning(
                "dspy_resilient.disk_cache_failed folder=%s doing=%s %s; answers are kept in "
                "memory only where the disk fails (further faults are not logged)",
                self.folder,
                doing,
                what,
                extra={"event": "dspy_resilient.disk_cache_failed", "folder": self.folder},
            )


def _head(key: str, body: bytes) -> bytes:
    """Return the first line of an entry: it ties the body to its key and shows any damage."""
    return _FORMAT + hashlib.sha256(key.encode() + b"\n" + body).hexdigest().encode()


def _listed(folder: str) -> list[os.DirEntry[str]]:
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as found:
        return list(found)
    return []
