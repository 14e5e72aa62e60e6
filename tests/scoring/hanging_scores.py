"""Misbehaving scores, importable by the worker processes of a time limit."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path


def by_text(prompts, completions, **columns):
    return [_one(text, columns) for text in completions]


def _one(text, columns):
    if text == "hang":
        while True:
            pass
    if text == "child":
        # A child process of the scorer must die with it: this one would write its file after two seconds.
        code = f"import time; time.sleep(2); open({columns['path'][0]!r}, 'w').close()"
        subprocess.Popen([sys.executable, "-c", code])
        time.sleep(60)
    if text == "die":
        os._exit(3)
    if text == "raise":
        raise RuntimeError("no such thing")
    if text == "nan":
        return math.nan
    if text == "none":
        return None
    return float(len(text)) + (columns["bonus"][0] if "bonus" in columns else 0.0)


def two_scores(prompts, completions, **columns):
    return [1.0, 2.0]


def exists(path):
    return Path(path).exists()
