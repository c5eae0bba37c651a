#!/usr/bin/env bash
# Makes a TPU VM ready: a virtual environment with JAX (or TensorFlow) for TPU, this library, and a look at the chips.
# README.md here says when to run it. Safe to run again.
#
#   tpu/setup_vm.sh [--tensorflow] [--python PYTHON] [--venv FOLDER] [--data] [--pjrt] [--check] [--no-tpu]
#
#   --tensorflow     TensorFlow for TPU instead of JAX
#   --python PYTHON  interpreter to make the environment with (python3.11 by default)
#   --venv FOLDER    the environment (.venv-tpu by default)
#   --data           also what real image sets need
#   --pjrt           with --tensorflow: also write FOLDER/pjrt.sh, to be sourced before training on v5p and v6e
#   --check          install nothing: only look at the chips
#   --no-tpu         install the backend for CPU in its place, and look at no chips: to try the script elsewhere
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=python3.11
venv=.venv-tpu
data=
pjrt=
check=
tpu=yes
backend=jax
while [ $# -gt 0 ]; do
  case $1 in
    --tensorflow) backend=tensorflow ;;
    --python) python=${2:?--python needs an interpreter}; shift ;;
    --venv) venv=${2:?--venv needs a folder}; shift ;;
    --data) data=,data ;;
    --pjrt) pjrt=yes ;;
    --check) check=yes ;;
    --no-tpu) tpu= ;;
    -h | --help) sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "setup_vm.sh: unknown option $1 (--help lists them)" >&2; exit 2 ;;
  esac
  shift
done

if ! command -v "$python" > /dev/null; then
  echo "setup_vm.sh: there is no $python; install it (sudo apt-get install python3.11-venv) or give --python" >&2
  exit 1
fi
if [ "$backend" = tensorflow ] && ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))'; then
  echo "setup_vm.sh: TensorFlow for TPU has wheels for Python 3.11 and 3.12; $python is $("$python" -V)" >&2
  exit 1
fi

if [ -n "$tpu" ] && ! compgen -G '/dev/accel*' > /dev/null && ! compgen -G '/dev/vfio/[0-9]*' > /dev/null; then
  echo "setup_vm.sh: no TPU in this machine (/dev/accel*, /dev/vfio/*): run it on a TPU VM, or with --no-tpu" >&2
  exit 1
fi
if [ -n "$check" ]; then
  [ -z "$tpu" ] || echo "a TPU is in this machine"
  exit 0
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
case $backend$tpu in
  tensorflowyes) "$venv/bin/pip" install -q -r tpu/requirements-vm.txt -e ".[tpu$data]" ;;
  tensorflow) "$venv/bin/pip" install -q -e ".[cpu$data]" ;;
  # Image sets are read by tensorflow-datasets, with TensorFlow on the CPU.
  jaxyes) "$venv/bin/pip" install -q 'jax[tpu]' -e ".[jax${data:+,cpu}$data]" ;;
  jax) "$venv/bin/pip" install -q -e ".[jax${data:+,cpu}$data]" ;;
esac
"$venv/bin/pip" check

if [ -n "$pjrt" ] && [ "$backend" = tensorflow ]; then
  library=$("$venv/bin/python" -c 'import libtpu; print(libtpu.get_library_path())')
  cat > "$venv/pjrt.sh" <<END
export PJRT_DEVICE=TPU NEXT_PLUGGABLE_DEVICE_USE_C_API=true TF_PLUGGABLE_DEVICE_LIBRARY_PATH=$library
END
  echo "before training: source $venv/pjrt.sh"
fi
[ -n "$tpu" ] && where=local || where=none
echo "ready: $venv/bin/python tpu/train.py --backend $backend --tpu $where --out FOLDER_OR_BUCKET"
