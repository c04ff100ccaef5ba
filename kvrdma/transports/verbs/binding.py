"""pyverbs, wherever the distribution put it.

Debian's python3-pyverbs belongs to the system's Python, but loads in any CPython of the same version. Only this one
package is taken from there: with the folder on `sys.path`, Debian's numpy or cffi would stand beside ours.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from typing import Final

DISTRIBUTION: Final = ("/usr/lib/python3/dist-packages", "/usr/lib64/python3/site-packages")


def load_pyverbs() -> None:
    """Make `import pyverbs` work; raises `ImportError` that says what is missing."""
    if "pyverbs" not in sys.modules:
        spec = PathFinder.find_spec("pyverbs") or PathFinder.find_spec("pyverbs", list(DISTRIBUTION))
        if spec is None or spec.loader is None:
            raise ImportError("there is no pyverbs (on Debian: apt-get install python3-pyverbs)")
        module = module_from_spec(spec)
        sys.modules["pyverbs"] = module
        spec.loader.exec_module(module)
    importlib.import_module("pyverbs.device")
