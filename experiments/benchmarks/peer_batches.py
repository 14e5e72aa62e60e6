"""Run a stage of another library and record its settings and the token batches that it trained on.

    /path/to/peer/bin/python peer_batches.py OUT.json PEER_SCRIPT [arguments of the script ...]

This file is run by the peer's own Python, so it imports nothing of this project. It records the batches that
``transformers.Trainer`` passes to the loss, without changing them.
"""

import json
import runpy
import sys
from pathlib import Path

from transformers import Trainer

# fmt: off
SETTINGS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "adam_beta1", "adam_beta2", "adam_epsilon",
    "weight_decay", "max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps",
    "max_length", "completion_only_loss", "beta", "loss_type", "label_smoothing", "disable_dropout",
    "center_rewards_coefficient", "average_tokens_across_devices",
)
# fmt: on


def rows_of(inputs: dict) -> list[dict]:
    """Return each row of a padded batch without padding: token ids, and which tokens the loss covers (None if not
    reported).
    """
    if "labels" in inputs:
        seen = inputs["labels"] != -100
    else:
        seen = inputs["completion_mask"].bool() if "completion_mask" in inputs else None
    rows = []
    for index, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)):
        rows.append({"ids": ids[mask].tolist(), "supervised": None if seen is None else seen[index][mask].tolist()})
    return rows


def main() -> None:
    """Run the script with its arguments; write ``{"settings", "steps"}`` when it ends."""
    out, script, *arguments = sys.argv[1:]
    record: dict = {"settings": {}, "steps": []}
    prepare_inputs = Trainer._prepare_inputs

    def watched(self: Trainer, inputs: dict) -> dict:
        record["settings"] = {name: str(getattr(self.args, name)) for name in SETTINGS if hasattr(self.args, name)}
        record["settings"]["pad_token_id"] = self.processing_class.pad_token_id
        record["steps"].append(rows_of(inputs))
        return prepare_inputs(self, inputs)

    Trainer._prepare_inputs = watched
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
    Path(out).write_text(json.dumps(record))


if __name__ == "__main__":
    main()
