#!/usr/bin/env bash
# The general gate of copying: what hosts say of the gate sets, a gate fitted over all of it, and what it brings.
#   eval/recipes/general_gate.sh STEP WORK [HOST]
# STEP, in this order: data and record, for every HOST of HOSTS (smollm2-135m, qwen2.5-coder-0.5b, qwen2.5-coder-1.5b);
# fit; measure. `data` needs TEXTS, the folder of the text domains; hosts of one family share their sets. `record` and
# `measure` want accelerators, GPUS of them (1), which PROCESSES share (4). The one that ships was recorded from fewer rows
# (200 files, 64 repositories, 112 pieces of prose, for the small host the same texts in its tokens), by a version that gave
# the confidence of rebuilt tokens to the gate as a feature of its own, always 1 here: its weights are added to those of the
# constant feature beside it.
set -euo pipefail
step=$1 work=$2 host=${3:-} processes=${PROCESSES:-4} gpus=${GPUS:-1}
hosts=${HOSTS:-smollm2-135m qwen2.5-coder-0.5b qwen2.5-coder-1.5b}
at_once() { # runs the lines of standard input, each on the next accelerator
  xargs -d '\n' -P "$processes" --process-slot-var=SLOT -I{} bash -c "CUDA_VISIBLE_DEVICES=\$((SLOT % $gpus)) {}"
}
case $step in
data)
  python3 -m eval.documents --host "$host" --out "$work/sets/$host" --data "$TEXTS" \
    --sets young repo prose gate_code gate_repo gate_prose
  ;;
record)
  for shard in $(seq 0 $((processes - 1))); do
    echo "python3 -m eval.gates record --host $host --data $work/sets/$host --shard $shard/$processes" \
      "--out $work/examples/$host.$shard.safetensors"
  done | at_once
  ;;
fit)
  python3 -m eval.gates fit "$work"/examples/*.safetensors --out hf_crouter/ngram/general_gate
  for host in $hosts; do
    python3 -m eval.gates fit "$work"/examples/*.safetensors --leave-out "$host" --out "$work/unseen/$host"
    python3 -m eval.gates fit "$work/examples/$host".*.safetensors --out "$work/own/$host"
  done
  ;;
measure) # updates and free: then eval.merge
  arms="window full copy retrieve2 retrieve2_copy compact32_retrieve2 compact32_retrieve2_copy"
  largest=${hosts##* }
  {
    for host in $hosts; do
      common="--host $host --crouter none --data $work/sets/$host"
      echo "python3 -m eval.run near-matches $common --arms $arms"
      for gate in own unseen; do
        echo "python3 -m eval.run hgr collect $common --sets young --documents 64 --save $work/$gate-hgr/$host" \
          "--gate $work/$gate/$host --arms window full copy_fitted retrieve2 retrieve2_copy_fitted"
      done
    done
    common="--host $largest --crouter none --data $work/sets/$largest"
    for updates in 1 3 10 32 100; do
      echo "python3 -m eval.run updates $common --updates $updates --result updates-$updates"
    done
    for set in young prose; do
      echo "python3 -m eval.run free $common --sets $set --result free-$set"
    done
    for shard in 0/4 1/4 2/4 3/4; do
      echo "python3 -m eval.run hgr collect $common --sets repo young --documents 64 --save $work/hgr" \
        "--arms $arms --shard $shard"
    done
  } | at_once
  ;;
*) echo "unknown step $step" >&2; exit 2 ;;
esac
