"""An evaluation that tells what was lost from what was wrong.

`dspy.Evaluate` gives an example whose call failed a score like any other, 0 unless told otherwise:
an outage looks like a bad program. Here it has no score. Everything else is DSPy's.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import dspy
from dspy.evaluate.evaluate import EvaluationResult

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("dspy_resilient")


@dataclass(frozen=True, eq=False)
class Lost:
    """An example without a score.

    Attributes:
        place: Its place in the devset.
        example: The example.
        error: What the program or the metric raised.
    """

    place: int
    example: Any
    error: Exception | None


class Evaluate(dspy.Evaluate):
    """A `dspy.Evaluate` whose score is that of the examples that were answered.

    Takes its arguments, but for `failure_score`: an example whose program or metric raised has no
    score (nan in `results`, tables and files). The result names them, with their errors, and a
    warning says how many there are. After `max_errors` of them it ends as DSPy's does, and the
    error says why.

    Example:
        >>> from dspy_resilient import Evaluate
        >>> example = dspy.Example(question="?", answer="Paris").with_inputs("question")
        >>> evaluate = Evaluate(devset=[example], metric=lambda example, got: 1.0)
        >>> result = evaluate(lambda question: dspy.Prediction(answer="Paris"))
        >>> result.score, result.lost
        (100.0, [])
    """

    def __init__(self, **settings: Any) -> None:
        if "failure_score" in settings:
            raise TypeError("Evaluate: failure_score is not taken: a lost example has no score")
        super().__init__(failure_score=float("nan"), **settings)

    def __call__(
        self,
        program: Any,
        metric: Callable[..., Any] | None = None,
        devset: list[Any] | None = None,
        **settings: Any,
    ) -> Evaluation:
        """Evaluate `program` as `dspy.Evaluate` does.

        Returns:
            DSPy's result, with `lost` and `repeat()`.
        """
        examples = self.devset if devset is None else devset
        errors = _Errors(program, self.metric if metric is None else metric)
        try:
            found = super().__call__(errors.program, errors.metric, examples, **settings)
        except Exception as cancelled:
            if told := errors.reasons():
                cancelled.add_note(f"lost, not wrong: {told}")
            raise
        lost = [
            Lost(index, example, errors.of(example))
            for index, (example, _, score) in enumerate(found.results)
            if score is self.failure_score
        ]
        if lost:
            logger.warning(
                "dspy_resilient.examples_lost %d of %d: %s",
                len(lost),
                len(found.results),
                _reasons(lost),
            )
        return Evaluation(found.results, lost, lambda some: self(program, metric, some, **settings))


class Evaluation(EvaluationResult):
    """What an evaluation has found.

    Attributes:
        score: Percentage over the examples that were answered; nan if none was.
        results: (example, prediction, score) of every example; a lost one has nan for a score.
        lost: The examples without a score, each a `Lost`.
    """

    def __init__(
        self,
        results: list[tuple[Any, Any, Any]],
        lost: list[Lost],
        again: Callable[[list[Any]], Evaluation],
    ) -> None:
        missing = {each.place for each in lost}
        scores = [score for place, (*_, score) in enumerate(results) if place not in missing]
        mean = round(100 * sum(scores) / len(scores), 2) if scores else float("nan")
        super().__init__(score=mean, results=results)
        self.lost = lost
        self._again = again

    def repeat(self) -> Evaluation:
        """Evaluate the lost examples once more, and return the whole with what has come of it."""
        if not self.lost:
            return self
        places = [each.place for each in self.lost]
        more = self._again([each.example for each in self.lost])
        results = list(self.results)
        for place, result in zip(places, more.results, strict=True):
            results[place] = result
        lost = [replace(each, place=places[each.place]) for each in more.lost]
        return Evaluation(results, lost, self._again)

    def __repr__(self) -> str:
        """Return the score, of how many, and why there are not more."""
        told = f", lost={len(self.lost)} ({_reasons(self.lost)})" if self.lost else ""
        return f"Evaluation(score={self.score}, results=<{len(self.results)} results>{told})"


class _Errors:
    """A program and a metric whose errors are kept on their way to DSPy, which drops them."""

    def __init__(self, program: Any, metric: Any) -> None:
        self._program = program
        self._asked = metric
        self._lock = threading.Lock()
        self._failed: list[tuple[dict[str, Any], Exception]] = []

    def program(self, **inputs: Any) -> Any:
        try:
            return self._program(**inputs)
        except Exception as error:
            self._keep(inputs, error)
            raise

    @property
    def metric(self) -> Any:
        """The metric, under the name that DSPy puts over its column."""

        def metric(example: Any, prediction: Any) -> Any:
            try:
                return self._asked(example, prediction)
            except Exception as error:
                self._keep(dict(example.inputs()), error)
                raise

        kind = type(self._asked).__name__
        metric.__name__ = getattr(self._asked, "__name__", kind)
        return metric

    def _keep(self, inputs: dict[str, Any], error: Exception) -> None:
        with self._lock:
            self._failed.append((inputs, error))

    def of(self, example: Any) -> Exception | None:
        """Return the error of one example, once: its inputs are the very objects it was asked."""
        inputs = dict(example.inputs())
        for place, (asked, error) in enumerate(self._failed):
            if asked.keys() == inputs.keys() and all(asked[n] is inputs[n] for n in inputs):
                del self._failed[place]
                return error
        return None

    def reasons(self) -> str:
        return _counted(error for _, error in self._failed)


def _reasons(lost: list[Lost]) -> str:
    return _counted(each.error for each in lost)


def _counted(errors: Any) -> str:
    """Return how many there are of each class, the most frequent first."""
    kinds = Counter(type(error).__name__ for error in errors)
    return ", ".join(f"{count} {name}" for name, count in kinds.most_common())
