"""The cache with its look-ups and its stores each in one step, in the order in which a call makes them."""

from dspy_resilient.cache import ResponseCache


class WholeCache(ResponseCache):
    """For tests that ask for nothing between the steps."""

    def get(self, key):
        """Look in memory, then on disk."""
        answer = self.recall(key)
        return answer if answer is not None or not self.has_disk else self.load(key)

    def put(self, key, answer):
        """Store in memory, then on disk."""
        self.store(key, answer)
        self.save(answer)
