#!/bin/bash
# Target -> own text -> draft head -> calibration -> measurement, on one GPU.
# From the repository's root:
#
#   SPEC=out/spec scripts/speculation.sh        some 25 minutes of an H100
#   GPUS=4 SPEC=out/spec scripts/speculation.sh    calibration and measurement of
#     the four batch sizes side by side, each on a GPU and CPUs of its own
#   SMOKE=1 SPEC=out/smoke scripts/speculation.sh    a tiny target on a CPU
#
# Each step has a time limit and goes on from checkpoints when the script is run
# again with the same SPEC. Only the last lines of each log are printed. Whole
# seconds only.
set -u
cd "${REPO:-$(pwd)}"
SPEC=${SPEC:-/tmp/spec}
PY=${PY:-python3}
OUT_DIR=${OUT_DIR:-$SPEC/results}
STEPS=${STEPS:-"target head calibrate speedup"}
# Seconds of each step, 1410 in all with CORPUS. The first three are budgets that the training itself keeps.
TARGET_S=${TARGET_S:-480}
TEXTS_S=${TEXTS_S:-140}
HEAD_S=${HEAD_S:-190}
CALIBRATE_S=${CALIBRATE_S:-170}
SPEED_S=${SPEED_S:-360}
GPUS=${GPUS:-1}
# Batch sizes that have a process each where there are several GPUs.
BATCHES=${BATCHES:-$([ "${SMOKE:-0}" = 1 ] && echo "1 2" || echo "1 4 16 64")}
# A folder with a corpus that was tokenised elsewhere, as `data.build_cache`
# writes it; without it the sources of this machine's packages are tokenised.
CORPUS=${CORPUS:-}
CORPUS_S=${CORPUS_S:-180}  # tokenising them
GRACE_S=${GRACE_S:-60}     # beyond a budget before a step is killed
SMOKE=${SMOKE:-0}
EXTRA_TARGET=${EXTRA_TARGET:-}
EXTRA_HEAD=${EXTRA_HEAD:-}
EXTRA_SPEED=${EXTRA_SPEED:-}
mkdir -p "$SPEC" "$OUT_DIR"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
# One compilation cache for every step (the mains keep one that is set).
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$SPEC/compilation_cache}
T_CFG=configs/train_decoder/target_155m.py
H_CFG=configs/train_draft_head/default.py
S_CFG=configs/speculative_speedup/default.py
if [ "$SMOKE" = 1 ]; then
  export JAX_PLATFORMS=cpu
  T_CFG=configs/train_decoder/target_smoke.py
  H_CFG=configs/train_draft_head/smoke.py
  S_CFG=configs/speculative_speedup/smoke.py
fi
T0=$(date +%s)
say() { echo "[speculation $(( $(date +%s) - T0 )) s] $*"; }
has() { case " $STEPS " in *" $1 "*) return 0;; *) return 1;; esac; }
run() {  # name, limit, command...
  local name=$1 limit=$2; shift 2
  say "$name starts, at most $limit s"
  # Only the process itself: workers that die with it would leave it waiting.
  timeout --foreground -s TERM -k 60 "$limit" "$@" > "$SPEC/$name.log" 2>&1
  local rc=$?
  say "$name ended with $rc"
  tail -n "${TAIL:-6}" "$SPEC/$name.log" | cut -c1-300
}

if [ -n "$CORPUS" ]; then
  EXTRA_TARGET="--config.data.cache=$CORPUS --config.data.packages=() $EXTRA_TARGET"
  CORPUS_S=20
else
  CORPUS="$SPEC/target/data/corpus"
fi
if has target; then
  # The corpus is tokenised first, outside the budget.
  run target $((TARGET_S + CORPUS_S + GRACE_S)) $PY -m experiments.train_decoder --config=$T_CFG \
    --workdir="$SPEC/target" --config.train.max_seconds=$TARGET_S $EXTRA_TARGET
fi
if [ ! -e "$SPEC/target/model/config.json" ]; then
  say "no target model: nothing more can run"; exit 1
fi
if has head; then
  LIMITS=""
  [ "$SMOKE" = 1 ] || LIMITS="--config.texts.max_seconds=$TEXTS_S --config.train.max_seconds=$HEAD_S"
  run head $((TEXTS_S + HEAD_S + GRACE_S)) $PY -m experiments.train_draft_head --config=$H_CFG \
    --workdir="$SPEC/head" --config.target="$SPEC/target/model" --config.corpus="$CORPUS" \
    $LIMITS $EXTRA_HEAD
fi
if [ ! -e "$SPEC/head/head/draft_head.json" ]; then
  say "no draft head: nothing more can run"; exit 1
fi
COMMON="--config=$S_CFG --config.target=$SPEC/target/model --config.head=$SPEC/head/head \
  --config.corpus=$CORPUS"
calibrate_and_measure() {  # suffix of names, flags...
  local end=$1; shift
  local art="$SPEC/policy$end.json" methods=""
  if has calibrate; then
    run calibrate$end $((CALIBRATE_S + GRACE_S)) $PY -m experiments.calibrate_speculation $COMMON \
      --config.artefact="$art" --config.calibration.max_seconds=$CALIBRATE_S.0 "$@" $EXTRA_SPEED \
      --workdir="$SPEC/calibration$end"
  fi
  has speedup || return 0
  # Without an artefact: what needs none.
  [ -e "$art" ] || methods='--config.methods=("plain","fixed","eagle2","ngram","suffix","static")'
  TAIL=60 run speedup$end $((SPEED_S + GRACE_S)) $PY -m experiments.speculative_speedup $COMMON $methods \
    --config.artefact="$art" --config.max_seconds=$SPEED_S.0 "$@" $EXTRA_SPEED --workdir="$SPEC/speedup$end"
}
if [ "$GPUS" -le 1 ]; then
  calibrate_and_measure ""
else
  IFS=, read -ra devices <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((GPUS - 1)))}"
  [ ${#devices[@]} -ge "$GPUS" ] || { say "GPUS=$GPUS, but CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"; exit 2; }
  cpus=($($PY -c "import os; print(*sorted(os.sched_getaffinity(0)))"))
  share=$(( ${#cpus[@]} / GPUS ))
  trap 'trap - INT TERM; kill 0' INT TERM
  for (( gpu = 0; gpu < GPUS; gpu++ )); do
    (
      export CUDA_VISIBLE_DEVICES=${devices[gpu]}
      if [ $share -gt 0 ]; then
        own=("${cpus[@]:gpu * share:share}")
        taskset -cp "$(IFS=,; echo "${own[*]}")" $BASHPID > /dev/null
      fi
      number=0
      for batch in $BATCHES; do
        if [ $((number % GPUS)) = $gpu ]; then
          # The first process has the long prompts; rows are compared in each.
          shared="--config.exact_batches=($batch,)"
          [ $number = 0 ] || shared="$shared --config.long_prompts=()"
          calibrate_and_measure _$batch "--config.batches=($batch,)" $shared
        fi
        number=$((number + 1))
      done
    ) &
  done
  wait
fi
for f in "$SPEC"/*.log "$SPEC"/policy*.json "$SPEC"/target/train/metrics.jsonl "$SPEC"/head/train/metrics.jsonl \
         "$SPEC"/calibration*/records.jsonl "$SPEC"/calibration*/log.npz "$SPEC"/speedup*/records.jsonl \
         "$SPEC"/speedup*/report.html "$SPEC"/speedup*/figure_*.png; do
  [ -e "$f" ] || continue
  name=$(echo "${f#$SPEC/}" | tr / _)
  cp "$f" "$OUT_DIR/$name"
done
say "small results in $OUT_DIR: $(du -sh "$OUT_DIR" | cut -f1)"
