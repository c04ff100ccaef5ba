"""What all tiers share: thorough runs, and the account of fuzzing."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator

import pytest
from fuzzing import Fuzzing
from hypothesis import HealthCheck, settings

_COUNTS = pytest.StashKey[dict[str, int]]()
_SEED = pytest.StashKey[int]()

# Of Hypothesis: a test that names its own `max_examples` leaves these no say.
settings.register_profile("default", max_examples=100, stateful_step_count=50, deadline=None)
settings.register_profile(
    "thorough",
    max_examples=2000,
    stateful_step_count=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvrdma")
    group.addoption(
        "--thorough",
        action="store_true",
        default=os.environ.get("KVRDMA_TEST_THOROUGH") == "1",
        help="long matrices, a hundred times the inputs of fuzzing, and Hypothesis's profile `thorough`; "
        "KVRDMA_TEST_THOROUGH=1 is the same",
    )
    group.addoption("--fuzz-seed", type=int, help="draw the inputs of an earlier run again")


def pytest_configure(config: pytest.Config) -> None:
    seed = config.getoption("--fuzz-seed")
    config.stash[_SEED] = secrets.randbits(32) if seed is None else seed
    config.stash[_COUNTS] = {}
    settings.load_profile("thorough" if config.getoption("--thorough") else "default")  # before --hypothesis-profile


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts = config.stash[_COUNTS]
    if counts:
        terminalreporter.section("fuzzing")
        for name, count in counts.items():
            terminalreporter.line(f"{count:>9,}  {name}")
        terminalreporter.line(f"{sum(counts.values()):>9,}  inputs in all, --fuzz-seed={config.stash[_SEED]}")


@pytest.fixture(scope="session")
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether this run may take its time."""
    return bool(request.config.getoption("--thorough"))


@pytest.fixture
def fuzzing(
    request: pytest.FixtureRequest, thorough: bool, record_testsuite_property: Callable[[str, object], None]
) -> Iterator[Fuzzing]:
    """Inputs that are almost right; the run's summary says how many there were."""
    seed = request.config.stash[_SEED]
    print(f"--fuzz-seed={seed}")  # pytest shows it where the test fails
    fuzzing = Fuzzing(request.node.name, seed, thorough)
    yield fuzzing
    counts = request.config.stash[_COUNTS]
    counts[request.node.nodeid] = counts.get(request.node.nodeid, 0) + fuzzing.count
    record_testsuite_property("fuzz_inputs", fuzzing.count)  # scripts/test.sh adds them up
