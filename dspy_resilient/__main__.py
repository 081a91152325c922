"""`python -m dspy_resilient` is `dspy-resilient`."""

import sys

from dspy_resilient.cli import main

if __name__ == "__main__":
    sys.exit(main())
