"""Use DataModules without a Trainer."""

from typing import Any

import pytest


@pytest.fixture
def ready(tiny_tokenizer: Any, cache: Any) -> Any:
    """Return a function that prepares a DataModule for a rank and a batch type."""

    def prepare(data: Any, rank: int = 0, ranks: int = 1, batch_type: type | None = None, tokenizer: Any = None) -> Any:
        kind = type(data)
        data.__class__ = type(f"{kind.__name__}OfARank", (kind,), {"ranks": property(lambda _: (rank, ranks))})
        data.tokenizer = tokenizer or tiny_tokenizer
        if batch_type is not None:
            data.batch_type = batch_type
        data.prepare_data()
        data.setup("fit")
        return data

    return prepare
