"""Count words that usually mark a sentence to rewrite, and fail where a part of the repository has more than its limit.

    python .ci/prose.py [--show]

The limits fall as rooms are rewritten. ``--show`` prints each line that is counted.
"""

import re
import subprocess
import sys

MARKS = re.compile(
    r"\bof which\b|(?<!there )\bis no\b|for the while|cut over|\bleash|\bnobody\b|\bwhatever\b|\bbeside\b|\bapart\b"
    r"|those very|what is said|\bbefall|of no account|\bin vain\b|\bas it is\b|\bgoes on\b",
    re.IGNORECASE,
)
LIMITS = {"rlhf_lightning": 24, "docs": 3, "tests": 9, "experiments": 9, "*.md": 0}


def main() -> int:
    """Count the marks of each part; return 1 where a part has more than its limit."""
    failed = 0
    for part, limit in LIMITS.items():
        files = subprocess.run(["git", "ls-files", part], capture_output=True, text=True, check=True).stdout.split()
        files = [name for name in files if name.endswith((".py", ".md", ".yaml", ".yml", ".html", ".js"))]
        if part == "*.md":
            files = [name for name in files if "/" not in name]
        found = []
        for name in files:
            with open(name, encoding="utf-8") as file:
                lines = [(number, line.strip()) for number, line in enumerate(file, 1) if MARKS.search(line)]
            found += [f"{name}:{number}: {line}" for number, line in lines]
        if "--show" in sys.argv:
            print("\n".join(found))
        print(f"{part}: {len(found)} of at most {limit}")
        failed += len(found) > limit
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
