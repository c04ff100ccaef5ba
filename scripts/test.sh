#!/usr/bin/env bash
# Runs the tiers of tests one after the other, the quick ones first, and goes on after one that fails.
#
#   scripts/test.sh                 all tiers
#   scripts/test.sh lint unit       these tiers
#   scripts/test.sh --thorough ...  with long matrices, and a hundred times the inputs of fuzzing
#
# The last line is "N passed, N failed, N skipped"; the one before it counts the inputs of fuzzing. The lint tier
# counts as one test, and so does whatever else makes a tier fail, such as a folder without tests: the line says
# "0 failed" exactly when the exit status is 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

thorough=()
if [[ ${1-} == --thorough ]]; then
    thorough=(--thorough "--override-ini=timeout=1800")
    shift
fi
tiers=("$@")
((${#tiers[@]})) || tiers=(lint unit conformance process rdma engine)
for tier in "${tiers[@]}"; do
    [[ $tier =~ ^(lint|unit|conformance|process|rdma|engine)$ ]] || {
        echo "$0: there is no tier $tier" >&2
        exit 2
    }
done

results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
trap 'exit 130' INT TERM

for tier in "${tiers[@]}"; do
    case $tier in
        lint) command=(scripts/format.sh --check) ;;
        rdma) command=(scripts/rdma/test.sh "--junitxml=$results/rdma.xml") ;;
        *) command=(.venv/bin/pytest "tests/$tier" -q "--junitxml=$results/$tier.xml" "${thorough[@]}") ;;
    esac
    printf '\n=== %s: %s\n' "$tier" "${command[*]}"
    started=$SECONDS
    status=0
    "${command[@]}" || status=$?
    printf '%s %d %d\n' "$tier" "$status" "$((SECONDS - started))" >>"$results/tiers"
done

.venv/bin/python - "$results" <<'PYTHON'
import sys
import xml.etree.ElementTree as ET
from pathlib import Path


def counts(report: Path, status: int) -> tuple[int, int, int]:
    """The tests of a tier that passed, failed and were skipped."""
    passed = failed = skipped = 0
    if report.exists():
        for case in ET.parse(report).iter("testcase"):
            outcome = {child.tag for child in case}
            if outcome & {"failure", "error"}:
                failed += 1
            elif "skipped" in outcome:
                skipped += 1
            else:
                passed += 1
    elif status == 0:
        passed = 1
    if status != 0 and failed == 0:
        failed = 1
    return passed, failed, skipped


def inputs(report: Path) -> int:
    """How many inputs the tier's fuzzing drew."""
    if not report.exists():
        return 0
    return sum(int(p.get("value", 0)) for p in ET.parse(report).iter("property") if p.get("name") == "fuzz_inputs")


results = Path(sys.argv[1])
rows = []
for line in (results / "tiers").read_text().splitlines():
    tier, status, seconds = line.split()
    rows.append((tier, int(seconds), int(status), *counts(results / f"{tier}.xml", int(status))))

print(f"\n{'tier':<12} {'seconds':>7} {'passed':>7} {'failed':>7} {'skipped':>7}")
for tier, seconds, status, passed, failed, skipped in rows:
    verdict = f"  exit status {status}" if status else ""
    print(f"{tier:<12} {seconds:>7} {passed:>7} {failed:>7} {skipped:>7}{verdict}")
passed, failed, skipped = (sum(row[column] for row in rows) for column in (3, 4, 5))
print(f"{'all':<12} {sum(row[1] for row in rows):>7}\n")
if fuzzed := sum(inputs(results / f"{row[0]}.xml") for row in rows):
    print(f"{fuzzed:,} inputs of fuzzing")
print(f"{passed} passed, {failed} failed, {skipped} skipped")
sys.exit(failed > 0)
PYTHON
