#!/bin/sh
# setup.sh VENV: makes the virtual environment and installs the project into it, editable, with the pinned versions.
set -eu
venv=${1:?usage: setup.sh VENV}

find_python() {
    for name in python3 python python3.14 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done
    echo "setup: Python >= 3.11 with venv and pip is needed; found: $(python3 --version 2>&1 || true)" >&2
    echo "setup: install it (on Debian and Ubuntu: apt install python3 python3-venv) and run make again" >&2
    return 1
}

if ! "$venv/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
    python=$(find_python)
    echo "setup: making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi
if [ ! -x "$venv/bin/uv" ]; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
fi
echo "setup: installing the pinned packages into $venv (about 5 GB with CUDA)"
VIRTUAL_ENV=$venv "$venv/bin/uv" pip install -c constraints.txt -e '.[dev]'
# What a training imports is compiled now: uv does not do it, and where PYTHONDONTWRITEBYTECODE is set (images of
# containers set it) Python never would, so that each start took 25 s instead of 8.
unset PYTHONDONTWRITEBYTECODE
"$venv/bin/python" -m compileall -q src/jepa
"$venv/bin/python" -c 'import hydra.main, torch._dynamo, wandb, jepa.agent, jepa.cli.job, jepa.cli.worker'
