#!/usr/bin/env bash
# Set up a checkout: .ci/setup.sh demo|tests
#
# Makes .venv with the package and the development tools. As root on Debian or Ubuntu it
# first installs the Debian packages that are missing, and says which. Anyone else is told
# what is missing; the demo and the tests go on without it and say so too.
set -euo pipefail
cd "$(dirname "$0")/.."

purpose=${1:-demo}
python=${PYTHON:-python3}

say() { printf 'setup: %s\n' "$*"; }

# package for a command, where the command is missing
missing_packages() {
    command -v qemu-system-x86_64 >/dev/null || echo qemu-system-x86
    command -v ip >/dev/null || echo iproute2
    command -v unshare >/dev/null || echo util-linux
    "$python" -c 'import ensurepip' 2>/dev/null || echo python3-venv
    "$python" -c 'import ctypes; ctypes.CDLL("libseccomp.so.2")' 2>/dev/null ||
        echo libseccomp2
    if [ "$purpose" = tests ]; then
        command -v dpdk-testpmd >/dev/null || echo dpdk-dev
        command -v ethtool >/dev/null || echo ethtool
    fi
}

install_packages() {
    if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
        say "not installed, and not ours to install: $*"
        return
    fi
    say "installing Debian packages: $*"
    export DEBIAN_FRONTEND=noninteractive
    local log
    log=$(mktemp)
    if ! { apt-get update && apt-get install -y --no-install-recommends "$@"; } \
        >"$log" 2>&1 </dev/null; then
        tail -n 15 "$log" >&2
        say "apt-get failed (its last lines are above); going on without: $*"
    fi
    rm -f "$log"
}

make_venv() {
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        say "$python is $("$python" -V 2>&1): Python 3.11 or newer is needed (set PYTHON=)"
        exit 1
    fi
    if [ ! -x .venv/bin/pip ]; then
        say "making .venv with $("$python" -V 2>&1)"
        "$python" -m venv .venv
    fi
    say "installing vswitch and its development tools into .venv"
    local pip=(.venv/bin/python -m pip --quiet --disable-pip-version-check)
    "${pip[@]}" install --upgrade 'pip>=25.1' # the first to know dependency groups
    "${pip[@]}" install --editable . --group dev
}

# The demo fetches its guests' kernel through apt, which needs to know the packages.
refresh_lists() {
    command -v apt-cache >/dev/null && [ "$(id -u)" -eq 0 ] || return 0
    apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1 && return 0
    say "reading the list of Debian packages (apt-get update)"
    apt-get update -qq >/dev/null 2>&1 || say "apt-get update failed; going on"
}

mapfile -t packages < <(missing_packages)
if [ ${#packages[@]} -gt 0 ]; then install_packages "${packages[@]}"; fi
refresh_lists
make_venv
