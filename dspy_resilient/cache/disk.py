"""Answers in a folder, one JSON file each, so that they outlive the process.

Only their user can read them, whoever made the folder. A file is written beside its place and renamed into it, so a reader sees a whole entry or none, and
a killed writer loses only the entry it was writing. There is no lock, no index and no connection:
any number of threads and processes share a folder, a fork inherits nothing, and one broken file is
one miss. Every fault is a miss, counted by its kind, with one warning per cache. This module does not know what expires.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspy_resilient.cache.codec import decode, encode
from dspy_resilient.events import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dspy_resilient.cache.answer import Answer
    from dspy_resilient.policies import CachePolicy

_FORMAT = b"dspy_resilient answer 1 "
ALL_BYTES = 4 * 2**30
"""Bytes that the folders of all clients may take up together, or what one of them may, if more."""

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
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_WRITE |= getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


class DiskCache:
    """A folder of answers; safe for threads, processes and forks. Nothing is opened before use.

    Args:
        folder: Where the entries are. It is made, private to the user, at the first store.
        limit_bytes: How much the entries may take up, about. When it is reached, the entries
            stored longest ago go. The folder is cut into groups that are kept small one by one,
            so that no store has to look at all of it.
        beside: Whether all folders beside this one are such folders, which together may take up
            `ALL_BYTES`.
        clock: The client's clock, by which `Answer.stored_at` counts.
        wall: Wall-clock seconds, which are all that a later process can compare with.

    Attributes:
        errors: Faults met so far, by what was done and what came of it, e.g. "write: ENOSPC".
        skipped: Answers not kept because JSON cannot hold them, or because of their size.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        limit_bytes: int,
        beside: bool = False,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,  # noqa: TID251  # entries outlive the process
    ) -> None:
        self.folder = os.fspath(folder)
        self.errors: Counter[str] = Counter()
        self.skipped = 0
        self._clock = clock
        self._wall = wall
        self._groups, self._group_limit = _grouped(limit_bytes)
        self._all_bytes = max(ALL_BYTES, limit_bytes) if beside else None
        self._is_private = False

    def load(self, key: str) -> Answer | None:
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

    def store(self, key: str, answer: Answer) -> bool:
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
            for shard in _shards(self.folder):
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
        if not self._is_private:
            self._make_private()
        try:
            try:
                file = os.open(draft, _WRITE, 0o600)
            except FileNotFoundError:
                self._make_private()
                place.parent.mkdir(mode=0o700, exist_ok=True)
                file = os.open(draft, _WRITE, 0o600)
            with open(file, "wb") as writing:  # noqa: PTH123  # it is open already
                writing.write(text)
            # To rename over a file makes some file systems write it out at once, which takes
            # milliseconds; no entry for a moment is only a miss.
            place.unlink(missing_ok=True)
            draft.replace(place)
        except BaseException:
            with suppress(OSError, ValueError):
                draft.unlink()
            raise

    def _make_private(self) -> None:
        """Make the folder, and keep others out of one that was there before."""
        folder = Path(self.folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_mode & 0o077:
            with suppress(PermissionError):  # another user's: the files are private all the same
                folder.chmod(0o700)
        self._is_private = True

    def _is_turn_of(self, key: str, size: int) -> bool:
        """Whether to look after the group now: about once per sixteenth of its limit written.

        Keys are hashes, so a part of the key is as good as a random number, and no process has
        to remember what others have written.
        """
        return int(key[2:10], 16) / 16**8 * self._group_limit < 16 * max(size, _BLOCK)

    def _trim(self, key: str) -> None:
        """Bring the group of `key` under its limit: that of this folder, then that of all folders."""
        try:
            self._trim_group(key, [self.folder], self._groups, self._group_limit)
            if self._all_bytes is not None:
                beside = _listed(os.path.dirname(self.folder))  # noqa: PTH120  # no Path per entry
                folders = [each.path for each in beside if each.is_dir(follow_symlinks=False)]
                self._trim_group(key, folders, *_grouped(self._all_bytes))
        except OSError as error:
            self._fault("trim", error)

    def _trim_group(self, key: str, folders: list[str], groups: int, limit: int) -> None:
        """Remove what was stored longest ago until seven eighths are left, if it is over the limit."""
        group = int(key[:2], 16) % groups
        shards = (each for folder in folders for each in _shards(folder))
        mine = (each for each in shards if int(each.name, 16) % groups == group)
        found = sorted(facts for shard in mine for facts in self._removable(shard))
        total = sum(size for _, size, _ in found)
        surplus = total - limit * 7 // 8 if total > limit else 0
        for _, size, path in found:
            if surplus > 0 or path.endswith(_DRAFT):
                Path(path).unlink(missing_ok=True)
                surplus -= size

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
        name, says = type(error).__name__, type(error).__name__
        if isinstance(error, OSError):  # only the system's words: others may quote the answer
            name, says = errno.errorcode.get(error.errno or 0, name), str(error)
        self.errors[f"{doing}: {name}"] += 1
        if self.errors.total() == 1:
            logger.warning(
                "dspy_resilient.disk_cache_failed folder=%s doing=%s %s; answers are kept in "
                "memory only where the disk fails (further faults are not logged)",
                self.folder,
                doing,
                says,
                extra={"event": "dspy_resilient.disk_cache_failed", "folder": self.folder},
            )


def _head(key: str, body: bytes) -> bytes:
    """Return the first line of an entry: it ties the body to its key and shows any damage."""
    return _FORMAT + hashlib.sha256(key.encode() + b"\n" + body).hexdigest().encode()


def _listed(folder: str) -> list[os.DirEntry[str]]:
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as found:
        return list(found)
    return []


def _shards(folder: str) -> list[os.DirEntry[str]]:
    return [each for each in _listed(folder) if _SHARD.fullmatch(each.name)]


def _grouped(limit_bytes: int) -> tuple[int, int]:
    """Return how many groups a limit is kept in, and what each of them may take up."""
    groups = min(max(limit_bytes // _GROUP_BYTES, 1), _SHARDS)
    return groups, limit_bytes // groups


# Where a client's folder is


def disk_folder(
    policy: CachePolicy,
    *,
    name: str | None,
    model: str,
    model_type: str,
    endpoint: str,
    tenant: str,
) -> str | None:
    """Return the folder of a client's answers, or None for memory only.

    With "auto" that is a folder below the one where DSPy keeps its own answers, as DSPy is set up
    now, and None if DSPy keeps none: named by `name`, else by what the client asks and for whom.
    """
    if policy.disk is None:
        return None
    if policy.disk != "auto":
        folder = Path(policy.disk)
        with suppress(RuntimeError):  # a user who has no home
            folder = folder.expanduser()
        return str(folder)
    root = _dspys_folder()
    if root is None:
        return None
    what = f"{model}\n{model_type}\n{endpoint}\n{tenant}"
    own = f"lm-{_short_hash(what)}" if name is None else _file_name(name)
    return str(Path(root, "resilient", own))


def client_folders(root: str | os.PathLike[str] | None = None) -> list[Path]:
    """Return the folders of all clients below DSPy's cache folder, or below `root`."""
    if root is None:
        found = _dspys_folder()
        root = None if found is None else Path(found, "resilient")
    if root is None or not Path(root).is_dir():
        return []
    return sorted(each for each in Path(root).iterdir() if each.is_dir())


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _file_name(name: str) -> str:
    """Return `name` as one path component; names that had to be changed stay apart.

    Also where a file system takes no notice of case, or keeps names (like "nul") for itself.
    """
    safe = re.sub(r"[^a-z0-9._-]", "_", name.lower())[:64].strip(".")
    is_kept = safe == name and not _OF_WINDOWS.fullmatch(safe.partition(".")[0])
    return safe if is_kept and safe else f"{safe.replace('.', '_')}-{_short_hash(name)}"


_OF_WINDOWS = re.compile(r"con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9]")


def _dspys_folder() -> Any:
    import dspy  # noqa: PLC0415  # only "auto" asks

    cache = vars(dspy).get("cache")  # reading dspy.cache would build it
    if cache is not None and not getattr(cache, "enable_disk_cache", False):
        return None
    return (
        getattr(cache, "disk_cache_dir", None) or os.environ.get("DSPY_CACHEDIR") or _home_folder()
    )


def _home_folder() -> str:
    try:
        return str(Path.home() / ".dspy_cache")
    except RuntimeError:
        return ".dspy_cache"
