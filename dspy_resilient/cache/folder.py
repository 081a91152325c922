"""Where a client's answers outlive the process.

This module names the folder. It makes none, and it looks into none.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspy_resilient.policies import CachePolicy


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
    """Return `name` as one path component; names that had to be changed stay apart."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:64].lstrip(".")
    return safe if safe == name != "" else f"{safe}-{_short_hash(name)}"


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
