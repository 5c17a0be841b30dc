#!/usr/bin/env bash
# Everything that is to be measured on an H200 or H100, by one call. Needs Python 3.12 with the
# dependencies, jax 0.11.2 with CUDA, and no network.
#
#     benchmarks/h200.sh                         all stages but tune
#     benchmarks/h200.sh check matmul            some of them, in this order
#     benchmarks/h200.sh --simulate              without a GPU: the same stages at tiny sizes
#
# Stages: check (results of every kernel), tune, matmul, weight_only, attention, elementwise, model,
# throughput. Each has SECONDS_PER_STAGE (540); one that fails does not stop the others, and the exit
# status is that of all. Results go to $OUT, or else benchmarks/results/.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
seconds=${SECONDS_PER_STAGE:-540}
out=${OUT:-benchmarks/results}
name=h200
simulate=
if [ "${1:-}" = --simulate ]; then
    simulate=1
    name=simulated
    export JAX_PLATFORMS=cpu
    shift
fi
mkdir -p "$out"
out=$(realpath "$out")
[ $# -gt 0 ] && stages=("$@") ||
    stages=(check matmul weight_only attention elementwise model throughput)

run() { # python, until the stage's time is over
    local left=$((deadline - SECONDS))
    timeout $((left > 0 ? left : 1)) "$python" "$@"
}
# Compiling and checking a case takes time of its own: none begins in a stage's last quarter.
bench() { run -m pallas_kernels.bench --seconds $((seconds * 3 / 4)) "$@"; }
llama_jax() { run -m llama_jax.cli "$@"; }

check() {
    if [ $simulate ]; then bench --simulate; else
        bench --check --rows 1 65 \
            --only '^8B TP1 (q|down|gate|qkv)_proj|^(8B|1B) TP1 heads.*( T=4096 | after | B=8 S=8192 )'
    fi
}
tune() {
    if [ $simulate ]; then run -m pallas_kernels.tune --simulate --only 'tiny one'; else
        run -m pallas_kernels.tune --seconds $((seconds * 3 / 4)) \
            --only '^8B TP1 .* row|^8B TP1 heads' --rows 16 2048 8192
        cp -r pallas_kernels/tuned "$out/" 2>/dev/null || true
    fi
}
timed() { # the cases of bench whose names match, with so many rows
    if [ $simulate ]; then bench --simulate --only "tiny.*$1"; else
        bench --only "^8B TP1.*$2" --rows "${@:3}" --json "$out/${name}_$stage.json"
    fi
}
matmul() { timed 'm=1 row$' ' row( swiglu| after swiglu)?$' 1024 2048 8192; }
weight_only() { timed 'one.*weight-only$' ' row weight-only$' 1 16 64; }
attention() { timed 'tokens=1 .*attention$' ' attention$' 1; }
elementwise() {
    run benchmarks/elementwise.py ${simulate:+--tiny} --json "$out/${name}_elementwise.json"
}
model() { # 8B with random weights of the true shapes: decode at a context of 1k, prefill of 8k
    local json="$out/${name}_model"
    if [ $simulate ]; then
        llama_jax bench --batch 1 --prompt-len 16 --new-tokens 4 --json >"$json.json"
    else
        llama_jax bench --preset llama-3.1-8b --activations dynamic --batch 1 \
            --prompt-len 1024,8192 --new-tokens 128 --json >"$json.json" &&
            llama_jax bench --preset llama-3.1-8b --activations dynamic --kv-dtype fp8 --batch 1 \
                --prompt-len 1024,8192 --new-tokens 128 --json >"${json}_fp8_kv.json"
    fi
}
throughput() {
    local json="$out/${name}_throughput.json"
    # The cache takes what this leaves it; XLA's default is three quarters.
    XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 run benchmarks/offline_throughput.py \
        ${simulate:+--tiny --seconds 8} --json "$json"
}

failed=()
for stage in "${stages[@]}"; do
    case $stage in
    check | tune | matmul | weight_only | attention | elementwise | model | throughput) ;;
    *)
        echo "no stage '$stage': see the head of $0" >&2
        failed+=("$stage")
        continue
        ;;
    esac
    echo "== $stage"
    begin=$SECONDS
    deadline=$((begin + seconds))
    "$stage" 2>&1 | tee "$out/${name}_$stage.txt" || failed+=("$stage")
    echo "== $stage: $((SECONDS - begin)) s"
done
[ ${#failed[@]} -eq 0 ] || { echo "FAILED: ${failed[*]}" >&2 && exit 1; }
