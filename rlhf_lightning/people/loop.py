"""``rlhf loop``: rounds of sampling, labelling, training and evaluation, which go on where they were cut off."""

import inspect
from collections.abc import Sequence

import docstring_parser
from jsonargparse import ActionConfigFile

import rlhf_lightning.people.simulated  # noqa: F401  labellers by their short names
from rlhf_lightning.commands.parsing import PlainParser, with_underscores
from rlhf_lightning.people.loop_settings import LoopSettings


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf loop``."""
    doc = docstring_parser.parse(inspect.getdoc(LoopSettings) or "")
    description = "\n\n".join(filter(None, [doc.short_description, doc.long_description]))
    parser = PlainParser(prog="rlhf loop", description=description)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of the settings; flags win over it")
    parser.add_class_arguments(LoopSettings, as_group=False)
    given = parser.parse_args(with_underscores(argv))
    made = parser.instantiate(given).as_dict()
    plain, made = ({name: value for name, value in one.items() if name != "config"} for one in (given.as_dict(), made))

    from rlhf_lightning.people.loop_rounds import run_loop

    run_loop(LoopSettings(**made), plain)
    return 0
