"""What a client remembers: keys, answers, and identical calls under way."""

from dspy_resilient.cache.answer import Answer, broken_off, ended, flaw_of, usable
from dspy_resilient.cache.disk import DiskCache, disk_folder
from dspy_resilient.cache.response_cache import CacheNumbers, ResponseCache
from dspy_resilient.cache.single_flight import Failed, Flights, Landed, Lead, Waiter

__all__ = [
    "Answer",
    "CacheNumbers",
    "DiskCache",
    "Failed",
    "Flights",
    "Landed",
    "Lead",
    "ResponseCache",
    "Waiter",
    "broken_off",
    "disk_folder",
    "ended",
    "flaw_of",
    "usable",
]
