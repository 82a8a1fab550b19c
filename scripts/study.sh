#!/bin/bash
# Study model, in two trainings -> every pattern at matched answers -> speed on
# captured masks, on one GPU. From the repository's root:
#
#   STUDY=out/study scripts/study.sh        some 40 minutes of an H100
#   SMOKE=1 STUDY=out/smoke scripts/study.sh    a tiny model on a CPU
#
# The first training (train_decoder/study.py) is kept in STUDY/first, the second
# (study_long.py) goes on from it and leaves the measured model in STUDY/train.
# Settings are those of results/frontier_study_h200.jsonl, whose steps ran on
# several machines; budgets are of time, so other cards train on other tokens.
# Steps are independent: each has a time limit, records as it goes, and goes on
# from its records when the script is run again with the same STUDY. Only the
# last lines of each log are printed. Whole seconds only.
#   BUDGET: seconds in all; a step after the training gets at most what is left.
set -u
cd "${REPO:-$(pwd)}"
STUDY=${STUDY:-/tmp/study}
PY=${PY:-python3}
OUT_DIR=${OUT_DIR:-$STUDY/results}
# "calibrate" may be added before "frontier", in a STUDY that has no frontier yet: thresholds by head, which the
# frontier then measures too ("ours"). The record was taken without: they did worse than one threshold.
STEPS=${STEPS:-"compile train long frontier capture speed"}
BUDGET=${BUDGET:-2400}
# Seconds of each step. The first two are budgets that the trainings keep; tokenising comes before the first.
TRAIN_S=${TRAIN_S:-470}
LONG_S=${LONG_S:-420}
CORPUS_S=${CORPUS_S:-200}
CALIBRATE_S=${CALIBRATE_S:-90}    # trying heads; joint choices, prompts and compilation come on top
FRONTIER_S=${FRONTIER_S:-620}
CAPTURE_S=${CAPTURE_S:-60}
SPEED_S=${SPEED_S:-90}
GRACE_S=${GRACE_S:-60}            # beyond a budget before a step is killed
RESERVE_S=${RESERVE_S:-100}       # of what is left, kept from the frontier for capture and speed
COMPILE_THREADS=${COMPILE_THREADS:-4}
SMOKE=${SMOKE:-0}
MODEL=${MODEL:-}                  # another trained model: then no training
EXTRA_TRAIN=${EXTRA_TRAIN:-}; EXTRA_LONG=${EXTRA_LONG:-}; EXTRA_FRONTIER=${EXTRA_FRONTIER:-}
mkdir -p "$STUDY" "$OUT_DIR"
# One compilation cache for every step (the mains keep one that is set).
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$STUDY/compilation_cache}
CFG=configs
T_CFG=$CFG/train_decoder/study.py; L_CFG=$CFG/train_decoder/study_long.py
C_CFG=$CFG/calibrate_answers/study.py; F_CFG=$CFG/frontier/study.py
Q_CFG=$CFG/capture_attention/study.py; S_CFG=$CFG/attention_speed/captured.py
if [ "$SMOKE" = 1 ]; then
  export JAX_PLATFORMS=cpu
  T_CFG=$CFG/train_decoder/study_smoke.py; L_CFG=$T_CFG
  C_CFG=$CFG/calibrate_answers/study_smoke.py
  F_CFG=$CFG/frontier/study_smoke.py; Q_CFG=$CFG/capture_attention/smoke.py
  S_CFG=$CFG/attention_speed/captured_smoke.py
  BUDGET=${SMOKE_BUDGET:-3600}; TRAIN_S=${SMOKE_TRAIN_S:-20}; LONG_S=$TRAIN_S; CALIBRATE_S=20; FRONTIER_S=${SMOKE_FRONTIER_S:-600}
fi
T0=$(date +%s)
elapsed() { echo $(( $(date +%s) - T0 )); }
left() { echo $(( BUDGET - $(elapsed) )); }
say() { echo "[study $(elapsed) s] $*"; }
has() { case " $STEPS " in *" $1 "*) return 0;; *) return 1;; esac; }
least() { [ "$1" -lt "$2" ] && echo "$1" || echo "$2"; }
run() {  # name, limit, command...
  local name=$1 limit=$2; shift 2
  say "$name starts, at most $limit s"
  timeout --foreground -s TERM -k 30 "$limit" "$@" > "$STUDY/$name.log" 2>&1
  local rc=$?
  say "$name ended with $rc"
  tail -n "${TAIL:-6}" "$STUDY/$name.log" | cut -c1-400
}
collect() {
  for f in "$STUDY"/*.log "$STUDY"/calibration.json "$STUDY"/{first/,}train/train/metrics.jsonl \
           "$STUDY"/{first/,}train/model/{config,evaluation,training_config}.json "$STUDY"/calibration/records.jsonl \
           "$STUDY"/frontier/{records.jsonl,matched.json,report.html} "$STUDY"/captured/records.jsonl \
           "$STUDY"/speed/records.jsonl; do
    [ -e "$f" ] || continue
    cp "$f" "$OUT_DIR/$(echo "${f#$STUDY/}" | tr / _)"
  done
  # The weights too (about 63 MB in bfloat16), unless told otherwise: later runs need no training.
  if [ "${KEEP_MODEL:-1}" = 1 ] && [ -e "$STUDY/train/model/model.safetensors" ]; then
    mkdir -p "$OUT_DIR/model" && cp "$STUDY"/train/model/* "$OUT_DIR/model/"
  fi
  say "results in $OUT_DIR: $(du -sh "$OUT_DIR" | cut -f1)"
}
trap collect EXIT

if [ -n "$MODEL" ] && [ ! -e "$STUDY/train/model/config.json" ]; then
  mkdir -p "$STUDY/train" && cp -r "$MODEL" "$STUDY/train/model"
fi
COMPILER=
if has compile && [ ! -e "$STUDY/frontier/records.jsonl" ]; then
  # The frontier's programs need shapes alone: they compile while the model trains.
  mkdir -p "$STUDY/shape"
  $PY - "$T_CFG" "$STUDY/shape" > "$STUDY/shape.log" 2>&1 <<'P'
import importlib, json, pathlib, shutil, sys
from unisparse_jax import models
from unisparse_jax.models import hf_config
name = sys.argv[1].removesuffix(".py").replace("/", ".")
config = importlib.import_module(name).get_config()
folder = pathlib.Path(sys.argv[2])
values = hf_config.to_dict(models.DecoderConfig(**config.model.to_dict()), dtype="bfloat16")
(folder / "config.json").write_text(json.dumps(values))
root = pathlib.Path(models.__file__).parents[1]
shutil.copy(root / "pretrained" / config.data.tokenizer / "tokenizer.json", folder)
P
  XLA_PYTHON_CLIENT_PREALLOCATE=false timeout -k 10 "$((TRAIN_S + CORPUS_S + LONG_S))" nice -n 5 $PY -m experiments.frontier \
    --config="$F_CFG:$STUDY" --config.model="$STUDY/shape" --config.compile_only=True \
    --config.compile_threads=$COMPILE_THREADS --workdir="$STUDY/compile" > "$STUDY/compile.log" 2>&1 &
  COMPILER=$!
  say "programs compile beside the training"
fi
# The compiler beside a training needs some of the card's memory.
MEMORY=${TRAIN_MEM_FRACTION:-0.85}
FIRST=$STUDY/first/train
if has train && [ -z "$MODEL" ] && [ ! -e "$FIRST/model/evaluation.json" ]; then
  XLA_PYTHON_CLIENT_MEM_FRACTION=$MEMORY run train $((TRAIN_S + CORPUS_S + GRACE_S)) \
    $PY -m experiments.train_decoder --config=$T_CFG --workdir="$FIRST" \
    --config.train.max_seconds=$TRAIN_S $EXTRA_TRAIN
fi
if has long && [ -z "$MODEL" ] && [ ! -e "$STUDY/train/model/evaluation.json" ]; then
  if [ ! -e "$FIRST/model/config.json" ]; then
    say "no first model: the second training cannot begin"; exit 1
  fi
  CACHE=; [ -e "$FIRST/data/corpus" ] && CACHE=--config.data.cache=$FIRST/data/corpus
  XLA_PYTHON_CLIENT_MEM_FRACTION=$MEMORY run long $((LONG_S + GRACE_S)) \
    $PY -m experiments.train_decoder --config=$L_CFG --workdir="$STUDY/train" --config.initial="$FIRST/model" \
    $CACHE --config.train.max_seconds=$LONG_S $EXTRA_LONG
fi
if [ -n "$COMPILER" ]; then
  if [ "$SMOKE" = 1 ]; then wait "$COMPILER"; else kill "$COMPILER" 2>/dev/null; wait "$COMPILER" 2>/dev/null; fi
  say "compiler: $(tail -n 2 "$STUDY/compile.log" | tr '\n' ' ' | cut -c1-300)"
fi
if [ ! -e "$STUDY/train/model/config.json" ]; then
  say "no model: nothing more can run"; exit 1
fi
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
if has calibrate && [ ! -e "$STUDY/calibration.json" ]; then
  run calibrate "$(least $((CALIBRATE_S + 2 * GRACE_S)) "$(left)")" $PY -m experiments.calibrate_answers \
    --config="$C_CFG:$STUDY" --workdir="$STUDY/calibration" --config.max_seconds=$CALIBRATE_S.0
  for t in 0.2 0.5 1.5 1000; do  # the tightest that was reached
    f="$STUDY/calibration/calibration_$t.json"
    [ -e "$f" ] && [ ! -e "$STUDY/calibration.json" ] && cp "$f" "$STUDY/calibration.json" && say "calibrated within $t nats"
  done
fi
if has frontier; then
  S=$(least "$FRONTIER_S" $(( $(left) - RESERVE_S )))
  if [ "$S" -gt 30 ]; then
    TAIL=80 run frontier $((S + GRACE_S)) $PY -m experiments.frontier --config="$F_CFG:$STUDY" \
      --workdir="$STUDY/frontier" --config.max_seconds=$S.0 $EXTRA_FRONTIER
  else
    say "no time for the frontier"
  fi
fi
if has capture && [ "$(left)" -gt 20 ]; then
  run capture "$(least $((CAPTURE_S + GRACE_S)) "$(left)")" $PY -m experiments.capture_attention \
    --config="$Q_CFG:$STUDY" --workdir="$STUDY/captured"
fi
if has speed && [ -e "$STUDY/frontier/matched.json" ] && [ "$(left)" -gt 20 ]; then
  # It owns a folder once: after a stop it starts afresh beside the records of before.
  [ -e "$STUDY/speed" ] && mv "$STUDY/speed" "$STUDY/speed.$(date +%s)"
  TAIL=40 run speed "$(least $((SPEED_S + GRACE_S)) "$(left)")" $PY -m experiments.attention_speed \
    --config="$S_CFG:$STUDY" --workdir="$STUDY/speed"
fi
