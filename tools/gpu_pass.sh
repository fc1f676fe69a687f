#!/usr/bin/env bash
# A first half hour with a GPU, in three parts that each end by themselves (after 9 minutes):
#
#   tools/gpu_pass.sh OUT 1|2|3 [--minutes 9] [--target cuda] [--work DIR] [--after ARCHIVE]
#
# 1. facts, a kernel against float64, seven others, bandwidths, what decides about kernels that stay
#    on the GPU, speed by default knobs and by others, ncu, an LN-LSTM. Needs neither TVM nor a
#    compiler where its kernels were built beforehand, on any machine:
#      LNTUNE_CACHE_DIR=build/gpu_kernels lntune build --gpu-pass --target nvidia/nvidia-h200
#    Where the first kernel is wrong, compute-sanitizer has the rest of the time.
# 2. the tests marked gpu, and lntune bringup: smoke check, tuning, verification
# 3. the bringup goes on, torch.compile, a backward under racecheck
#
# A part leaves one archive in OUT, OUT/gpu_pass-partN.tar.gz, whenever it ends, also when it is
# killed: it is written again after each step. What came so far lies in DIR (build/gpu_pass), where
# the same command, and the next part, go on; on another machine, from the archive. Exit code 0 when
# all of the part is done and went well.
#
# It needs no network and installs nothing: LNTUNE_PACKAGES is a folder of unpacked packages (or
# PYTHONPATH already leads to them), PYTHON the interpreter (by default the checkout's .venv, else
# python3), LNTUNE_CACHE_DIR the kernels (build/gpu_kernels). Beside PyTorch part 1 takes
# apache-tvm-ffi, msgspec and platformdirs; the others take all that lntune and its tests do, and
# nvcc or the packages of lntune[cuda].
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-}
if [[ -z $python ]]; then # the one that make sets up, if there is one
  python=python3
  [[ -n ${LNTUNE_PACKAGES:-} || ! -x $root/.venv/bin/python ]] || python=$root/.venv/bin/python
fi
[[ ! -d ${LNTUNE_PACKAGES:-} ]] || LNTUNE_PACKAGES=$(cd "$LNTUNE_PACKAGES" && pwd)
export PYTHONPATH="${LNTUNE_PACKAGES:+$LNTUNE_PACKAGES:}$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
export LNTUNE_CACHE_DIR=${LNTUNE_CACHE_DIR:-$root/build/gpu_kernels}

# Other caches (Triton's) lie below HOME; where nothing can be written there, below a folder that is
# made for this.
if [[ -z ${HOME:-} ]] || ! mkdir -p "$HOME/.cache" 2>/dev/null || [[ ! -w $HOME/.cache ]]; then
  HOME=$(mktemp -d)
  export HOME
fi
exec "$python" -m lntune.commands.gpu_pass "$@"
