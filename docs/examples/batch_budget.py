"""Answer a file of questions for at most so much money, and go on where it stopped.

    python batch_budget.py questions.txt answers.jsonl --max-dollars 2.50

One question a line goes in, one JSON object a line comes out. A second run asks only what has no answer yet.
MODEL names another model.
"""

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import dspy

from dspy_resilient import BudgetExceededError, ResilientLM

qa = dspy.Predict("question -> answer")


def main(arguments: list[str] | None = None) -> int:
    """Answer what is open, within the budget; return how many questions are left."""
    parser = argparse.ArgumentParser(description="Answer questions within a budget.")
    parser.add_argument("questions", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--max-dollars", type=float, required=True)
    options = parser.parse_args(arguments)

    done = set()
    if options.answers.exists():
        done = {json.loads(line)["question"] for line in options.answers.read_text().splitlines()}
    asked = dict.fromkeys(options.questions.read_text().splitlines())
    todo = [question for question in asked if question and question not in done]

    lm = ResilientLM(
        os.environ.get("MODEL", "openai/gpt-4o-mini"), name="batch", max_wait=900, limits=16
    )
    budget = lm.budget(dollars=options.max_dollars)
    lock = Lock()
    with options.answers.open("a") as out, ThreadPoolExecutor(16) as pool:

        def answer(question: str) -> bool:
            try:
                with budget, dspy.context(lm=lm):  # each thread enters the budget
                    text = qa(question=question).answer
            except BudgetExceededError:
                return False  # nothing was sent
            except dspy.LMError as error:
                print(f"no answer: {type(error).__name__}")
                return False
            with lock:
                out.write(json.dumps({"question": question, "answer": text}) + "\n")
            return True

        answered = sum(pool.map(answer, todo))
    print(lm.stats())
    left = len(todo) - answered
    print(
        f"{answered} answered for ${budget.spent.dollars:.4f}, {left} left."
        + (" Run it again to go on." if left else "")
    )
    return left


if __name__ == "__main__":
    main()
