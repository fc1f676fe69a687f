#!/usr/bin/env bash
# Takes the figures of the README on this machine: bench/run.sh [OUT]. About 25 minutes, mostly torch.compile's compiling.
# LNTUNE names the command to run (lntune), PYTHON the interpreter that has it (python), with the packages of lntune[bench].
set -euo pipefail
cd "$(dirname "$0")/.."
lntune=${LNTUNE:-lntune}
python=${PYTHON:-python}
out=${1:-bench/results/$($lntune doctor --json | python3 -c 'import json, sys; print(next(f["detail"] for f in json.load(sys.stdin)["findings"] if f["topic"] == "log folder name"))')}
mkdir -p "$out"

bench() { # name, operator, options...
  local name=$1
  shift
  $lntune bench "$@" --output "$out/$name.json" | tee "$out/$name.txt"
}

bench call_cost layer_norm --call-cost
# 512 MiB in, 512 MiB out.
bench beyond_cache_1024_float32 layer_norm --given-output --hidden 1024 --dtype float32 --rows 131072 --time 10s
bench beyond_cache_4096_float32 layer_norm --given-output --hidden 4096 --dtype float32 --rows 32768 --time 10s
bench beyond_cache_16384_float32 layer_norm --given-output --hidden 16384 --dtype float32 --rows 8192 --time 10s
bench beyond_cache_1024_bfloat16 layer_norm --given-output --hidden 1024 --dtype bfloat16 --rows 262144 --time 10s
bench beyond_cache_4096_bfloat16 layer_norm --given-output --hidden 4096 --dtype bfloat16 --rows 65536 --time 10s
bench layer_norm layer_norm --hidden 256,768,1000,1024,4096,16384 --dtype float32,bfloat16 --rows 1,32,512,4096 --time 1500ms
bench row_strided layer_norm --strided --hidden 768,1024,4096 --dtype float32,bfloat16 --rows 1,32,512,4096 --time 1500ms
bench layer_norm_backward layer_norm_backward --hidden 256,768,1000,1024,4096,16384 --dtype float32,bfloat16 --rows 32,512,4096 --time 1500ms
bench layer_norm_training layer_norm --training --hidden 256,768,1024,4096 --dtype float32,bfloat16 --rows 1,8,32,128,512,4096 --time 1500ms
bench lnlstm_step lnlstm_step --hidden 128,256,400,512,1024 --dtype float32,bfloat16 --rows 1,32,128 --time 1500ms
bench lnlstm_step_backward lnlstm_step_backward --hidden 128,256,400,512,1024 --dtype float32,bfloat16 --rows 1,32,128 --time 1500ms
$python bench/lnlstm_training.py --output "$out"
$python bench/transformer.py --output "$out"
$python bench/digits.py --output "$out"
