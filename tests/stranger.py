"""What a stranger does after the README's first command, in the environment that it has made.

    python tests/stranger.py

Runs the code of the README and of the first page of the documentation as programs of their own, the commands
that those pages name, and one example. Needs nothing but the package; a provider on this machine
stands in for OpenAI's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from dspy_resilient.testing import Provider, dspy_answers

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def code_of(page):
    """Return the Python blocks of a page as one program."""
    return "\n".join(
        re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    )


def run(what, *command, expect):
    """Run a command, show what it was, and end with its output if it fails or does not say `expect`."""
    print(f"{what} ...", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode or expect not in done.stdout:
        sys.exit(f"{what} failed ({done.returncode}):\n{done.stdout}\n{done.stderr}")


def main():
    answers = dspy_answers({"What is the capital of France?": "Paris"})
    with Provider(answers) as provider, tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ |= {
            "OPENAI_API_BASE": provider.api_base,
            "OPENAI_API_KEY": "none",
            "ANTHROPIC_API_KEY": "none",
            "GEMINI_API_KEY": "none",
            "GROQ_API_KEY": "none",
            "DSPY_CACHEDIR": folder,
        }
        python, script = sys.executable, str(BIN / "dspy-resilient")
        run("README", python, "-c", code_of(ROOT / "README.md"), expect="Paris")
        first = code_of(ROOT / "docs/get-started.md")
        run("docs/get-started.md", python, "-c", first, expect="Paris")
        run("check", script, "check", "openai/gpt-4o-mini", expect="all is well")
        run("cache info", script, "cache", "info", expect="newest")
        questions, found = home / "questions.txt", home / "answers.jsonl"
        questions.write_text("What is the capital of France?\n")
        example = ROOT / "docs/examples/batch_budget.py"
        files = (str(questions), str(found))
        run("an example", python, str(example), *files, "--max-dollars", "1", expect="1 answered")
        assert "Paris" in found.read_text()
    print("A stranger gets along.")


if __name__ == "__main__":
    main()
