#!/usr/bin/env bash
# Compare methods at 224 pixels for at most ten minutes, then report the cells that are done; see gpu.md.
#
#     recipes/comparison/gpu.sh FOLDER OUTPUT_DIR [arguments of compare_methods.py]
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "Usage: gpu.sh FOLDER OUTPUT_DIR [arguments of compare_methods.py]" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
folder=$1 output=$2
shift 2
for part in model data; do
    if [ ! -d "$folder/$part" ]; then
        echo "$folder/$part is no folder; expected model/ (a backbone) and data/ (its images) in $folder." >&2
        exit 2
    fi
done
compare=(python "$here/../compare_methods.py" --config "$here/gpu.yaml" --model_name_or_path "$folder/model"
    --dataset_name "$folder/data" --output_dir "$output" "$@")
# At SIGTERM a cell saves and leaves with 143 (timeout itself ends with 124): the next call resumes it.
status=0
timeout --signal=TERM --kill-after=20 "${TIME_LIMIT:-560}" "${compare[@]}" || status=$?
if [ "$status" -ne 0 ] && [ "$status" -ne 124 ] && [ "$status" -ne 143 ]; then
    exit "$status"
fi
"${compare[@]}" --only_report
