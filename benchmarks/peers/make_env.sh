#!/bin/sh
# The environment of the peers: SpikingJelly beside the torch of the benchmarks, apart from SPIR's own environment.
#
#     benchmarks/peers/make_env.sh [FOLDER [PIP ARGUMENTS]]
#
# FOLDER is benchmarks/peers/.venv by default. torch stands on the same line as what depends on it, so that pip takes one
# version for all; on its own index, `--extra-index-url https://download.pytorch.org/whl/cpu` finds the CPU build.
# `make_env.sh .venv-peers` and `python -m benchmarks.parallel_speed --peer .venv-peers` go together.
set -eu

folder=${1:-$(dirname "$0")/.venv}
[ $# -gt 0 ] && shift
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install "$@" spikingjelly==2.0.0 torch==2.13.0 safetensors==0.8.0
"$folder/bin/python" -c 'from spikingjelly.activation_based import ann2snn; import torch; print("torch", torch.__version__)'
