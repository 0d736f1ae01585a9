#!/usr/bin/env bash
# The multi-GPU tables of docs/performance.md, on all GPUs of one machine (four are meant):
#
#     tools/bench_scale.sh outputs/scale              # every table
#     tools/bench_scale.sh outputs/scale layouts      # one: layouts sharing length qwen mixed
#                                                     #      parity checkpoint
#
# Each row is a run of tools.bench_step (or bench_checkpoint, or the GPU tests) with a limit of its
# own; its JSON and log lie in the folder. A row whose JSON is complete is not run again, so a study
# that was cut goes on where it stopped: give the same folder.
#
#     GPUS=2 tools/bench_scale.sh outputs/scale       # fewer GPUs: the layouts that fit them
#     SHAPE=small DTYPE=fp32 LONG=2048 GPUS=2 LIMIT=120 tools/bench_scale.sh /tmp/scale   # CPUs
set -uo pipefail
FOLDER=${1:?a folder for the results}
shift
TABLES=${*:-layouts sharing length qwen mixed parity checkpoint}
PYTHON=${PYTHON:-python3}
GPUS=${GPUS:-4}
SHAPE=${SHAPE:-mistral-7b}
SECOND_SHAPE=${SECOND_SHAPE:-qwen2.5-7b}
DTYPE=${DTYPE:-bf16}
LONG=${LONG:-131072}    # tokens of the main table
LIMIT=${LIMIT:-400}     # seconds a row
HALF=$((GPUS / 2))
GRADS=$DTYPE            # type of the gradients where memory is short
export CUDA_DEVICE_MAX_CONNECTIONS=1
mkdir -p "$FOLDER"
failed=0

# row NAME PROCESSES MODULE ARGUMENTS...: runs one row, and says how it ended.
row() {
  local name=$1 ranks=$2 module=$3
  shift 3
  if [ -f "$FOLDER/$name.json" ]; then
    echo "$name: done before"
    return
  fi
  local started=$SECONDS status
  timeout -k 10 "$LIMIT" "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
    -m "$module" "$@" --json "$FOLDER/$name.partial.json" >"$FOLDER/$name.log" 2>&1
  status=$?
  if [ $status -eq 0 ]; then
    mv "$FOLDER/$name.partial.json" "$FOLDER/$name.json"
    echo "$name: $((SECONDS - started)) s"
    grep -A 4 "model TFLOP/s a GPU\|^saving" "$FOLDER/$name.log" | sed 's/^/    /'
  else
    failed=1
    echo "$name: FAILED ($status) after $((SECONDS - started)) s, see $FOLDER/$name.log"
    grep -m 1 -i "out of memory" "$FOLDER/$name.log" | cut -c1-200
  fi
}

step() {
  local name=$1
  shift
  row "$name" "$GPUS" tools.bench_step --dtype "$DTYPE" --layout shared --warmup 1 --repeats 2 "$@"
}

# One pair a step, online reference, all parameters.
whole() {
  local name=$1
  shift
  step "$name" --shape "$SHAPE" --reference online --recompute all_but_attention "$@"
}

table_layouts() {
  whole "tp$GPUS" --context "$LONG" --tensor "$GPUS"
  whole "cp$GPUS-a2a" --context "$LONG" --context-parallel "$GPUS" --context-comm a2a
  whole "cp$GPUS-all_gather" --context "$LONG" --context-parallel "$GPUS" --context-comm all_gather
  if [ "$HALF" -gt 1 ]; then
    whole "tp2-cp$HALF" --context "$LONG" --tensor 2 --context-parallel "$HALF" --context-comm a2a
    whole "pp2-cp$HALF" --context "$LONG" --pipeline 2 --pairs 4 --context-parallel "$HALF" \
      --context-comm a2a
    whole "cp$GPUS-hierarchical" --context "$LONG" --context-parallel "$GPUS" \
      --context-comm a2a+all_gather --context-inner 2
  fi
}

table_sharing() {
  row sharing "$GPUS" tools.bench_step --shape "$SHAPE" --dtype "$DTYPE" --context "$LONG" \
    --layout shared unshared --reference online --warmup 1 --repeats 2 --no-breakdown \
    --recompute full --tensor "$GPUS"
}

table_length() {
  whole "length-$((2 * LONG))" --context $((2 * LONG)) --context-parallel "$GPUS" --context-comm a2a
  row "length-$((4 * LONG))" "$GPUS" tools.bench_step --shape "$SHAPE" --dtype "$DTYPE" \
    --layout shared --context $((4 * LONG)) --context-parallel "$GPUS" --context-comm a2a \
    --reference online --recompute full --grad-dtype "$GRADS" --warmup 0 --repeats 1 --no-breakdown
}

table_qwen() {
  step qwen --shape "$SECOND_SHAPE" --reference online --context "$LONG" --tensor "$GPUS" \
    --recompute all_but_attention
}

table_mixed() {
  # Eight pairs a step over data-parallel ranks of two GPUs each (or of one).
  local context=$((GPUS > 2 ? 2 : 1))
  step mixed --shape "$SHAPE" --layers 8 --reference none --recompute all_but_attention \
    --shortest $((LONG / 4)) --context "$LONG" --pairs $((8 * context / GPUS)) \
    --context-parallel "$context" --context-comm a2a --overlap-grad-reduce
}

table_parity() {
  # fp32 within 1e-5 of the oracle, and bf16 within 2e-2.
  if [ -f "$FOLDER/parity.log" ] && grep -q " passed" "$FOLDER/parity.log"; then
    echo "parity: done before"
    return
  fi
  timeout -k 10 "$LIMIT" "$PYTHON" -m pytest -m "" -q -p no:cacheprovider \
    "tests/parity/test_ranks.py::test_layouts_give_the_oracles_step[$GPUS]" \
    "tests/gpu/test_ranks.py::test_layouts_give_the_oracles_step[$GPUS]" \
    >"$FOLDER/parity.log" 2>&1 || failed=1
  tail -n 1 "$FOLDER/parity.log"
}

table_checkpoint() {
  row checkpoint "$GPUS" tools.bench_checkpoint --shape "$SHAPE" --dtype "$DTYPE" \
    --tensor "$GPUS" --folder "$FOLDER/checkpoints"
}

for table in $TABLES; do
  if ! declare -F "table_$table" >/dev/null; then
    echo "bench_scale.sh: $table is no table; there are layouts sharing length qwen mixed parity checkpoint" >&2
    exit 2
  fi
done
for table in $TABLES; do
  echo "== $table"
  "table_$table"
done
exit $failed
