#!/usr/bin/env bash
# On a machine with a GPU: the tests that need one, then the benchmarks that measure one.
#   bash benchmarks/gpu.sh FOLDER [DATA]      results go to FOLDER; DATA has MNIST (default: data)
# The tests and the first two benchmarks take some minutes and need no Ray; the last one needs Ray, Optuna and MLflow,
# and is left out where they are not installed. Results are put beside the others in benchmarks/results, and into
# docs/benchmarks.md by `python -m benchmarks.tables`.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?FOLDER} data=${2:-data} status=0
mkdir -p "$out"
step() { # NAME COMMAND …: its output in FOLDER/NAME.txt; what fails does not stop the rest
    local name=$1; shift
    if "$@" >"$out/$name.txt" 2>&1; then echo "$name: done"; else echo "$name: failed, see $out/$name.txt"; status=1; fi
}
step hardware nvidia-smi
step tests python -m pytest -q -m gpu tests/test_gpu.py tests/test_vectorized.py # the others import Ray
step step_time python -m benchmarks.step_time --output "$out"
step vectorized python -m benchmarks.vectorized --root "$data" --output "$out"
if python -c "import ray, optuna, mlflow" 2>/dev/null; then
    # Two processes share the GPU, as plain Ray Tune and as this project would have them.
    step sweep_cost python -m benchmarks.sweep_cost --ways plain stopping vectorized graphs --output "$out" \
        "data.root=$data" resources.gpus=0.5
fi
exit $status
