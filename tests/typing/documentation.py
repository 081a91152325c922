"""Check the documentation's code with mypy and pyright, as a user's own program: `python FILE`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python(?: title=.*)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
SETTINGS = "[mypy]\nignore_missing_imports = True\ndisable_error_code = import-untyped\n"
SETTINGS += "[mypy-litellm.*]\nfollow_imports = skip\n"  # its own code takes half a minute to read
CHECKERS = [  # with their own defaults, but for DSPy, which ships no types
    ["mypy", "--config-file=mypy.ini"],
    ["pyright", f"--pythonpath={sys.executable}"],
]


def main() -> int:
    """Write each page's code to a file, and have both checkers read them all."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "mypy.ini").write_text(SETTINGS)
        for page in PAGES:
            code = "\n".join(
                block for block in BLOCK.findall(page.read_text()) if "--8<--" not in block
            )
            name = re.sub(r"\W", "_", str(page.relative_to(ROOT).with_suffix("")))
            if code:
                (Path(folder) / f"{name}.py").write_text(code)
        files = sorted(each.name for each in Path(folder).glob("*.py"))
        env = {**os.environ, "PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT)}
        done = [
            subprocess.run([sys.executable, "-m", *each, *files], cwd=folder, env=env, check=False)
            for each in CHECKERS
        ]
    return max(each.returncode for each in done)


if __name__ == "__main__":
    sys.exit(main())
