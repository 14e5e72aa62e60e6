"""The commands of ``rlhf``, one file each with ``main(argv) -> int``."""

from rlhf_lightning.commands.quiet import silence_log_messages

silence_log_messages()
