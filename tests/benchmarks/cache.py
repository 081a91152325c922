"""What the cache costs beside DSPy's own, measured side by side in one run.

    python tests/benchmarks/cache.py

Both sides do the whole of what a call would ask of them: find the key, look up, and hand out
something the caller may change. Batches alternate and the median batch counts, so that a busy
machine disturbs both alike: read the ratios, not the times. DSPy's global cache is not touched.
"""

import gc
import itertools
import os
import statistics
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

from dspy.clients import Cache
from litellm import ModelResponse
from whole_cache import WholeCache

from dspy_resilient.cache import Answer
from dspy_resilient.policies import CachePolicy
from dspy_resilient.providers.endpoint import resolve
from dspy_resilient.targets.request_key import key_of

ROUNDS = 15
IGNORED = ["api_key", "api_base", "base_url"]
SETTINGS = {"temperature": 0.7, "max_tokens": 1000, "rollout_id": None, "api_key": "sk-benchmark"}
numbers = itertools.count()


def messages(size):
    half = "what a person might ask " * (size // 48)
    return [{"role": "system", "content": half}, {"role": "user", "content": half}]


def response(number=0):
    message = {"role": "assistant", "content": f"an answer of some words {number} " * 8}
    return ModelResponse(
        model="gpt-4o-mini",
        choices=[{"finish_reason": "stop", "message": message}],
        usage={"prompt_tokens": 150, "completion_tokens": 50, "total_tokens": 200},
    )


def entry(answered):
    return {
        "prompt": None,
        "messages": messages(600),
        "kwargs": {},
        "response": answered,
        "usage": dict(answered.usage),
        "cost": 0.001,
        "timestamp": "2026-01-01T00:00:00",
        "uuid": "0" * 36,
        "model": "openai/gpt-4o-mini",
        "response_model": "gpt-4o-mini",
        "model_type": "chat",
    }


def answer(answered):
    return Answer.of([answered.choices[0].message.content], entry(answered), target="openai/m")


def our_key(asked):
    settings = {**SETTINGS, "messages": asked}
    place = resolve("openai/gpt-4o-mini", "chat", settings)
    return key_of(place, "__call__", (), settings)


def their_request(asked):
    # DSPy copies the request before it is keyed, because LiteLLM may change it.
    return {"model": "openai/gpt-4o-mini", "messages": asked, **SETTINGS, "_fn_identifier": "x"}


def seconds(work, times):
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times


def compare(name, ours, theirs, times=300):
    """Print the median cost of both in microseconds, and the ratio of the two."""
    ours(), theirs()
    pairs = [(seconds(ours, times), seconds(theirs, times)) for _ in range(ROUNDS)]
    mine, other = (statistics.median(side) * 1e6 for side in zip(*pairs, strict=True))
    print(f"{name:44} {mine:10.1f} {other:10.1f} {mine / other:8.2f}x")


def hand_out(cache, asked):
    found = cache.get(our_key(asked))
    return found.fresh_outputs(), found.replayed_record()


def keys():
    theirs = Cache(False, True, None)
    for size in (600, 100_000):
        asked = messages(size)
        compare(
            f"key, {size:,} characters (us)",
            lambda asked=asked: our_key(asked),
            lambda asked=asked: theirs.cache_key(their_request(asked), IGNORED),
            times=300 if size < 1000 else 50,
        )


def hits(entries):
    ours, theirs = WholeCache(CachePolicy(max_entries=entries)), Cache(False, True, None)
    for number in range(entries - 1):
        answered = response() if entries < 1000 else None
        ours.put(f"{number:064x}", Answer(["x"], None))
        theirs.memory_cache[f"{number:064x}"] = answered
    asked = messages(600)
    ours.put(our_key(asked), answer(response()))
    theirs.put(their_request(asked), response(), IGNORED)
    compare(
        f"hit in memory among {entries:,} (us)",
        lambda: hand_out(ours, asked),
        lambda: theirs.get(their_request(asked), IGNORED),
    )
    return ours, theirs, asked


def disk(folder):
    policy = CachePolicy(disk_bytes=2**30)
    ours = WholeCache(policy, folder=str(folder / "ours"))
    theirs = Cache(True, False, folder / "theirs", 2**30)
    asked = messages(600)
    ours.put(our_key(asked), answer(response()))
    theirs.put(their_request(asked), response(), IGNORED)

    def ours_from_disk():
        ours.close()  # forget the copy in memory
        return hand_out(ours, asked)

    compare(
        "hit on disk (us)", ours_from_disk, lambda: theirs.get(their_request(asked), IGNORED), 100
    )
    answered = response()
    both = Cache(True, True, folder / "both", 2**30)
    compare(
        "store, in memory and on disk (us)",
        lambda: ours.put(our_key([*asked, {"n": next(numbers)}]), answer(answered)),
        lambda: both.put(their_request([*asked, {"n": next(numbers)}]), answered, IGNORED),
        times=40,
    )


def threads(ours, theirs, asked, count=64, times=60):
    """Compare the time until many threads have had their hits."""

    def storm(work):
        start = threading.Barrier(count + 1)

        def run():
            start.wait()
            for _ in range(times):
                work()

        crowd = [threading.Thread(target=run) for _ in range(count)]
        for thread in crowd:
            thread.start()
        start.wait()
        for thread in crowd:
            thread.join()

    compare(
        f"{count} threads, {times} hits each (us in all)",
        lambda: storm(lambda: hand_out(ours, asked)),
        lambda: storm(lambda: theirs.get(their_request(asked), IGNORED)),
        times=1,
    )


def memory(count=2000):
    """Return the bytes that one more entry takes, ours and DSPy's."""

    def growth(store):
        gc.collect()
        tracemalloc.start()
        for number in range(count):
            store(number)
        gc.collect()
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return size / count

    ours, theirs = WholeCache(CachePolicy()), Cache(False, True, None)
    asked = messages(600)
    mine = growth(lambda n: ours.put(our_key([*asked, {"n": n}]), answer(response(n))))
    other = growth(lambda n: theirs.put(their_request([*asked, {"n": n}]), response(n), IGNORED))
    return mine, other


def main():
    print(f"{'':44} {'ours':>10} {'DSPy':>10} {'ratio':>9}")
    keys()
    hits(1)
    large = hits(100_000)
    threads(*large)
    with tempfile.TemporaryDirectory() as folder:
        disk(Path(folder))
    mine, other = memory()
    print(f"{'memory of an entry (bytes)':44} {mine:10.0f} {other:10.0f} {mine / other:8.2f}x")


if __name__ == "__main__":
    main()
