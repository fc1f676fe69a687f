#!/usr/bin/env bash
# Takes the figures of the README on this machine: bench/run.sh [OUT]. About 35 minutes, mostly
# torch.compile's compiling. LNTUNE names the command to run (lntune), PYTHON the interpreter that
# has it (python), with the packages of lntune[bench].
set -euo pipefail
cd "$(dirname "$0")/.."
lntune=${LNTUNE:-lntune}
python=${PYTHON:-python}

log_folder() { # this device's, as `lntune doctor` says it
  $lntune doctor --json | python3 -c '
import json, sys
findings = json.load(sys.stdin)["findings"]
print(next(f["detail"] for f in findings if f["topic"] == "log folder name"))'
}
out=${1:-bench/results/$(log_folder)}
mkdir -p "$out"

bench() { # name, operator, options...
  local name=$1
  shift
  $lntune bench "$@" --output "$out/$name.json" | tee "$out/$name.txt"
}

bench call_cost layer_norm --call-cost

beyond_cache() { # hidden, dtype, rows: 512 MiB in, 512 MiB out
  bench "beyond_cache_$1_$2" layer_norm --given-output --hidden "$1" --dtype "$2" --rows "$3" \
    --time 10s
}
beyond_cache 1024 float32 131072
beyond_cache 4096 float32 32768
beyond_cache 16384 float32 8192
beyond_cache 1024 bfloat16 262144
beyond_cache 4096 bfloat16 65536

both=(--dtype float32,bfloat16 --time 1500ms)
sizes=256,768,1000,1024,4096,16384
steps=128,256,400,512,1024
bench layer_norm layer_norm --hidden $sizes --rows 1,32,512,4096 "${both[@]}"
bench row_strided layer_norm --strided --hidden 768,1024,4096 --rows 1,32,512,4096 "${both[@]}"
bench layer_norm_backward layer_norm_backward --hidden $sizes --rows 32,512,4096 "${both[@]}"
bench layer_norm_training layer_norm --training --hidden 256,768,1024,4096 \
  --rows 1,8,32,128,512,4096 "${both[@]}"
bench lnlstm_step lnlstm_step --hidden $steps --rows 1,32,128 "${both[@]}"
bench lnlstm_step_backward lnlstm_step_backward --hidden $steps --rows 1,32,128 "${both[@]}"
$python bench/lnlstm_training.py --output "$out"
$python bench/lnlstm_training.py --sequence 10,50,200 --batch 1,32,128 --hidden 256 --layers 1 \
  --chunks "" --seconds 4 --output "$out"
$python bench/transformer.py --output "$out"
$python bench/digits.py --output "$out"
