#!/usr/bin/env bash
# Prepares a node: this project, at the versions of constraints.txt, in an environment of its own.
#
# `ray up` runs it on every node, and on the same node again; where nothing has changed it does nothing.
# Reads PRUNETUNE_STORAGE (where sweeps write: one place for all nodes) and PRUNETUNE_PYTHON (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$HOME/prunetune-venv

[ -x "$venv/bin/python" ] || "${PRUNETUNE_PYTHON:-python3}" -m venv "$venv"

# Not pip's own idea of "satisfied already": the project's version number stays while its code changes.
state=$(find pyproject.toml constraints.txt prunetune -type f -not -path '*/__pycache__/*' -print0 |
    sort -z | xargs -0 sha256sum | sha256sum)
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$state" ]; then
    rm -rf build  # modules that are not there any more
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt ".[cluster]"
    echo "$state" >"$venv/installed"
fi

# What every command on the node needs: those of `ray up`, `ray exec` and `ray attach` read ~/.bashrc, and jobs
# inherit the environment of `ray start`. Only the sweep's driver, on the head, writes to MLflow.
cat >"$HOME/.prunetune.sh" <<EOF
export PATH="$venv/bin:\$PATH"
export RAY_AUTH_MODE=token
export PRUNETUNE_STORAGE='$PRUNETUNE_STORAGE'
export MLFLOW_TRACKING_URI=http://127.0.0.1:5000
EOF
grep -qs prunetune.sh "$HOME/.bashrc" || echo '. "$HOME/.prunetune.sh"' >>"$HOME/.bashrc"
