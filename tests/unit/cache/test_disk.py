"""Answers in a folder: bounded, ageing, and no fault of a disk is more than a miss."""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from dspy import lm15
from hypothesis import given
from hypothesis import strategies as st

from dspy_resilient.cache import Answer, DiskCache
from dspy_resilient.cache.codec import Attributes
from dspy_resilient.testing.clock import Clock

LIMIT = 2**24


def disk_at(folder, limit_bytes=LIMIT, clock=None, wall=None):
    return DiskCache(
        folder, limit_bytes=limit_bytes, clock=clock or Clock(), wall=wall or Clock(1e9)
    )


def key(number=0):
    return hashlib.sha256(str(number).encode()).hexdigest()


def answer(text="Paris", **record):
    return Answer.of([text], {"response": None, "model": "m", "cost": 0.5, **record})


def files(folder):
    return [each for each in Path(folder).rglob("*") if each.is_file()]


@pytest.fixture
def warnings(caplog):
    """Return what our logger has warned of so far."""
    caplog.set_level(logging.WARNING, logger="dspy_resilient")
    return lambda: [record.getMessage() for record in caplog.records]


def test_answer_comes_back_under_its_key(tmp_path):
    """What was stored is found, by any cache of the same folder."""
    assert disk_at(tmp_path).store(key(1), answer())
    found = disk_at(tmp_path).load(key(1))
    assert (found.outputs, found.key, found.cost) == (["Paris"], key(1), 0.5)
    assert disk_at(tmp_path).load(key(2)) is None


def test_what_json_cannot_hold_stays_in_memory(tmp_path, warnings):
    """It is counted, and no fault of the disk."""
    disk = disk_at(tmp_path)
    assert disk.store(key(), answer(response=object())) is False
    assert (disk.skipped, disk.errors, files(tmp_path), warnings()) == (1, {}, [], [])


# Age


def test_age_is_told_by_the_wall_clock(tmp_path):
    """An answer is as old as the time since it was stored, in whichever process."""
    wall = Clock(1e9)
    stored = answer()
    stored.stored_at = 40.0
    disk_at(tmp_path, clock=Clock(50.0), wall=wall).store(key(), stored)
    wall.advance(5)
    found = disk_at(tmp_path, clock=Clock(1000.0), wall=wall).load(key())
    assert found.stored_at == pytest.approx(985.0)


def test_answer_from_the_future_grows_old_too(tmp_path):
    """A clock that was set back must not make an answer immortal."""
    disk_at(tmp_path, wall=Clock(2000.0)).store(key(), answer())
    assert disk_at(tmp_path, wall=Clock(500.0)).load(key()).stored_at == -1500.0


# Bounds


def test_size_is_bounded(tmp_path):
    """The entries stored longest ago make room."""
    disk = disk_at(tmp_path, limit_bytes=2**20)
    for number in range(250):
        assert disk.store(key(number), answer("x" * 7000))
        os.utime(next(tmp_path.rglob(f"{key(number)}.json")), (number, number))
    assert sum(each.stat().st_size for each in files(tmp_path)) < 1.3 * 2**20
    assert disk.load(key(249)) is not None
    assert disk.load(key(0)) is None
    assert not disk.errors


def test_large_limit_is_kept_group_by_group(tmp_path):
    """A store looks at its own part of the folder only, and all parts together keep the limit."""
    disk = disk_at(tmp_path, limit_bytes=2**23)  # two groups
    for number in range(300):
        disk.store(key(number), answer("x" * 60_000))
    assert sum(each.stat().st_size for each in files(tmp_path)) < 1.3 * 2**23


def test_entry_larger_than_its_part_is_not_stored(tmp_path):
    """One huge answer does not drive out all others."""
    disk = disk_at(tmp_path, limit_bytes=2**20)
    assert disk.store(key(), answer("x" * 2**20)) is False
    assert (disk.skipped, files(tmp_path)) == (1, [])


def test_leftovers_of_killed_writers_go(tmp_path):
    """A half-written file is no entry, and is removed when it is old."""
    wall = Clock(1e9)
    disk = disk_at(tmp_path, limit_bytes=2**20, wall=wall)
    disk.store(key(), answer())
    shard = tmp_path / key()[:2]
    old, new = (shard / f"{key()}.json.{name * 12}.tmp" for name in "01")
    for leftover, changed in ((old, 1e9 - 4000), (new, 1e9 - 10)):
        leftover.write_bytes(b"half")
        os.utime(leftover, (changed, changed))
    for number in range(200):
        disk.store(key(number), answer("x" * 500))
    assert (old.exists(), new.exists()) == (False, True)
    disk.clear()  # somebody may be writing the new one
    assert files(tmp_path) == [new]


def test_clearing_removes_entries_and_nothing_else(tmp_path):
    """A user may name a folder that has other things in it."""
    disk = disk_at(tmp_path)
    for number in range(5):
        disk.store(key(number), answer())
    others = [
        tmp_path / "notes.txt",
        tmp_path / key()[:2] / "notes.json",
        tmp_path / "ab" / "x.tmp",
    ]
    for other in others:
        other.parent.mkdir(exist_ok=True)
        other.write_text("mine")
    disk.clear()
    disk_at(tmp_path / "not there").clear()
    assert sorted(files(tmp_path)) == sorted(others)
    assert not disk.errors


# Faults


def broken(folder, change):
    """Store an answer below `folder`, change its file, and return the cache."""
    disk = disk_at(folder)
    disk.store(key(), answer("Paris" * 50))
    (file,) = files(folder)
    file.write_bytes(change(file.read_bytes()))
    return disk


@given(data=st.data())
def test_entry_damaged_at_any_byte_is_a_miss(tmp_path_factory, data):
    """One flipped bit anywhere is found; the entry is dropped and stored anew."""
    folder = tmp_path_factory.mktemp("damaged")

    def flip(text):
        place = data.draw(st.integers(0, len(text) - 1))
        return (
            text[:place]
            + bytes([text[place] ^ 1 << data.draw(st.integers(0, 7))])
            + text[place + 1 :]
        )

    disk = broken(folder, flip)
    assert disk.load(key()) is None
    assert (disk.errors.total(), files(folder)) == (1, [])
    assert disk.store(key(), answer("Rome"))
    assert disk.load(key()).outputs == ["Rome"]


@given(cut=st.integers(0, 300), more=st.binary(max_size=50))
def test_truncated_entry_is_a_miss(tmp_path_factory, cut, more):
    """Whatever a crash of the machine left of a file is no answer."""
    disk = broken(tmp_path_factory.mktemp("cut"), lambda text: text[:cut] + more)
    assert disk.load(key()) is None


@given(rubbish=st.binary(max_size=200))
def test_rubbish_is_a_miss(tmp_path_factory, rubbish):
    """Any bytes in an entry's place are no answer."""
    assert broken(tmp_path_factory.mktemp("rubbish"), lambda _: rubbish).load(key()) is None


def forged(body, name=None):
    """An entry whose checksum is right, whatever it says."""
    name = key() if name is None else name
    digest = hashlib.sha256(name.encode() + b"\n" + body).hexdigest()
    return b"dspy_resilient answer 1 " + digest.encode() + b"\n" + body


FINE = {"outputs": ["Paris"], "record": None, "target": "", "tokens": 0, "stored": 1.0}
HOSTILE = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep outputs": json.dumps({**FINE, "outputs": "@"})
    .encode()
    .replace(b'"@"', b"[" * 200 + b"]" * 200),
    "huge number": json.dumps({**FINE, "tokens": "@"}).encode().replace(b'"@"', b"9" * 10_000),
    "infinity": json.dumps({**FINE, "stored": float("inf")}).encode(),
    "too large": json.dumps({**FINE, "stored": 0}).encode().replace(b"0}", b"1e999}"),
    "no number": json.dumps({**FINE, "stored": "now"}).encode(),
    "no tokens": json.dumps({**FINE, "tokens": True}).encode(),
    "no outputs": json.dumps({**FINE, "outputs": "Paris"}).encode(),
    "no record": json.dumps({**FINE, "record": []}).encode(),
    "missing": json.dumps({"outputs": []}).encode(),
    "other form": json.dumps({**FINE, "outputs": {"$": "evil", "of": {}}}).encode(),
    "form no str": json.dumps({**FINE, "outputs": {"$": ["x"], "of": {}}}).encode(),
    "no content": json.dumps({**FINE, "outputs": {"$": "tuple"}}).encode(),
    "other type": json.dumps(
        {**FINE, "outputs": {"$": "typed", "class": "OpenAILM", "of": {}}}
    ).encode(),
    "bad type": json.dumps(
        {**FINE, "outputs": {"$": "typed", "class": "Response", "of": {}}}
    ).encode(),
    "not utf-8": b'{"outputs": ["\xff"]}',
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_json_is_a_miss(tmp_path, warnings, body):
    """Even an entry with a right checksum is believed only as far as it makes sense."""
    disk = broken(tmp_path, lambda _: forged(body))
    assert disk.load(key()) is None
    assert len(warnings()) == 1


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
NAMES = st.sampled_from(
    ["response", "usage", "cost", "model", "choices", "message", "__class__", "__dict__", "x"]
)
CLASSES = st.sampled_from(
    ["litellm.types.utils:ModelResponse", "litellm.types.utils:Usage", "os:system", "Response"]
)


def with_forms(inner):
    """Everything that JSON may hold, and everything that an entry may say in it, made of `inner`."""
    fields = st.dictionaries(NAMES, inner, max_size=4)
    return (
        st.lists(inner, max_size=3)
        | fields
        | st.fixed_dictionaries({"$": st.just("tuple"), "of": st.lists(inner, max_size=3)})
        | st.fixed_dictionaries({"$": st.sampled_from(["dict", "attributes"]), "of": fields})
        | st.fixed_dictionaries({"$": st.just("typed"), "class": CLASSES, "of": fields})
        | st.fixed_dictionaries(
            {
                "$": st.just("object"),
                "class": CLASSES,
                "unset": st.lists(NAMES, max_size=2),
                "of": st.tuples(fields, st.none() | fields),
            }
        )
    )


ANYTHING = st.recursive(LEAVES, with_forms, max_leaves=12)


@given(
    outputs=ANYTHING,
    record=st.none() | st.dictionaries(NAMES, ANYTHING, max_size=4) | ANYTHING,
    rest=st.fixed_dictionaries(
        {}, optional={"target": ANYTHING, "tokens": ANYTHING, "stored": ANYTHING}
    ),
)
def test_whatever_an_entry_says_it_is_a_hit_or_a_miss(tmp_path_factory, outputs, record, rest):
    """No exception leaves: neither when it is read nor when the answer is handed out."""
    body = json.dumps({**FINE, "outputs": outputs, "record": record, **rest}).encode()
    found = broken(tmp_path_factory.mktemp("forged"), lambda _: forged(body)).load(key())
    if found is not None:
        found.fresh_outputs()
        found.replayed_record()
        assert isinstance(found.tokens, int)
        assert found.cost is None or isinstance(found.cost, (int, float))


@pytest.mark.parametrize(
    "place",
    ["os:system", "subprocess:Popen", "litellm.types.utils:os", "litellm:nothing", "litellm", ""],
)
def test_restored_objects_run_nothing(tmp_path, place):
    """A class outside litellm and openai, or no class at all, is never made."""
    evil = {"$": "object", "class": place, "unset": [], "of": [{"command": "false"}, None]}
    disk = broken(
        tmp_path, lambda _: forged(json.dumps({**FINE, "record": {"response": evil}}).encode())
    )
    assert type(disk.load(key()).record["response"]) is Attributes


def test_entry_under_another_name_is_a_miss(tmp_path):
    """An entry belongs to its key: a renamed file answers nothing."""
    disk = disk_at(tmp_path)
    disk.store(key(1), answer())
    (file,) = files(tmp_path)
    other = Path(disk._path(key(2)))
    other.parent.mkdir(exist_ok=True)
    file.rename(other)
    assert (disk.load(key(1)), disk.load(key(2))) == (None, None)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_what_is_no_file_is_a_miss(tmp_path):
    """A folder, a link or a pipe in an entry's place neither answers nor blocks."""
    elsewhere = disk_at(tmp_path / "elsewhere")
    elsewhere.store(key(1), answer())
    disk = disk_at(tmp_path / "here")
    for number in range(3):
        Path(disk._path(key(number))).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(disk._path(key(0)))
    Path(disk._path(key(1))).symlink_to(elsewhere._path(key(1)))
    Path(disk._path(key(2))).mkdir()
    assert [disk.load(key(number)) for number in range(3)] == [None] * 3
    assert disk.store(key(2), answer()) is False
    disk.evict(key(2))
    assert elsewhere.load(key(1)) is not None


@pytest.mark.parametrize("where", ["below a file", "no name", "not a path"])
def test_folder_that_cannot_be_is_a_miss_and_one_warning(tmp_path, warnings, where):
    """The first fault is logged, the others are counted, and no call fails."""
    (tmp_path / "file").write_text("")
    folder = {
        "below a file": tmp_path / "file" / "folder",
        "no name": str(tmp_path / ("x" * 5000)),
        "not a path": "nul\0",
    }[where]
    disk = disk_at(folder)
    for number in range(3):
        assert disk.store(key(number), answer()) is False
        assert disk.load(key(number)) is None
        disk.evict(key(number))
    disk.clear()
    assert disk.errors.total() > 3
    assert len(warnings()) == 1


def test_folder_deleted_under_our_feet_is_made_again(tmp_path, warnings):
    """What was there is a miss, and what comes is stored."""
    import shutil

    disk = disk_at(tmp_path / "answers")
    disk.store(key(1), answer())
    shutil.rmtree(tmp_path / "answers")
    assert disk.load(key(1)) is None
    disk.evict(key(1))
    assert disk.store(key(2), answer())
    assert disk.load(key(2)) is not None
    assert warnings() == []


def onto_full_disk(path, flags, mode=0o777, opened=os.open):
    if not flags & os.O_CREAT:
        return opened(path, flags, mode)
    os.close(opened(path, flags, mode))
    return opened("/dev/full", os.O_WRONLY)


def onto_read_only_disk(path, flags=os.O_CREAT, mode=0o777, opened=os.open):
    if not flags & os.O_CREAT:
        return opened(path, flags, mode)
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("onto", "kind"), [(onto_full_disk, "ENOSPC"), (onto_read_only_disk, "EROFS")]
)
def test_disk_that_takes_no_more_still_answers(tmp_path, warnings, monkeypatch, onto, kind):
    """What is there is read; an entry that did not fit leaves nothing behind."""
    disk = disk_at(tmp_path)
    disk.store(key(1), answer())
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", onto)
        assert disk.store(key(2), answer()) is False
        assert disk.store(key(1), answer("Rome")) is False
    assert disk.load(key(1)).outputs == ["Paris"]
    assert [file.name for file in files(tmp_path)] == [f"{key(1)}.json"]
    assert disk.errors == {f"write: {kind}": 2}
    assert len(warnings()) == 1


def test_folder_that_cannot_be_tidied_still_stores(tmp_path, warnings, monkeypatch):
    """An entry is there, whether room can be made or not."""
    disk = disk_at(tmp_path, limit_bytes=2**20)
    monkeypatch.setattr(os, "scandir", onto_read_only_disk)
    assert all(disk.store(key(number), answer("x" * 8000)) for number in range(40))
    disk.clear()
    assert len(warnings()) == 1


def test_warning_quotes_no_answer(tmp_path, warnings):
    """A fault is told without what the answer says."""
    wrong = {**dataclasses.asdict(lm15.Usage()), "input_tokens": "the answer"}
    body = {**FINE, "outputs": {"$": "typed", "class": "Usage", "of": wrong}}
    assert broken(tmp_path, lambda _: forged(json.dumps(body).encode())).load(key()) is None
    assert "the answer" not in warnings()[0]


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions")
@pytest.mark.parametrize("made_by", ["us", "the user", "an older version"])
def test_no_other_user_reads_the_answers(tmp_path, made_by):
    """Files are 0600 and folders 0700, whoever made the folder, and whatever the umask."""
    folder = tmp_path / "answers"
    before = os.umask(0)
    try:
        if made_by != "us":
            folder.mkdir(mode=0o755)
        if made_by == "an older version":
            (folder / key()[:2]).mkdir(mode=0o755)
        assert disk_at(folder).store(key(), answer())
        assert disk_at(folder).store(key(1), answer())
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in files(folder)} == {0o600}
    if made_by != "an older version":
        assert {each.stat().st_mode & 0o777 for each in folder.iterdir()} == {0o700}


def test_all_folders_together_are_bounded(tmp_path, monkeypatch):
    """A hundred configurations do not fill a disk: what was stored longest ago makes room."""
    monkeypatch.setattr("dspy_resilient.cache.disk.ALL_BYTES", 2**21)
    disks = [
        DiskCache(tmp_path / str(number), limit_bytes=2**20, beside=True, wall=Clock(1e9))
        for number in range(8)
    ]
    for number in range(1600):
        assert disks[number % 8].store(key(number), answer("x" * 7000))
        written = tmp_path / str(number % 8) / key(number)[:2] / f"{key(number)}.json"
        if written.exists():
            os.utime(written, (number, number))
    assert sum(each.stat().st_size for each in files(tmp_path)) < 1.3 * 2**21
    assert disks[1599 % 8].load(key(1599)) is not None
    assert disks[0].load(key(0)) is None
    assert not any(disk.errors for disk in disks)


def test_a_folder_of_the_users_is_bounded_by_itself(tmp_path, monkeypatch):
    """What lies beside it is none of ours."""
    monkeypatch.setattr("dspy_resilient.cache.disk.ALL_BYTES", 2**20)
    other = tmp_path / "other" / key()[:2]
    other.mkdir(parents=True)
    (other / f"{key()}.json").write_bytes(b"x" * 2**21)
    disk = disk_at(tmp_path / "own", limit_bytes=2**20)
    for number in range(250):
        disk.store(key(number), answer("x" * 7000))
    assert (other / f"{key()}.json").exists()


def test_threads_share_one_folder(tmp_path):
    """Writers, readers and removers of the same few entries never see a half of one."""
    disk = disk_at(tmp_path)
    start = threading.Barrier(6)

    def work(seed):
        start.wait()
        for number in range(60):
            place = (number + seed) % 5
            disk.store(key(place), answer(str(place) * 5000))
            found = disk.load(key((place + seed) % 5))
            assert found is None or found.outputs == [str((place + seed) % 5) * 5000]
            if number % 20 == seed:
                disk.evict(key(place))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert not disk.errors
