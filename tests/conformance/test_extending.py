"""The examples of docs/extending.md, each a whole file, run as they are printed, and their entry points name them."""

from __future__ import annotations

import re
import sys
import tomllib
import types
from pathlib import Path

from kvrdma.backends import backends
from kvrdma.plugins import Registry
from kvrdma.policies import offload_policies, policies
from kvrdma.testing import CoordinatorSuite, EvictionPolicySuite, StorageBackendSuite, TransportSuite
from kvrdma.transports import transports

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
_TEXT = PAGE.read_text()
_SUITES = (CoordinatorSuite, EvictionPolicySuite, StorageBackendSuite, TransportSuite)


def _run_examples() -> dict[str, types.ModuleType]:
    """The examples as modules, by name; what they call Test… is collected here."""
    modules = {}
    for match in re.finditer(r"^```python\n# (\w+)\.py\n(.*?)^```", _TEXT, re.MULTILINE | re.DOTALL):
        module = types.ModuleType(f"extending_{match[1]}")
        sys.modules[module.__name__] = module
        before = _TEXT.count("\n", 0, match.start(2))  # so that line numbers are those of the page
        exec(compile("\n" * before + match[2], str(PAGE), "exec"), module.__dict__)
        modules[match[1]] = module
    return modules


EXAMPLES = _run_examples()
_CLASSES = {
    name: part for module in EXAMPLES.values() for name, part in vars(module).items() if name.startswith("Test")
}
globals().update(_CLASSES)


def test_there_is_an_example_of_each_suite() -> None:
    assert _TEXT.count("```python") == len(EXAMPLES)
    for suite in _SUITES:
        assert sum(issubclass(part, suite) for part in _CLASSES.values()) == 1, suite


def test_entry_points_name_them() -> None:
    """Groups are those of the registries, and what they name is in the examples, under the name it has itself."""
    (block,) = re.findall(r"^```toml\n(.*?)^```", _TEXT, re.MULTILINE | re.DOTALL)
    groups = tomllib.loads(block)["project"]["entry-points"]
    registries: list[Registry] = [transports, backends, policies, offload_policies]
    assert set(groups) == {registry.group for registry in registries}
    for points in groups.values():
        for name, value in points.items():
            module, part = value.split(":")
            cls = getattr(EXAMPLES[module], part)
            assert getattr(cls, "scheme", getattr(cls, "name", name)) == name
