#!/usr/bin/env bash
# Remakes the eight experts and the routing measurement.
#   eval/recipes/routing.sh STEP WORK [HOST]
# STEP: data | text | train | measure | report. WORK: folder for data and runs. `data` needs PROSE, the folder of the
# text domains; `train` and `measure` want an accelerator, and PROCESSES that share it (2 by default).
set -euo pipefail
step=$1 work=$2 host=${3:-smollm2-135m} processes=${PROCESSES:-2}
common=(--data "$work/routing-data" --save "$work/routing")
in_turn() {  # the same stage in several processes, each with its share
  trap 'kill $(jobs -p) 2>/dev/null' EXIT
  for shard in $(seq 0 $((processes - 1))); do
    python3 -m eval.run routing "$1" "${common[@]}" --host "$host" --shard "$shard/$processes" "${@:2}" &
  done
  for _ in $(seq "$processes"); do wait -n; done  # ends with the first that fails
}
case $step in
data)
  python3 -m eval.routing_data --data "$PROSE" --out "$work/routing-data"
  ;;
text)  # what needs no model: n-grams, TF-IDF
  python3 -m eval.run routing text "${common[@]}"
  ;;
train)  # STEPS of the crouter's adapter and of the host's
  # shellcheck disable=SC2086
  in_turn train --steps ${STEPS:-1000 300} --continual --options '{"compile": true, "log_every": 100}'
  ;;
measure)
  in_turn measure
  ;;
report)
  python3 -m eval.run routing report "${common[@]}" --result "${RESULT:-routing}"
  ;;
*) echo "unknown step $step" >&2; exit 2 ;;
esac
