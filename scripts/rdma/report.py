"""What the tests in the guest reported: compared with what was to report, or in its stead the reason of a skip.

report.py check JUNIT COLLECTED    ends with 1 where a test of COLLECTED (pytest --collect-only -q) is not in JUNIT
report.py skip JUNIT WHY           writes a JUNIT with one skipped test
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path


def collected_tests(listing: str) -> Counter[str]:
    """Names of tests, and how often each is there: several classes inherit one suite."""
    return Counter(_name(line) for line in listing.splitlines() if "::" in line)


def _name(node: str) -> str:
    function, bracket, parameters = node.partition("[")
    return function.rsplit("::", 1)[1] + bracket + parameters


def reported_tests(junit: Path) -> Counter[str]:
    """The same for a report; none where there is no whole one."""
    try:
        return Counter(case.get("name", "") for case in ET.parse(junit).iter("testcase"))
    except (OSError, ET.ParseError):
        return Counter()


def check(junit: Path, listing: Path) -> int:
    """Say which tests did not report."""
    expected, reported = collected_tests(listing.read_text()), reported_tests(junit)
    missing = expected - reported
    for name, count in sorted(missing.items()):
        print(f"rdma: did not report: {name}" + (f" ({count} times)" if count > 1 else ""))
    print(f"rdma: {expected.total() - missing.total()} of {expected.total()} tests reported")
    return 1 if missing or not expected else 0


def skip(junit: Path, why: str) -> int:
    """Write a report of one skipped test."""
    suite = ET.Element("testsuite", name="rdma", tests="1", skipped="1")
    case = ET.SubElement(suite, "testcase", classname="tests.rdma", name="all")
    ET.SubElement(case, "skipped", message=why)
    ET.ElementTree(suite).write(junit)
    return 0


if __name__ == "__main__":
    verb, path, other = sys.argv[1:]
    sys.exit(check(Path(path), Path(other)) if verb == "check" else skip(Path(path), other))
