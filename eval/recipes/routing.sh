#!/usr/bin/env bash
# Remakes the eight experts and the routing measurement.
#   eval/recipes/routing.sh STEP WORK [HOST]
# STEP: data | text | train | compare | measure | costs | decide | report | ship, in this order; train to costs want an
# accelerator (name it in DEVICE for the report), which PROCESSES share (2 by default) except in `costs`. WORK: folder
# for data and runs. `data` needs PROSE, the folder of the text domains. BOX: seconds of training of an expert's two
# parts, as each process has them to itself or not.
set -euo pipefail
step=$1 work=$2 host=${3:-smollm2-135m} processes=${PROCESSES:-2}
common=(--data "$work/routing-data" --save "$work/routing")
read -r -a box <<<"${BOX:-75 20}"
options='{"compile": true, "log_every": 100, "host_rank": 2, "host_alpha": 4, "host_learning_rate": 1e-3}'
in_turn() {  # the same stage in several processes, each with its share
  trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
  for shard in $(seq 0 $((processes - 1))); do
    python3 -m eval.run routing "$1" "${common[@]}" --host "$host" --shard "$shard/$processes" "${@:2}" &
  done
  for _ in $(seq "$processes"); do wait -n; done  # ends with the first that fails
}
case $step in
data)
  python3 -m eval.routing.data --data "$PROSE" --out "$work/routing-data"
  ;;
text)  # what needs no model: n-grams, TF-IDF
  python3 -m eval.run routing text "${common[@]}"
  ;;
train)  # the experts; one adapter of all domains in turn, one of all together
  in_turn train --seconds "${box[@]}" --options "${OPTIONS:-$options}" --continual
  ;;
compare)  # whole copies of the crouter, adapters of other ranks
  in_turn train --seconds "${box[@]}" --options "${OPTIONS:-$options}" --compared wiki_en novels_en
  ;;
measure)
  in_turn measure --parts reconstruction host probe shortlist arrow compared
  ;;
costs)
  python3 -m eval.run routing measure "${common[@]}" --host "$host" --parts latency
  ;;
decide | report)
  python3 -m eval.run routing "$step" "${common[@]}" ${DEVICE:+--device "$DEVICE"}
  ;;
ship)  # the set that comes with the package, in WORK/experts
  python3 -m eval.run routing ship "${common[@]}" --host "$host" --domains python wiki_en --out "$work/experts" \
    --options '{"calibration_chunks": 96}'
  ;;
*) echo "unknown step $step" >&2; exit 2 ;;
esac
