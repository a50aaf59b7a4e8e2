#!/usr/bin/env bash
# Make the virtual environment and install the project into it. Needs Python 3.10+ with venv, and a C++ compiler for
# torch.compile; as root on Debian, missing ones are installed.
set -euo pipefail

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
EXTRAS=${EXTRAS:-cpu,demo,dev}

fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

command -v "$PYTHON" >/dev/null || fail "$PYTHON is not there; install Python 3.10 or newer, or name one: make PYTHON=python3.11"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$("$PYTHON" --version) is too old: 3.10 or newer is needed; name one: make PYTHON=python3.11"

# Debian packages for what is missing. Headers and venv only matter for Debian's own Python.
missing=()
command -v c++ >/dev/null || missing+=(g++)
"$PYTHON" -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
"$PYTHON" - <<'CHECK' || missing+=(python3-dev)
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
CHECK
if ((${#missing[@]})); then
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}"
    else
        fail "please install: ${missing[*]} (on Debian or Ubuntu: sudo apt-get install ${missing[*]})"
    fi
fi

"$PYTHON" -m venv "$VENV"
# The pins were made with Python 3.11; some of them need it.
constraints=()
if "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    constraints=(-c constraints.txt)
fi
"$VENV/bin/python" -m pip install --quiet ${constraints[@]+"${constraints[@]}"} -e ".[$EXTRAS]"
