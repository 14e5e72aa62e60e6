"""An engine that ends turns early."""

from typing import Any

from rlhf_lightning.sampling.slot_engine import SlotEngine


class ManyEnds(SlotEngine):
    """Ends a turn on a third of all tokens, so that random weights produce several turns."""

    def sample(self, model: Any, prompts: Any, episodes: Any, settings: Any, seed: int, ends: Any, *args: Any,
               **further: Any) -> Any:  # fmt: skip
        return super().sample(model, prompts, episodes, settings, seed, (*ends, *range(10, 50)), *args, **further)
