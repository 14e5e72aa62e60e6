"""Run ``rlhf`` as ``python -m rlhf_lightning``."""

import os
import sys

if sys.path[:1] in ([""], [os.getcwd()]) and not sys.flags.safe_path:
    del sys.path[0]  # the working directory: it may hold untrusted files next to a model or data

from rlhf_lightning.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
