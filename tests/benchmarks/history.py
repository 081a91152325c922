"""What changed in speed from one release, or one big change, to the next.

    python tests/benchmarks/history.py                        # the last line beside the one before
    python tests/benchmarks/history.py show N                 # the last line beside that N lines before it
    python tests/benchmarks/history.py add FILE "what changed"  # a line from `table.py --json FILE`

`history.jsonl` has one JSON object a line, oldest first. Ratios are compared, since times are those of
the machine: a change that lies within the quartiles of both is noise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

HISTORY = Path(__file__).with_name("history.jsonl")


def row_of(found, note, *, date, commit):
    """Return one line of the history from what `table.py --json` found."""
    ratios = {
        name: [row["ratio"], row.get("low"), row.get("high"), row["bound"]]
        for name, row in found["against dspy.LM"].items()
    }
    for name in ("memory", "outage", "import"):
        if name in found:
            ratios[name] = [found[name]["ratio"], None, None, found[name]["bound"]]
    return {
        "date": date,
        "commit": commit,
        "note": note,
        "machine": found["machine"],
        "versions": found["versions"],
        "ratios": {
            name: [None if n is None else round(n, 4) for n in row] for name, row in ratios.items()
        },
    }


def lines(old, new):
    """Yield a table of both lines, with a word on what changed."""
    yield f"{old['date']} {old['commit']}  {old['note']}"
    yield f"{new['date']} {new['commit']}  {new['note']}"
    if old["machine"] != new["machine"]:
        yield "(on different machines)"
    yield ""
    for name in dict.fromkeys((*old["ratios"], *new["ratios"])):
        before, after = old["ratios"].get(name), new["ratios"].get(name)
        shown = ["-" if row is None else f"{row[0]:.3f}" for row in (before, after)]
        yield f"{name:<56}{shown[0]:>8}{shown[1]:>8}  {verdict(before, after)}"


def verdict(before, after):
    """Return in a word or two what became of a ratio; smaller is better."""
    if before is None or after is None:
        return "new" if before is None else "gone"
    over = "  OVER ITS BOUND" if after[3] is not None and after[0] > after[3] else ""
    low, high = before[1] or before[0] * 0.95, before[2] or before[0] * 1.05
    new_low, new_high = after[1] or after[0], after[2] or after[0]
    if new_high < low:
        return "better" + over
    return ("worse" if new_low > high else "same") + over


def load(path=HISTORY):
    """Return all lines, oldest first."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command")
    show = commands.add_parser("show")
    show.add_argument("back", type=int, nargs="?", default=1)
    add = commands.add_parser("add")
    add.add_argument("file", type=Path)
    add.add_argument("note")
    options = parser.parse_args()
    if options.command == "add":
        git = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        date = datetime.now(UTC).date().isoformat()  # noqa: TID251  # for people
        row = row_of(json.loads(options.file.read_text()), options.note, date=date, commit=commit)
        with HISTORY.open("a") as file:
            file.write(json.dumps(row) + "\n")
    history = load()
    back = getattr(options, "back", 1)
    if len(history) <= back:
        parser.error(f"the history has {len(history)} lines")
    print("\n".join(lines(history[-1 - back], history[-1])))


if __name__ == "__main__":
    main()
