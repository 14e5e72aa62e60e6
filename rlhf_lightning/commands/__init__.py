"""The commands of ``rlhf``, one file each: ``main(argv) -> int`` is all that ``rlhf_lightning.cli`` asks of them."""

from rlhf_lightning.commands.quiet import quieten_messages

quieten_messages()
