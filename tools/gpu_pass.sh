#!/usr/bin/env bash
# Everything worth knowing about a GPU in MINUTES, the cheapest and most telling first:
#
#   tools/gpu_pass.sh OUT MINUTES [--target cuda|cuda:1|cpu]
#
# 1. what is here: nvidia-smi, versions, lntune doctor
# 2. the tests marked gpu
# 3. lntune bringup: smoke check, tuning, verification
# 4. benchmarks of the operators against eager, torch.compile and others
# 5. an LN-LSTM over 100 steps under CUDA graphs against the eager loop
# 6. compute-sanitizer on a small set of kernels
#
# Logs, tables and JSON lie in OUT whenever it ends, also when it is killed: each step writes as it
# goes, and OUT/index.txt has its start, end and exit code. The same command with the same OUT goes
# on: what OUT/tuning_logs has is not tuned again.
#
# It needs no network and installs nothing: LNTUNE_PACKAGES is a folder of unpacked packages (or
# PYTHONPATH already leads to them), PYTHON the interpreter (by default the checkout's .venv, else
# python3). Beside PyTorch and a C++ compiler it takes apache-tvm, apache-tvm-ffi, filelock,
# msgspec, numpy, platformdirs, rich, scipy, typer and what these need, pytest for the tests, and
# nvcc or the packages of lntune[cuda].
#
# --target cpu tries the script itself out, on tiny sizes, and is done in a minute or two. Exit code
# 0 when every step did what it should.
set -euo pipefail

usage() {
  echo "usage: tools/gpu_pass.sh OUT MINUTES [--target cuda|cuda:1|cpu]" >&2
  exit 2
}

target=cuda
[[ $# -eq 2 || $# -eq 4 ]] || usage
if [[ $# -eq 4 ]]; then
  [[ $3 == --target ]] || usage
  target=$4
fi
[[ $target =~ ^(cpu|cuda(:[0-9]+)?)$ && $2 =~ ^[0-9]+$ && $2 -gt 0 ]] || usage
mkdir -p "$1"
out=$(cd "$1" && pwd)
total=$(($2 * 60))
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-}
if [[ -z $python ]]; then # the one that make sets up, if there is one
  python=python3
  [[ -n ${LNTUNE_PACKAGES:-} || ! -x $root/.venv/bin/python ]] || python=$root/.venv/bin/python
fi
[[ ! -d ${LNTUNE_PACKAGES:-} ]] || LNTUNE_PACKAGES=$(cd "$LNTUNE_PACKAGES" && pwd)
export PYTHONPATH="${LNTUNE_PACKAGES:+$LNTUNE_PACKAGES:}$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
cd "$root"

# Caches (kernels, Triton's) lie below HOME; where nothing can be written there, below a folder that
# is made for this.
if [[ -z ${HOME:-} ]] || ! mkdir -p "$HOME/.cache" 2>/dev/null || [[ ! -w $HOME/.cache ]]; then
  HOME=$(mktemp -d)
  export HOME
fi

SECONDS=0
failures=0
child=
index=$out/index.txt

note() { # a line of the index
  printf '%s %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$*" | tee -a "$index"
}

# What a step started is a process group of its own (timeout's), and goes with the script.
stop() { # signal
  trap - INT TERM
  if [[ -n $child ]]; then
    kill -TERM "$child" 2>/dev/null || true
    wait "$child" || true
  fi
  note "stopped by SIG$1 after $SECONDS s"
  exit 1
}
trap 'stop INT' INT
trap 'stop TERM' TERM

left() { # seconds until the end, less what the steps to come are to have, in percent of the whole
  echo $((total - SECONDS - total * ${1:-0} / 100))
}

step() { # name, most seconds, command...; what it prints goes to OUT/<name>.txt
  local name=$1 most=$2 code=0 begun=$SECONDS
  shift 2
  ((most > 0)) || most=0
  if ((most < 5)); then
    note "$name skipped: the time is over"
    return
  fi
  note "$name start, at most $most s: $*"
  # SIGINT first: pytest and lntune write what they have. Whatever does not listen is killed.
  timeout -s INT -k 20 "$most" "$@" >"$out/$name.txt" 2>&1 &
  child=$!
  wait "$child" || code=$?
  child=
  note "$name end, exit code $code, $((SECONDS - begun)) s"
  ((code == 0)) || failures=$((failures + 1))
}

skip() { # name, reason
  note "$1 skipped: $2"
}

facts() {
  date -u
  uname -a
  nproc
  free -g || true
  git -C "$root" log -1 --format='commit %H %cI' || echo "no git here"
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi || true
    nvidia-smi -q -d CLOCK,PERFORMANCE,POWER,ECC,MEMORY || true
  fi
  command -v nvcc >/dev/null && nvcc --version
  command -v compute-sanitizer >/dev/null && compute-sanitizer --version
  "$python" -VV
  echo "PYTHONPATH=$PYTHONPATH"
  echo "HOME=$HOME"
  "$python" -c '
import importlib.metadata as m
names = (
    "torch", "triton", "apache-tvm", "apache-tvm-ffi", "liger-kernel",
    "pytest", "hypothesis", "numpy", "msgspec",
)
found = {n: [d.version for d in m.distributions(name=n)][:1] for n in names}
print(*(f"{n} {v[0] if v else None}" for n, v in found.items()), sep="\n")
import torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print("torch.cuda", torch.version.cuda, torch.cuda.is_available(), gpus)
' || true
}
export -f facts
export python root

small=()
bringup=(--compile)
if [[ $target == cpu ]]; then # to try it out: sizes and times of a few seconds
  small=(--hidden 16 --dtype float32 --rows 8 --no-compile --time 100ms)
  bringup=(--grid small --ops layer_norm --trials 2 --no-compile)
fi
logs=$out/tuning_logs

note "begin, $((total / 60)) minutes, target $target"
step facts 60 bash -c facts
# Without these nothing that follows could work.
if ! why=$("$python" -c 'import lntune.cli, torch, tvm_ffi' 2>&1); then
  remedy="set PYTHON to one that can, or LNTUNE_PACKAGES"
  note "stopped: $python cannot import what lntune needs: ${why##*$'\n'}; $remedy"
  exit 1
fi
step doctor 60 "$python" -m lntune doctor --json

if "$python" -c 'import pytest' 2>/dev/null; then
  # What PyTorch's users call first, then every kernel. The bringup's own test is left to the next
  # step.
  mapfile -t files < <(
    printf '%s\n' tests/test_on_gpu_torch.py tests/test_on_gpu_kernels.py
    grep -lE 'mark\.gpu|import .*\bhere\b' tests/test_*.py |
      grep -v -e test_on_gpu_torch -e test_on_gpu_kernels -e test_bringup
  )
  pytest=("$python" -m pytest -v -p no:cacheprovider)
  step gpu_tests "$(left 75)" "${pytest[@]}" -m "gpu and not sanitizer" \
    --junitxml "$out/gpu_tests.xml" "${files[@]}"
else
  skip gpu_tests "there is no pytest"
fi

# A bringup ends by itself within its budget; what limits it from outside is for one that does not.
budget=$(left 35)
if ((budget >= 10)); then
  step bringup $((budget + 30)) "$python" -m lntune bringup --target "$target" \
    --budget "${budget}s" --log-dir "$logs" --output "$out/bringup" "${bringup[@]}"
else
  skip bringup "the time is over"
fi

bench() { # operator, percent of the time for what comes later, options...
  local op=$1 later=$2
  shift 2
  step "bench_$op" "$(left "$later")" "$python" -m lntune bench "$op" --target "$target" \
    --log-dir "$logs" --output "$out/bench_$op.json" --time 500ms "$@" "${small[@]}"
}
norm=(--dtype bfloat16,float32 --rows 4096)
lstm=(--dtype float32,bfloat16 --rows 128)
bench layer_norm 28 --hidden 1024,4096,8192,16384,1000 "${norm[@]}"
bench layer_norm_backward 22 --hidden 1024,4096,8192,1000 "${norm[@]}"
bench lnlstm_step 19 --hidden 512,1024 "${lstm[@]}"
bench lnlstm_step_backward 16 --hidden 512,1024 "${lstm[@]}"

sequence=(--output "$out" --target "$target")
[[ $target != cpu ]] || sequence+=(--batch 2 --hidden 16 --sequence 4 --seconds 0.1 --rounds 3)
LNTUNE_LOG_DIR=$logs step sequence "$(left 5)" "$python" bench/gpu_sequence.py "${sequence[@]}"

if [[ $target == cpu ]]; then
  skip sanitizer "the target is the CPU"
elif ! "$python" -c '
import sys
from lntune.backends.cuda.locate import program
sys.exit(not program("compute-sanitizer"))'; then
  skip sanitizer "there is no compute-sanitizer"
elif [[ -n ${pytest[*]:-} ]]; then
  step sanitizer "$(left)" "${pytest[@]}" -m "gpu and sanitizer" \
    --junitxml "$out/sanitizer.xml" "${files[@]}"
else
  skip sanitizer "there is no pytest"
fi

note "done, $SECONDS of $total s, $failures steps failed"
((failures == 0))
