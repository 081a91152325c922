"""Where a client's answers are kept: below DSPy's own folder, or where the user says."""

from pathlib import Path
from types import SimpleNamespace

import dspy
import pytest

from dspy_resilient.cache import disk_folder
from dspy_resilient.policies import CachePolicy

CLIENT = {"model": "openai/m", "model_type": "chat", "endpoint": "", "tenant": ""}


@pytest.fixture
def dspys_folder(tmp_path, monkeypatch):
    """DSPy's cache folder, with DSPy's own cache not built yet."""
    monkeypatch.setenv("DSPY_CACHEDIR", str(tmp_path))
    monkeypatch.delitem(vars(dspy), "cache", raising=False)
    return tmp_path


def test_same_configuration_has_the_same_folder(dspys_folder):
    """A restarted process finds its answers; another model, place or tenant has its own."""
    folders = [disk_folder(CachePolicy(), name=None, **CLIENT)]
    folders += [disk_folder(CachePolicy(), name=None, **{**CLIENT, part: "x"}) for part in CLIENT]
    folders += [disk_folder(CachePolicy(), name="fast", **CLIENT)]
    assert len(set(folders)) == len(folders)
    assert folders[0] == disk_folder(CachePolicy(), name=None, **CLIENT)
    assert all(Path(folder).parent == dspys_folder / "resilient" for folder in folders)
    assert Path(folders[-1]).name == "fast"
    assert "cache" not in vars(dspy)
    assert list(dspys_folder.iterdir()) == []


@pytest.mark.parametrize("name", ["../../etc", "a/b", "a\\b", "..", "", "nul\0", "é", "x" * 300])
def test_no_name_leads_out_of_the_folder(dspys_folder, name):
    """A name is one folder, whatever is in it, and another name another one."""
    folder = Path(disk_folder(CachePolicy(), name=name, **CLIENT))
    assert folder.resolve().parent == dspys_folder.resolve() / "resilient"
    assert len(folder.name) < 100
    assert folder != Path(disk_folder(CachePolicy(), name=name.replace("/", "_") + "_", **CLIENT))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Fast", "fast"),
        ("nul", "nul_"),
        ("CON", "con"),
        ("com1.txt", "com1"),
        ("a.", "a"),
        ("É", "é"),
    ],
)
def test_names_that_a_file_system_takes_for_one_stay_apart(dspys_folder, one, other):
    """Case is no difference on macOS and Windows, which keeps some names for devices."""
    folders = [Path(disk_folder(CachePolicy(), name=name, **CLIENT)).name for name in (one, other)]
    assert folders[0].casefold() != folders[1].casefold()
    for folder in folders:
        assert folder.partition(".")[0] not in {"con", "nul", "com1", "aux", "prn"}
        assert folder == folder.lower().strip(". ")


def test_disk_follows_dspys_own(dspys_folder, monkeypatch):
    """Where DSPy keeps its answers we keep ours, and nowhere if it keeps none."""
    monkeypatch.setitem(
        vars(dspy), "cache", SimpleNamespace(enable_disk_cache=True, disk_cache_dir="/fast")
    )
    assert disk_folder(CachePolicy(), name="n", **CLIENT) == str(Path("/fast/resilient/n"))
    monkeypatch.setitem(vars(dspy), "cache", SimpleNamespace(enable_disk_cache=False))
    assert disk_folder(CachePolicy(), name="n", **CLIENT) is None


def test_folder_of_the_user_is_taken_as_given(tmp_path):
    """`disk=` names the folder itself, and None ends the disk."""
    assert disk_folder(CachePolicy(disk=str(tmp_path)), name="n", **CLIENT) == str(tmp_path)
    assert disk_folder(CachePolicy(disk="~/x"), name="n", **CLIENT) == str(Path.home() / "x")
    assert disk_folder(CachePolicy(disk="~nobody.at.all/x"), name="n", **CLIENT) is not None
    assert disk_folder(CachePolicy(disk=None), name="n", **CLIENT) is None


def test_without_a_home_the_folder_is_here(monkeypatch):
    """As for DSPy: no home folder is no reason to fail."""
    monkeypatch.delenv("DSPY_CACHEDIR", raising=False)
    monkeypatch.delitem(vars(dspy), "cache", raising=False)
    monkeypatch.setattr(Path, "home", _no_home)
    folder = disk_folder(CachePolicy(), name="n", **CLIENT)
    assert folder == str(Path(".dspy_cache/resilient/n"))
    monkeypatch.undo()
    monkeypatch.delenv("DSPY_CACHEDIR", raising=False)
    monkeypatch.delitem(vars(dspy), "cache", raising=False)
    folder = disk_folder(CachePolicy(), name="n", **CLIENT)
    assert folder == str(Path.home() / ".dspy_cache/resilient/n")


def _no_home():
    raise RuntimeError("no home")
