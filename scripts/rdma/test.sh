#!/usr/bin/env bash
# Runs tests/rdma where there are soft-RoCE devices: in an emulated guest.
#
#   scripts/rdma/test.sh [--junitxml=FILE] [what pytest takes]
#
# Every test that is collected here has to report from there: fewer are a failure. Where no guest can be had, the one
# entry in FILE is a skip that says what is missing; where one could be had and did not come, that is a failure.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/../.."
readonly python=.venv/bin/python

junit=
arguments=()
for argument in "$@"; do
    case $argument in
        --junitxml=*) junit=$(realpath -m "${argument#*=}") ;;
        *) arguments+=("$argument") ;;
    esac
done

share=$(mktemp -d)
trap 'rm -rf "$share"' EXIT

status=0
scripts/rdma/packages.sh 2>"$share/why" || status=$?
cat "$share/why" >&2
if ((status == 3)); then
    printf '\n******** THE RDMA TESTS ARE SKIPPED: %s ********\n\n' "$(<"$share/why")" >&2
    [[ -z $junit ]] || "$python" scripts/rdma/report.py skip "$junit" "$(<"$share/why")"
    exit 0
fi
((status == 0)) || exit "$status"

export PYTHONPATH=$PWD
"$python" -m pytest tests/rdma -q --collect-only "${arguments[@]}" >"$share/collected" || {
    cat "$share/collected"
    exit 1
}
scripts/rdma/run_guest.sh --seconds "${KVRDMA_GUEST_SECONDS:-420}" --share "$share" \
    env "PYTHONPATH=$PWD" "$python" -m pytest tests/rdma -v --tb=short -p no:cacheprovider \
    --junitxml=/media/junit.xml --override-ini=junit_family=xunit1 "${arguments[@]}" || status=$?
[[ -z $junit || ! -f $share/junit.xml ]] || cp "$share/junit.xml" "$junit"
"$python" scripts/rdma/report.py check "$share/junit.xml" "$share/collected" || exit 1
exit "$status"
