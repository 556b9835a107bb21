#!/usr/bin/env bash
# Remakes the shipped crouter: prepare the corpus, train, align to the host, measure.
#   eval/recipes/crouter_code_mini.sh STEP WORK TOKENIZER HOST
# STEP: prepare | train-a | train-b | align | calibrate | documents | measure. WORK: folder for data and runs. The
# arguments are those that were used; train-b became the shipped one (NAME=b), by its reconstruction NLL on calibration
# documents. PROSE: folder of the prose domains, for `documents`. The general gate is fitted by eval.gates (general_gate.sh).
set -euo pipefail
step=$1 work=$2 tokenizer=$3 host=${4:-}
seconds=${SECONDS_TRAIN:-470} align_seconds=${SECONDS_ALIGN:-240} name=${NAME:-b}
common=(--data "$work/data" --tokenizer "$tokenizer" --bf16 --compile --batch-size 64 --learning-rate 2e-3
        --log-every 100 --seconds "$seconds")
case $step in
prepare)
  python3 -m hf_crouter.data.prepare --corpus installed-python --tokenizer "$tokenizer" --output "$work/data"
  ;;
train-a)  # shared layers applied three times: depth that costs no bytes
  python3 -m hf_crouter train "${common[@]}" --output "$work/a" --config \
    embedding_size=128 hidden_size=384 intermediate_size=1024 num_attention_heads=6 latent_size=512 \
    num_encoder_layers=2 num_encoder_loops=3 num_decoder_layers=3 num_decoder_loops=3
  ;;
train-b)  # wider, applied twice, a smaller embedding
  python3 -m hf_crouter train "${common[@]}" --output "$work/b" --config \
    embedding_size=96 hidden_size=448 intermediate_size=960 num_attention_heads=7 latent_size=512 \
    num_encoder_layers=2 num_encoder_loops=2 num_decoder_layers=3 num_decoder_loops=2
  ;;
align)
  python3 -m hf_crouter align --only projector --host "$host" --crouter "$work/$name/crouter" --data "$work/data" \
    --output "$work/$name/align" --bf16 --batch-size 8 --learning-rate 1e-3 --warmup-steps 50 \
    --chunks 1 2 4 8 8 16 32 64 --log-every 50 --seconds "$align_seconds"
  ;;
calibrate)  # on packages that are in neither training nor test
  python3 -m hf_crouter calibrate --crouter "$work/$name/crouter" --chunks 1000 --corpus "wheels:django,flask,sphinx,\
celery,scrapy,tornado,fastapi,starlette,sqlalchemy,marshmallow,dask,black,paramiko,docutils,beets,mako"
  ;;
documents)  # of the HGR measurement, and those that the gates learn from
  python3 -m eval.documents --out "$work/hgr" --data "$PROSE"
  ;;
measure)
  python3 -m eval.run tra-mini --crouter "$work/$name/crouter" --data "$work/data" --result "${RESULT:-tra-mini}" \
    --text ${TEXTS:-}
  python3 -m eval.run hgr collect --host "$host" --crouter "$work/$name/crouter" --data "$work/hgr" --save "$work/arms"
  python3 -m eval.run hgr report --host "$host" --crouter "$work/$name/crouter" --data "$work/hgr" --save "$work/arms"
  ;;
*) echo "unknown step $step" >&2; exit 2 ;;
esac
