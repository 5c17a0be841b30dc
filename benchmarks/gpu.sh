#!/usr/bin/env bash
# What is to be measured on an H100 or H200, made for 15 minutes of one: two calls of under 5 minutes,
# the most telling stages first. Needs Python 3.12 with the dependencies (msgspec is seldom there), jax
# 0.11.2 with CUDA, and no network.
#
#     benchmarks/gpu.sh first                   model, then kernels: 290 s at most
#     benchmarks/gpu.sh second                  throughput: 290 s at most
#     benchmarks/gpu.sh launches                200 s at most, in the time that is left
#     benchmarks/gpu.sh tune elementwise        some stages, in this order
#     benchmarks/gpu.sh --simulate first        without a GPU: the same stages at tiny sizes
#
# model: 8B with random weights, steps of decode and prefill, what the device does in a step, and the
# throughput of scoring. kernels: every kernel's result beside a reference, then its time.
# throughput: of the engine, 1000 tokens in and out, then 128. launches: steps of decode with ten launches
# a layer and with fewer; the table of tuned configurations that it leaves in $OUT takes the fastest.
# tune: configurations of the kernels, 60 s. elementwise: XLA's passes between the kernels, 30 s.
#
# A stage that fails, or whose time is over, does not stop the others; the exit status is that of all.
# SECONDS_PER_STAGE replaces the stages' own limits. Results go to $OUT, or else benchmarks/results/, in
# files that begin with the card's name.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
first=(model kernels)
second=(throughput)
declare -A limits=([model]=180 [kernels]=110 [throughput]=290 [launches]=200 [tune]=60 [elementwise]=30)

simulate=
if [ "${1:-}" = --simulate ]; then
    simulate=1
    name=simulated
    export JAX_PLATFORMS=cpu NPROC=${NPROC:-8} # the simulator blocks a thread per warpgroup
    shift
else
    card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
    name=$(grep -oE 'H100|H200' <<<"$card" | head -n 1)
    name=${name:-gpu}
    name=${name,,}
fi
case ${1:-} in
first) stages=("${first[@]}") ;;
second) stages=("${second[@]}") ;;
"")
    sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0" >&2
    exit 2
    ;;
*) stages=("$@") ;;
esac
mkdir -p "$out"
out=$(realpath "$out")

left() { echo $((deadline > SECONDS ? deadline - SECONDS : 1)); }
run() { # python, until the stage's time is over; killed if it waits for the device or XLA then
    timeout -k 5 "$(left)" "$python" "$@"
}

kernels() {
    if [ $simulate ]; then run -m pallas_kernels.dev.bench --simulate; else
        local cases='^8B TP1 (qkv|gate|down)_proj .* m=(65|2048) row( swiglu| after swiglu)?$'
        cases+='|^8B TP1 (qkv|down)_proj .* m=(1|64) row weight-only$|^8B TP1 .* m=(1|64) row weight-only in terms$|^8B TP1 (hidden|intermediate) .* m=(1|64) '
        cases+='|^8B TP1 (qkv|down)_proj .* m=1 block weight-only$'
        cases+='|^8B TP1 heads.* (T=8192 bf16|T=8192 fp8|T=2048 after 30720 bf16) prefill'
        cases+='|^8B TP1 heads.* fp8 rope and cache'
        cases+='|^8B TP1 heads.* B=1 S=1088 fp8 rope, cache and attention'
        cases+='|^8B TP1 heads.* (B=1 S=8192|B=32 S=1024|B=32 S=8192) tokens=1 '
        # XLA's path beside one matmul of each kind, and cuDNN beside one prompt.
        run -m pallas_kernels.dev.bench --rows 1 64 65 2048 --only "$cases" \
            --baselines '(gate|down)_proj .* m=2048 row$|T=8192 bf16' \
            --seconds $(($(left) - 10)) --json "$out/${name}_kernels.json"
    fi
}
bench() { # batch, prompt; always the same output, as the length decides which programs are compiled
    local model=(--preset llama-3.1-8b --kv-dtype fp8 --new-tokens 129)
    [ $simulate ] && model=(--new-tokens 4)
    run -m llama_jax.cli bench "${model[@]}" --batch "$1" --prompt-len "$2" --json
}
score() { # seconds, file; with a cache that fits beside other processes
    local sizes=(--lengths 2048 --max-batch-size 64 --seconds "$1")
    [ $simulate ] && sizes=(--tiny --lengths 128 --seconds 1)
    run benchmarks/offline_throughput.py "${sizes[@]}" --json "$2"
}
model() { # what tells most comes first
    local failed=0 whole=$deadline part parts=("1 1024" "64 1024" score "1 8192")
    [ $simulate ] && parts=("1 16" score "2 16")
    # Compiled side by side into one cache, most of the time, and then measured one after another.
    deadline=$((SECONDS + ($(left) * 6 / 10)))
    export XLA_PYTHON_CLIENT_PREALLOCATE=false
    for part in "${parts[@]}"; do
        # shellcheck disable=SC2086
        if [ "$part" = score ]; then score 1 /dev/null; else bench $part; fi >/dev/null 2>&1 &
    done
    wait
    deadline=$whole
    unset XLA_PYTHON_CLIENT_PREALLOCATE
    for part in "${parts[@]}"; do
        # shellcheck disable=SC2086
        if [ "$part" = score ]; then score 12 "$out/${name}_scoring.json"; else
            bench $part >"$out/${name}_model_${part/ /x}.json"
        fi || failed=1
    done
    find "$out" -name "${name}_model_*.json" -empty -delete
    return $failed
}
with_tables() { # a command, and then what it has tuned by then
    local failed=0
    "$@" || failed=1
    cp -r pallas_kernels/tuned "$out/" 2>/dev/null
    return $failed
}
tune() {
    if [ $simulate ]; then run -m pallas_kernels.dev.tune --simulate --only 'tiny one'; else
        with_tables run -m pallas_kernels.dev.tune --seconds $(($(left) - 15)) --rows 1 64 2048 \
            --only '^8B TP1 .* row weight-only$|^8B TP1 (gate|down)_proj .* m=2048 row|^8B TP1 heads'
    fi
}
launches() {
    with_tables run benchmarks/launches.py ${simulate:+--tiny} --json "$out/${name}_launches.json"
}
throughput() {
    # The cache takes what this leaves it; XLA's default is three quarters.
    XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 run benchmarks/offline_throughput.py \
        $([ $simulate ] && echo --tiny --seconds 8 || echo --seconds 120 --lengths 1000/1000 128/128) \
        --json "$out/${name}_throughput.json"
}
elementwise() {
    run benchmarks/elementwise.py ${simulate:+--tiny} --json "$out/${name}_elementwise.json"
}

failed=()
for stage in "${stages[@]}"; do
    if [ -z "${limits[$stage]:-}" ]; then
        echo "no stage '$stage': see the head of $0" >&2
        failed+=("$stage")
        continue
    fi
    echo "== $stage"
    begin=$SECONDS
    deadline=$((begin + ${SECONDS_PER_STAGE:-${limits[$stage]}}))
    "$stage" 2>&1 | tee "$out/${name}_$stage.txt" || failed+=("$stage")
    echo "== $stage: $((SECONDS - begin)) s"
done
[ ${#failed[@]} -eq 0 ] || { echo "FAILED: ${failed[*]}" >&2 && exit 1; }
