"""``python -m rlhf_lightning`` is ``rlhf``."""

from rlhf_lightning.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
