#!/usr/bin/env bash
# The general gate of copying that ships: what three hosts say of the gate sets, and a gate fitted over all of it.
#   eval/recipes/general_gate.sh STEP WORK [HOST]
# STEP: data | record, for every HOST (smollm2-135m, qwen2.5-coder-0.5b, qwen2.5-coder-1.5b), then fit. `data` needs TEXTS, the
# folder of the text domains; the two larger hosts share their sets. `record` wants an accelerator, which PROCESSES share (4 by
# default). The one that ships was recorded from fewer rows (200 files, 64 repositories, 112 pieces of prose, for the small host
# the same texts in its tokens), by a version that gave the confidence of rebuilt tokens to the gate as a feature of its own,
# always 1 here: its weights are added to those of the constant feature beside it.
set -euo pipefail
step=$1 work=$2 host=${3:-} processes=${PROCESSES:-4}
case $step in
data)
  python3 -m eval.documents --host "$host" --out "$work/sets/$host" --sets gate_code gate_repo gate_prose --data "$TEXTS"
  ;;
record)
  pids=()
  for shard in $(seq 0 $((processes - 1))); do
    python3 -m eval.gates record --host "$host" --data "$work/sets/$host" --shard "$shard/$processes" \
      --out "$work/examples/$host.$shard.safetensors" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid"; done
  ;;
fit)
  python3 -m eval.gates fit "$work"/examples/*.safetensors --out hf_crouter/ngram/general_gate
  for host in smollm2-135m qwen2.5-coder-0.5b qwen2.5-coder-1.5b; do
    python3 -m eval.gates fit "$work"/examples/*.safetensors --leave-out "$host" --out "$work/unseen/$host"
    python3 -m eval.gates fit "$work/examples/$host".*.safetensors --out "$work/own/$host"
  done
  ;;
*) echo "unknown step $step" >&2; exit 2 ;;
esac
