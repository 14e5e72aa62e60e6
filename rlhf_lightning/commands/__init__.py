"""The commands of ``rlhf``, one file each with ``main(argv) -> int``."""

import importlib
import importlib.util
import sys
import types
from typing import Any


class _Deferred(types.ModuleType):
    """A placeholder in ``sys.modules`` that imports the package when one of its attributes is read."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def defer_import(name: str) -> None:
    """Delay the import of a package until it is first used, also where other packages import it."""
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is not None:
        module = sys.modules[name] = _Deferred(name)
        module.__spec__, module.__file__ = spec, spec.origin  # `find_spec` and `inspect` read these


defer_import("bitsandbytes")  # peft always imports it, and it imports TorchInductor
