"""Optimize a program overnight: through outages, restarts and a closed laptop lid.

    python optimizer_overnight.py questions.jsonl program.json

Each line of the data is an object with "question" and "answer". Start it again after a crash: answers that
were paid for are on disk, and are not asked for again. MODEL names another model.
"""

import json
import logging
import os
import sys
from pathlib import Path

import dspy

from dspy_resilient import ResilientLM

logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")


def exact(example: dspy.Example, got: dspy.Prediction, trace: object = None) -> bool:
    """Whether the answer is the expected one, but for case and space."""
    expected: str = example.answer
    return expected.strip().lower() == str(got.answer).strip().lower()


def main(data: Path, saved: Path) -> None:
    """Optimize on `data`, save the program to `saved`, and say what it took."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    examples = [dspy.Example(row).with_inputs("question") for row in rows]
    train, dev = examples[: len(examples) // 2], examples[len(examples) // 2 :]

    lm = ResilientLM(
        os.environ.get("MODEL", "openai/gpt-4o-mini"),
        name="overnight",
        max_wait=6 * 3600,  # a whole night: no candidate is scored while the provider is away
        limits=16,
        num_retries=8,
    )
    dspy.configure(lm=lm)
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        exact, num_candidate_programs=8, num_threads=16
    )
    program = optimizer.compile(
        dspy.ChainOfThought("question -> answer"), trainset=train, valset=dev
    )
    program.save(saved)
    print(lm.stats())
    print(f"Saved to {saved}. Errors that cost an example its score: {lm.stats().errors}.")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
