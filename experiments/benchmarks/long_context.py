"""Measure the memory of an SFT update on one long sequence, with activation checkpointing and MLPs in chunks.

    python experiments/benchmarks/long_context.py [--length 32768] [--layers 30]

The model has SmolLM2-135M's shape and random weights in float32. A first update of a short sequence creates the
gradients and AdamW's moments, and the second update is the long sequence, half of it prompt. Prints one line of JSON:
seconds of the long update, resident memory before it, and peak resident memory of the whole process.
"""

import argparse
import json
import tempfile
import time
from typing import Any

from scaling import Point, peak, resident, update

VOCABULARY = 49_152
SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
    "vocab_size": VOCABULARY, "tie_word_embeddings": True, "rope_theta": 100_000,
}  # fmt: skip


def measured(length: int, layers: int) -> dict[str, float]:
    """Return seconds and memory, GB, of an update on a sequence of ``length`` tokens."""
    import torch
    from lightning.pytorch import Callback, Trainer
    from torch.utils.data import DataLoader
    from transformers import LlamaConfig

    from rlhf_lightning.modules.sft import SFTModule
    from rlhf_lightning.worlds._assistant_text import make_tokenizer

    found: dict[str, float] = {"length": length, "layers": layers}

    class Clock(Callback):
        """Records the time and the resident memory between the two updates."""

        def on_train_batch_end(self, *args: Any) -> None:
            if "resident_GB" in found:
                found["seconds"] = round(time.perf_counter() - self.begun, 1)
            found.setdefault("resident_GB", round(resident() / 1e3, 2))
            self.begun = time.perf_counter()

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer().save_pretrained(folder)
        config = LlamaConfig(**SHAPE, num_hidden_layers=layers, max_position_embeddings=length)
        config.save_pretrained(folder)
        module = SFTModule(init_from=folder, from_scratch=True, activation_checkpointing=True)
        trainer = Trainer(
            max_steps=2, callbacks=[Clock()], accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        points = [Point(half, (half,), vocabulary=VOCABULARY, max_tokens=None) for half in (16, length // 2)]
        steps: Any = [update(point) for point in points]
        trainer.fit(module, DataLoader(steps, batch_size=None))
    return found | {"peak_GB": round(peak() / 1e3, 2)}


def main() -> None:
    """Measure one length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32_768)
    parser.add_argument("--layers", type=int, default=30)
    args = parser.parse_args()
    print("LONG " + json.dumps(measured(args.length, args.layers)))


if __name__ == "__main__":
    main()
