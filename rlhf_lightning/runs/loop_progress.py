"""Where in Lightning's loops a resumed run goes on: their state in a checkpoint, put right."""

from __future__ import annotations

from typing import Any, Literal

VALIDATION_TO_COME = {
    "total": {"ready": 1, "started": 1, "processed": 0, "completed": 0},
    "current": {"ready": 0, "started": 0, "processed": 0, "completed": 0},
    "is_last_batch": False,
}
"""Progress of Lightning's validation loop as after a kill in its first batch: it runs anew, from the first."""

Place = Literal["step", "before validation", "epoch's end"]
"""Where in Lightning's loops a checkpoint is written."""


def patch_loop_state(loop: dict[str, Any], place: Place) -> None:
    """Change the state of Lightning's loops, as it is in a checkpoint, so that a resumed run goes on where it should.

    Of itself Lightning leaves out a validation that was to come, and where ``max_steps`` bounds a run it takes the end
    of an epoch for its middle and trains on one more batch of it. A validation that was to come leaves a mark that
    never goes: it is taken for the next one's too, unless what was begun is counted as done.
    """
    if place == "before validation":
        loop["epoch_loop.val_loop.batch_progress"] = VALIDATION_TO_COME
    else:
        validated = loop["epoch_loop.val_loop.batch_progress"]["total"]
        validated.update(dict.fromkeys(validated, validated["ready"]))
    if place == "epoch's end":
        for count in loop["epoch_progress"].values():
            count["completed"] = count["processed"]
        batches = loop["epoch_loop.batch_progress"]
        batches["current"], batches["is_last_batch"] = dict.fromkeys(batches["current"], 0), False
