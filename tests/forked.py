"""Run code in a fork of the test process, for effects that must not reach the test process. A fork needs no new
imports.
"""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def forked(work: Callable[[], int | None], output: Path) -> tuple[int, str]:
    """Run ``work`` in a fork; return its exit status (negative: the signal that killed it) and its output.

    Args:
        work: function to run in the fork.
        output: file that receives the output.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            target = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(target, 1)
            os.dup2(target, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            status = work() or 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(ended), output.read_text(errors="replace")
