#!/usr/bin/env bash
# Runs lntune on 64-bit Arm without an Arm machine: tools/arm.sh FOLDER ARGUMENTS... is
# `python ARGUMENTS...` of an emulated one.
#   tools/arm.sh /tmp/arm -m pytest -n 0 tests/test_kernels.py -k "one_row or lanes"
# Needs qemu-user-static, debootstrap and g++-aarch64-linux-gnu (Debian's packages of these names).
# FOLDER is filled once, with Debian's Python for Arm and the wheels for it: 1.5 GB. Twenty times as
# slow as a machine; processes that Python starts itself do not run.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:?FOLDER}")
shift
packages=$folder/packages
if [ ! -e "$folder/whole" ]; then
  mkdir -p "$folder/system" "$packages"
  PATH=$PATH:/usr/sbin debootstrap --foreign --arch=arm64 --variant=minbase \
    --include=python3,libgomp1 bookworm "$folder/base" https://deb.debian.org/debian
  for package in "$folder"/base/var/cache/apt/archives/*.deb; do
    dpkg -x "$package" "$folder/system"
  done
  wheels=(python3 -m pip download --dest "$folder/wheels" --only-binary=:all: --python-version 3.11)
  for tag in 2_28 2_27 2_24 2_17; do wheels+=(--platform "manylinux_${tag}_aarch64"); done
  "${wheels[@]}" --platform manylinux2014_aarch64 \
    apache-tvm==0.27.* "apache-tvm-ffi>=0.1.14,<0.1.15" \
    filelock msgspec numpy platformdirs rich scipy typer \
    pytest pytest-xdist hypothesis sympy networkx jinja2 fsspec
  "${wheels[@]}" --no-deps torch==2.10.0 # later ones ask for CUDA
  for wheel in "$folder"/wheels/*.whl; do unzip -qo "$wheel" -d "$packages"; done
  touch "$folder/whole"
fi
exec qemu-aarch64-static -L "$folder/system" \
  -E LD_LIBRARY_PATH="$folder/system/usr/lib/aarch64-linux-gnu" \
  -E PYTHONHOME="$folder/system/usr" -E PYTHONPATH="$packages:$PWD" -E PYTHONDONTWRITEBYTECODE=1 \
  -E OMP_WAIT_POLICY=PASSIVE -E CXX=aarch64-linux-gnu-g++ -E LNTUNE_CACHE_DIR="$folder/cache" \
  "$folder/system/usr/bin/python3.11" "$@"
