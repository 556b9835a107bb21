#!/usr/bin/env bash
# The figures on larger hosts, and the projector and experts behind them, which do not ship; layer budgets do.
#   eval/recipes/qwen_hosts.sh STEP WORK [HOST]
# STEP: data | align | budgets | compaction | collect | questions | near | drafts | ruler | peers | experts | report,
# in this order; all but data and report want an accelerator, compaction and drafts alone. WORK: folder for sets and runs. HOST:
# qwen2.5-coder-1.5b (the default) or -0.5b. `data` needs TEXTS, the folder of the text domains and questions. `peers` runs in an environment
# of its own (kvpress 0.5.5, transformers 5.2, hqq). PROCESSES share the accelerator in collect, questions and peers (4 by
# default). OWN and UNSEEN: gates of this host alone and of others alone (general_gate.sh), for `collect`.
set -euo pipefail
step=$1 work=$2 host=${3:-qwen2.5-coder-1.5b} processes=${PROCESSES:-4}
here="$work/$host" sets="$work/sets" crouter="$work/$host/crouter"
folder() { python3 -c "import sys; from hf_crouter.hosts.fetch import resolve_host; print(resolve_host(sys.argv[1]))" "$host"; }
in_turn() {  # the same command in several processes, each with its share
  trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
  for shard in $(seq 0 $((processes - 1))); do "$@" --shard "$shard/$processes" & done
  for _ in $(seq "$processes"); do wait -n; done  # ends with the first that fails
}
case $step in
data)  # both hosts share their tokenizer
  python3 -m eval.documents --host "$host" --out "$sets" --sets young repo prose gate_code gate_repo \
    --data "$TEXTS" --corpus "$work/gate"
  python3 -m eval.run questions prepare --data "$TEXTS" --save "$here/questions" --host "$host"
  python3 -m eval.budget_texts --host "$host" --code "$work/gate" --data "$TEXTS" --out "$work/budget-texts"
  python3 -m eval.routing.pair_texts --data "$TEXTS" --out "$work/pair"
  ;;
align)  # in a copy of the shipped crouter
  shipped=$(python3 -c "from hf_crouter.crouter.loading import shipped_crouter; print(shipped_crouter())")
  mkdir -p "$crouter-projector" && cp -r "$shipped/." "$crouter-projector"
  python3 -m hf_crouter align --host "$host" --crouter "$crouter-projector" --data "$work/gate" --only projector \
    --seconds 150 --batch-size 4 --learning-rate 1e-3 --hidden-size 512 --bf16 --chunks 1 2 4 8 8 16 --output "$here/align"
  ;;
budgets)  # where `Compact` finds them
  python3 -m hf_crouter budgets --host "$host" --data "$work/budget-texts" --documents 6 --batch-size 6 \
    --output "hf_crouter/checkpoints/layer-budgets/$host"
  ;;
compaction)  # alone on the accelerator
  python3 -m eval.run compaction --host "$host"
  ;;
collect)
  in_turn python3 -m eval.run hgr collect --data "$sets" --save "$here/hgr" --host "$host" --sets young repo \
    --documents 64 --crouter "$crouter-projector" ${OWN:+--gate "$OWN"}
  if [ -n "${UNSEEN:-}" ]; then
    in_turn python3 -m eval.run hgr collect --data "$sets" --save "$here/unseen-hgr" --host "$host" --sets young \
      --documents 64 --crouter none --gate "$UNSEEN" --arms window full copy_fitted retrieve2 retrieve2_copy_fitted
  fi
  ;;
questions)
  in_turn python3 -m eval.run questions collect --save "$here/questions" --host "$host" --crouter none --batch 4
  ;;
near)
  python3 -m eval.run near-matches --data "$sets" --host "$host" --crouter none
  python3 -m eval.run updates --data "$sets" --host "$host" --crouter none
  python3 -m eval.run free --data "$sets" --host "$host" --crouter none
  ;;
drafts)
  python3 -m eval.run reading --parts drafts --host "$host" --crouter none --data "$sets" --arms window copy --free 8 \
    --tokens 128 --result "reading-drafts-$host"
  ;;
ruler)
  python3 -m eval.run ruler --host "$host" --crouter none --lengths 8k --chat \
    --arms full compact64_retrieve2 compact32_retrieve2 compact128 retrieve2 retrieve4 window compact32_retrieve2_copy
  ;;
peers)
  in_turn python3 -m eval.peers --data "$sets" --sets young repo --questions "$here/questions" --host "$(folder)" \
    --save "$here/hgr" --documents 64
  ;;
experts)
  for name in code prose; do
    python3 -m hf_crouter expert add "$name" --data "$work/pair/$name" --host "$host" --experts "$here/experts" \
      --compressor-seconds 60 --host-seconds 40 --host-rank 2 --host-alpha 4 --host-learning-rate 1e-3 --bf16
  done
  python3 -m eval.run experts --host "$host" --experts "$here/experts" --data code="$work/pair/test_code" \
    prose="$work/pair/test_prose" novels="$work/pair/test_novels" meetings="$work/pair/test_meetings"
  ;;
report)
  mv "$here"/hgr/questions.*.json "$here/questions" 2>/dev/null || true  # what the peers answered
  python3 -m eval.run hgr report --data "$sets" --save "$here/hgr" --host "$host" --sets young repo
  if [ -d "$here/unseen-hgr" ]; then
    python3 -m eval.run hgr report --data "$sets" --save "$here/unseen-hgr" --host "$host" --sets young \
      --result "hgr-unseen-$host"
  fi
  python3 -m eval.run questions report --save "$here/questions" --host "$host"
  ;;
*) echo "unknown step $step" >&2; exit 2 ;;
esac
