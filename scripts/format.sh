#!/usr/bin/env bash
# Formats the code and checks it: style, types, and which module may import which.
#
#   scripts/format.sh            repairs what can be repaired
#   scripts/format.sh --check    changes nothing
#
# Every check runs; the last lines name those that failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$PWD/.venv/bin:$PATH

case "${*-}" in
    '') ruff_check=(ruff check --fix) ruff_format=(ruff format) ;;
    --check) ruff_check=(ruff check) ruff_format=(ruff format --check) ;;
    *)
        echo "usage: $0 [--check]" >&2
        exit 2
        ;;
esac

failed=()
check() {
    printf -- '--- %s\n' "$*"
    "$@" || failed+=("$*")
}

check "${ruff_check[@]}"
check "${ruff_format[@]}"
check mypy
check lint-imports --no-logo

((${#failed[@]})) || exit 0
printf 'FAILED: %s\n' "${failed[@]}" >&2
exit 1
