#!/bin/sh
# setup.sh VENV [EXTRA]: makes the virtual environment and installs the project into it, editable, with the pinned versions:
# what a training needs, or with EXTRA=dev everything. One line a stage; what pip and uv say is shown if they fail.
set -eu
venv=${1:?usage: setup.sh VENV [EXTRA]}
extra=${2:+[$2]}

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

# stage TEXT COMMAND...: one line, on a terminal with the seconds that have passed; the output only of a failure.
stage() {
    text=$1
    shift
    log=$(mktemp)
    begun=$(date +%s)
    "$@" >"$log" 2>&1 &
    process=$!
    trap 'kill $process 2>/dev/null; rm -f "$log"; exit 130' INT TERM
    while [ -t 1 ] && kill -0 $process 2>/dev/null; do
        printf '\rsetup: %s: %s s' "$text" $(($(date +%s) - begun))
        sleep 1
    done
    status=0
    wait $process || status=$?
    trap - INT TERM
    printf '%ssetup: %s: %s s\n' "$([ -t 1 ] && printf '\r')" "$text" $(($(date +%s) - begun))
    if [ $status != 0 ]; then
        cat "$log" >&2
        echo "setup: $text failed with status $status; its output is above" >&2
    fi
    rm -f "$log"
    return $status
}

if ! "$venv/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
    python=$(find_python)
    stage "virtual environment $venv with $("$python" --version)" "$python" -m venv --clear "$venv"
fi
if [ ! -x "$venv/bin/uv" ]; then
    stage "uv, which installs packages" "$venv/bin/python" -m pip install --disable-pip-version-check -c constraints.txt uv
fi
case $extra in
"") what="packages that a training needs (5.9 GB with CUDA)" ;;
*) what="all packages, also those of tests and exports (7.4 GB with CUDA)" ;;
esac
export VIRTUAL_ENV="$venv"
stage "$what" "$venv/bin/uv" pip install -c constraints.txt -e ".$extra"
# What a training imports is compiled now: uv does not do it, and where PYTHONDONTWRITEBYTECODE is set (images of
# containers set it) Python never would, so that each start took 25 s instead of 8.
unset PYTHONDONTWRITEBYTECODE
stage "compiling what a training imports" sh -c '
    "$1/bin/python" -m compileall -q src/jepa
    "$1/bin/python" -c "import hydra.main, torch._dynamo, wandb, jepa.agent, jepa.cli.job, jepa.cli.worker"' sh "$venv"
