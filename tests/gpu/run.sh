#!/bin/sh
# Of the bundle that `make gpu-bundle` packs: sh run.sh [--json gpu.json] [other arguments of tests/gpu/measure.py]
set -e
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
mkdir -p "$here/site"
for wheel in "$here"/wheels/*.whl; do
    [ -e "$wheel" ] && "$python" -m zipfile -e "$wheel" "$here/site"
done
export PYTHONPATH="$here/tree:$here/site${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -P -m tests.gpu.measure --json gpu.json "$@"
