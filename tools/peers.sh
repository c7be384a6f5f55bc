#!/usr/bin/env bash
# Makes .venv-peers: the environment in which parity fixtures are written and benchmarks against peers run.
#
# Peers such as open_clip ask for torchvision, which must never come near the project's own environment (a
# mismatched one breaks transformers' vision classes). Here they are installed without their dependencies, beside
# a stub that offers just the names they import.
set -euo pipefail
cd "$(dirname "$0")/.."

python3 -m venv .venv-peers
peer=.venv-peers/bin/python
# This package with what it needs, in the versions its own tests run with: benchmarks run both sides here.
"$peer" -m pip install --quiet --constraint constraints.txt --editable . regex ftfy tqdm einops einops-exts
"$peer" -m pip install --quiet --no-deps open_clip_torch==3.3.0 timm==1.0.31 open_flamingo==2.0.1 \
  salesforce-lavis==1.0.2

site="$("$peer" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
"$peer" tools/torchvision_stub.py "$site"
"$peer" -c 'import open_flamingo.src.flamingo; print("open_flamingo is ready in .venv-peers")'
"$peer" -c 'import open_clip; print("open_clip", open_clip.__version__, "is ready in .venv-peers")'
