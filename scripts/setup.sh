#!/bin/sh
# Builds .venv on a fresh machine: `scripts/setup.sh serve` to run the server, `scripts/setup.sh dev` to test it too.
# A stamp makes the second run a no-op; a run that was cut off never leaves one.
#   PYTHON=/path/to/python3.12   the interpreter to build with
#   LAYERCAST_YES=1              fetch the CUDA build of torch without asking (0: never)
#   TORCH_INDEX=URL              where CPU builds of torch are looked for when no local wheel is at hand
set -eu
cd "$(dirname "$0")/.."
kind=${1:-serve}
venv=.venv
triton_venv=.venv-tritonclient
kserve_venv=.venv-kserve
unfinished=$venv/.unfinished
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check install -qq "$@"; }

# What the stamps stand for. The folder is part of it: a virtual environment does not survive being moved.
fingerprint() {
    { cat pyproject.toml constraints/*.txt scripts/setup.sh; "$venv/bin/python" -V; pwd -P; } 2>&1 | cksum
}

stamped() { # is one of these stamps up to date?
    [ -x "$venv/bin/python" ] && [ ! -e "$unfinished" ] || return 1
    now=$(fingerprint)
    for stamp; do
        if [ "$(cat "$venv/$stamp" 2>/dev/null)" = "$now" ]; then return 0; fi
    done
    return 1
}

is_supported() { # a Python of the versions that pyproject.toml allows, with venv and pip to build one
    "$1" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1
}

find_python() {
    for python in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if is_supported "$python"; then return; fi
    done
    die "no usable Python ${PYTHON:+in PYTHON=$PYTHON }(3.11, 3.12 or 3.13 with venv is needed). Get one with
       apt install python3 python3-venv    (Debian 12 or newer, Ubuntu 24.04 or newer)
       dnf install python3.12              (Fedora, RHEL)
       uv python install 3.12              (anywhere), then PYTHON=\"\$(uv python find 3.12)\" make setup"
}

make_venv() {
    if [ -e "$unfinished" ]; then
        say "the last set-up was cut off: building $venv again"
    elif is_supported "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1 &&
        grep -qF "$(pwd -P)/$venv" "$venv/bin/activate"; then
        return
    fi
    find_python
    say "$venv with $("$python" -V)"
    "$python" -m venv --clear "$venv"
}

has_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

torch_requirement() { # the range in pyproject.toml
    "$venv/bin/python" -c 'import tomllib
with open("pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
print(next(line for line in extras["server"] if line.startswith("torch")))'
}

torch_release() { # the torch in .venv, if it works and is within that range
    "$venv/bin/python" -c 'import sys, torch
from pip._vendor.packaging.requirements import Requirement
sys.exit(not Requirement(sys.argv[1]).specifier.contains(torch.__version__, prereleases=True) or print(torch.__version__))
' "$(torch_requirement)" 2>/dev/null
}

has_local_cpu_wheel() { # in pip's find-links, from its configuration or PIP_FIND_LINKS; nothing is fetched or copied
    "$venv/bin/python" -m pip install --dry-run --no-index --no-deps -c constraints/cpu.txt torch 2>/dev/null |
        grep -q 'Would install torch-[^ ]*+cpu'
}

has_cpu_index() {
    "$venv/bin/python" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1] + "/torch/", timeout=3)' \
        "$torch_index" 2>/dev/null
}

ask_for_cuda_build() {
    say "no GPU found and no CPU build of torch within reach: pip would fetch about 3 GB of CUDA libraries."
    case "${LAYERCAST_YES:-}" in
        1) say "LAYERCAST_YES=1: going on"; return ;;
        '') ;;
        *) die "LAYERCAST_YES=$LAYERCAST_YES: stopped" ;;
    esac
    if [ "${CI:-}" = true ]; then
        say "CI=true: nobody can answer and nothing can be tested without torch, so going on (LAYERCAST_YES=0 stops)"
        return
    fi
    if [ -t 0 ]; then
        printf 'setup: go on? [y/N] '
        read -r answer
        case "$answer" in y | Y | yes) return ;; esac
    fi
    die "stopped. Set LAYERCAST_YES=1 to go on."
}

install_torch() {
    if release=$(torch_release); then
        say "keeping torch $release"
    elif has_gpu; then
        say "a GPU is here: installing torch with CUDA (several GB)"
        pip "$(torch_requirement)"
    elif has_local_cpu_wheel; then
        say "no GPU found: installing the CPU build of torch from the local wheels"
        pip --no-index --no-deps -c constraints/cpu.txt torch
    elif has_cpu_index; then
        say "no GPU found: installing the CPU build of torch from $torch_index"
        pip --no-deps --index-url "$torch_index" -c constraints/cpu.txt torch
    else
        ask_for_cuda_build
        pip -c constraints/cpu.txt torch
    fi
}

install() { # our own package and its extras; torch stays what it is now, whatever newer release the range admits
    "$venv/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
        >"$venv/constraints.txt"
    say "installing layercast[$1]"
    pip -c "$venv/constraints.txt" -e ".[$1]"
}

install_triton_client() { # apart from .venv: its dependencies (ml-dtypes, protobuf) are capped below ours
    say "$triton_venv with the stock tritonclient and a reflection client beside our own"
    "$venv/bin/python" -m venv --clear "$triton_venv"
    "$triton_venv/bin/python" -m pip --disable-pip-version-check install -qq \
        -c constraints/tritonclient.txt 'tritonclient[grpc,http]' grpc-requests -e .
}

install_kserve_client() {
    say "$kserve_venv with KServe's client"
    "$venv/bin/python" -m venv --clear "$kserve_venv"
    "$kserve_venv/bin/python" -m pip --disable-pip-version-check install -qq --no-compile -c constraints/kserve.txt kserve
}

install_stock_clients() { # side by side: most of the time goes into looking for versions
    install_kserve_client &
    kserve=$!
    install_triton_client
    wait "$kserve"
}

case "$kind" in
    serve) extras=server,export; good="stamp-serve stamp-dev" ;;
    dev) extras=server,export,envoy,compile,dev; good=stamp-dev ;;
    *) die "usage: scripts/setup.sh [serve|dev]" ;;
esac
# shellcheck disable=SC2086 # a list of stamps
if stamped $good; then
    if [ "$kind" = serve ] || { [ -x "$triton_venv/bin/python" ] && [ -x "$kserve_venv/bin/python" ]; }; then
        say "already set up ($venv)"
        exit 0
    fi
fi
make_venv
rm -f "$venv"/stamp-*
# A signal leaves the mark, so that the next run starts afresh; an ordinary failure keeps what was fetched.
trap 'code=$?; [ "$code" -gt 128 ] || rm -f "$unfinished"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
: >"$unfinished"
install_torch
install "$extras"
if [ "$kind" = dev ]; then install_stock_clients; fi
fingerprint >"$venv/stamp-$kind"
say "done"
