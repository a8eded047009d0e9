#!/usr/bin/env bash
# What only a GPU can tell, in one command of at most nine minutes; stopped at any moment it keeps what it has.
#
#     benchmarks/gpu.sh --cifar FOLDER --out DIR        # one GPU; FOLDER holds train.tar.xz and test.tar.xz
#     benchmarks/gpu.sh --toy --out DIR                 # the same parts on a CPU, tiny, without the nine minutes' limit
#
# Parts, each in a process of its own with a time limit; one that fails is written down, and the next begins:
#
#     machine       names, driver, versions; whether NCCL has anything to do (it has not, with one card)
#     unpack        CIFAR-10 onto the local disk
#     pretrain …    images/s of whole training steps at 32 px: float32 and bfloat16, compiled or not
#     input         JPEGs of 500 x 375 to two views of 224 px: decoded by simplejpeg on the cores, by nvJPEG on the GPU
#     step …        a step at 224 px beside its bare passes, and the GPU's use (benchmarks/step.py)
#     arms          benchmarks/campaigns/cifar10-gpu.toml, several runs side by side, until the time is up
#
# In DIR: parts.jsonl (a line per part, with the GPU's use by nvidia-smi), results.jsonl (a line per finished run),
# table.md, log.txt. `--results FILE` takes up the results.jsonl of an earlier turn, whose runs are not repeated.
# OUT in the environment is the default of --out.
#
# On a machine without internet, and with nothing but torch (2.11 or newer), torchvision, timm, accelerate, onnx and
# onnxruntime, the rest is brought as wheels in .whl (or WHEELS), which are installed into a folder of their own:
#
#     pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 -d .whl \
#         pydantic pydantic-core==VERSION annotated-types typing-extensions typing-inspection \
#         simplejpeg yacs termcolor portalocker
#     pip wheel --no-deps -w .whl fvcore iopath         # these two have no wheels of their own
#
# VERSION is the one that pydantic asks for: unzip -p .whl/pydantic-[0-9]*.whl '*/METADATA' | grep pydantic-core
# PYTHON is the interpreter, python3 by default; it needs no edgecl: the checkout's is used.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
wheels=${WHEELS:-$checkout/.whl}
if compgen -G "$wheels/*.whl" >/dev/null; then
    site=$(mktemp -d)
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
    PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH}
exec "$python" "$checkout/benchmarks/gpu.py" --spent "$SECONDS" "$@"
