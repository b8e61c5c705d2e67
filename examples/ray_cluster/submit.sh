#!/usr/bin/env bash
# Submits this folder as a job, follows its log, brings the policies back into outcome/, and exits as the search did.
#
#   ./submit.sh ADDRESS RUN [flags of autoprune search]
#   ./submit.sh http://127.0.0.1:8265 /mnt/runs/digits --workers 8
#
# ADDRESS is the cluster's dashboard; where it is '', $RAY_API_SERVER_ADDRESS. RUN is the run folder, an absolute path
# on the head node. Submitted again with the same RUN, the search goes on where it stopped.
set -euo pipefail

if [ $# -lt 2 ] || [[ $2 != /* ]]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 64
fi
address=${1:-${RAY_API_SERVER_ADDRESS:?give an address, or set it}}
run=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
job=autoprune-$(date +%Y%m%d-%H%M%S)-$$
back=(python "$here/bring_back.py" "$address" "$job" "$run" "$here/outcome")

[ -f "$here/weights.safetensors" ] || python "$here/model.py"
echo "job $job; should this be cut off, it goes on, and brings its policies here by: ${back[*]}"
# `ray job submit` says 1 for every failure, and for a log that it lost; how the search ended is asked afterwards.
ray job submit --address "$address" --submission-id "$job" --working-dir "$here" \
    --runtime-env "$here/runtime_env.yaml" --log-style record --log-color false -- \
    autoprune search --engine ray --ray-address auto --run "$run" "$@" || true
exec "${back[@]}"
