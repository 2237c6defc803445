#!/usr/bin/env bash
# What only a Hopper GPU can show, stage by stage, each with an end; what is printed goes to $OUT (default: gpu-results) as well.
#
#     [ROWS="1 8"] bash .ci/on_a_gpu.sh chain merges | tune | steps | prefill | throughput | drafts | sanitize
#
# Rights first (chain, merges, sanitize), then times. Needs jax with CUDA, and for sanitize compute-sanitizer of CUDA 13 or newer.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu-results}
mkdir -p "$out"
python=${PYTHON:-python3}
big="--shape llama-3.1-8b --page-size 64 --kv-tokens 20000 --max-sequences 64 --json"
failed=0

run() {  # name, seconds, command...
  local name=$1 limit=$2
  shift 2
  printf '\n== %s (%s s so far)\n' "$name" "$SECONDS"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local code=$?
  grep -v "^W\|^I\|^$" "$out/$name.log" | cut -c1-400 | tail -12
  [ $code -eq 0 ] || { echo "!!! $name ended with $code"; failed=1; }
}

for stage in "$@"; do
  case $stage in
    chain) run chain 580 $python .ci/check_on_gpu.py --op token_chain --out "$out/chain.jsonl" ;;
    merges) run merges 250 $python -m pallas_kernels.paged_attention.draws --only decode --draws 40 ;;
    tune)
      for op in token_chain residual_norm quantized_matmul paged_attention; do
        run "tune-$op" 240 $python -m pallas_kernels.tuning --op $op --implementation gpu --out "$out/tuned-$op.json"
      done
      for dtype in "" _int8 _float8_e4m3fn; do  # long rows, by themselves: a key does not say how many there are, or how long
        run "tune-long$dtype" 240 $python -m pallas_kernels.tuning --op paged_attention --implementation gpu --case "decode_64x4096$dtype" \
          --out "$out/tuned-long$dtype.json"
      done
      ;;
    steps)
      for kind in "" "--quantize int8"; do
        for sequences in 1 64; do  # programs for one sequence are launched sooner
          run "steps-$sequences${kind:+-int8}" 200 $python -m jaxinfer bench latency ${big/64 --json/$sequences --json} --decode 1x600 --decode 16x600 \
            --repeat 3 --kernels 14 $kind
        done
      done
      ;;
    prefill)
      for scheme in none int8 w8a8; do
        flags=$([ $scheme = none ] || echo "--quantize $scheme")
        run "prefill-$scheme" 200 $python -m jaxinfer bench latency $big --decode 1x600 --prefill 1x2048 --prefill 1x8000 --repeat 3 --kernels 14 \
          --max-step-tokens 8192 $flags
      done
      ;;
    throughput) run throughput 300 $python -m jaxinfer bench throughput --shape llama-3.1-8b --workload batch-512 --page-size 64 --json ;;
    drafts)
      for rows in ${ROWS:-1 8 16 64 256}; do  # apart: engines for many sequences have many programs, which take minutes to compile
        case $rows in 1) seconds=150 ;; 256) seconds=150 ;; *) seconds=130 ;; esac  # for intervals of 1 to 2 %, as hosts were
        run "drafts-$rows" 590 $python -m jaxinfer bench speculation --kind story --batch "$rows" --way lookup,draft --max-step-tokens 256 \
          --repeat 8 --seconds "$seconds" --json --out "$out/speculation-$rows.jsonl"
      done
      ;;
    sanitize)
      for case in token_chain:layer token_chain:few token_chain:many quantized_matmul:one_narrow; do
        run "sanitize-${case/:/-}" 250 compute-sanitizer --tool memcheck --show-backtrace device --error-exitcode 3 --print-limit 20 \
          $python .ci/check_on_gpu.py --op "${case%:*}" --repeat 1 --case "${case#*:}"
      done
      ;;
    *) echo "no stage $stage"; exit 2 ;;
  esac
done
exit $failed
