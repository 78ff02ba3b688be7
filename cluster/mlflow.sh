#!/usr/bin/env bash
# Starts the MLflow server of the head, unless it runs already.
#
# It listens on the loopback only: MLflow has no users and no passwords, so it is reached through SSH. It is no
# child of Ray's, so a restart of Ray leaves it alone. The database is on the head's disk, because SQLite and
# network filesystems do not go together; artifacts pass through the server into the storage, so that nobody
# else needs the right to write there.
set -euo pipefail
folder=$HOME/mlflow
mkdir -p "$folder"

is_up() {
    python -c 'import urllib.request as u; u.urlopen("http://127.0.0.1:5000/health", timeout=5)' 2>/dev/null
}

is_up && exit
# The storage's options (?region=…&endpoint_override=…) are for PyArrow; MLflow's S3 client has variables of its own.
storage=${PRUNETUNE_STORAGE%%\?*} scheme=https endpoint=
IFS='&' read -ra options <<<"${PRUNETUNE_STORAGE#"$storage"}"
for option in "${options[@]}"; do
    case ${option#\?} in
    scheme=*) scheme=${option#*=} ;;
    region=*) export AWS_DEFAULT_REGION=${option#*=} ;;
    endpoint_override=*) endpoint=${option#*=} ;;
    esac
done
[ -z "$endpoint" ] || export MLFLOW_S3_ENDPOINT_URL="$scheme://${endpoint#*://}"
# Its jobs are about traces of language models: processes that nobody here needs.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
setsid nohup mlflow server --host 127.0.0.1 --port 5000 --workers 1 \
    --backend-store-uri "sqlite:///$folder/mlflow.db" \
    --artifacts-destination "$storage/mlartifacts" \
    >>"$folder/server.log" 2>&1 </dev/null &
for _ in $(seq 60); do
    is_up && exit
    sleep 1
done
echo "MLflow has not started; see $folder/server.log" >&2
exit 1
