"""Peak memory and time of opening a large checkpoint: a Llama of about 2 GB, in one safetensors file and in shards.

python benchmarks/load_memory.py [--gib 2]

Two figures over the size of the weights: what the process holds of its own while opening (anonymous memory), and the
peak of all resident memory once every weight has been read, file pages that the system may take back included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from isthmus.data.tokenizer import Tokenizer

OPEN = """
import json, sys, time
import torch, isthmus
from isthmus.opening import load

def held(*names):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return [1024 * int(lines[name].split()[0]) for name in names]

before, = held("VmRSS")
start = time.perf_counter()
model = load(sys.argv[1])
seconds = time.perf_counter() - start
own, peak = held("RssAnon", "VmHWM")
total = sum(float(p.double().sum()) for p in model.net.parameters())  # every page is read
after, = held("VmHWM")
size = sum(p.numel() * p.element_size() for p in model.net.parameters())
print(json.dumps({"before": before, "own": own, "peak": peak, "read": after, "size": size, "seconds": seconds}))
"""
WIDTH, LAYERS_PER_GIB = 2048, 3.6


def written(folder: Path, gib: float, form: str) -> Path:
    """A Llama as transformers keeps it; the values do not matter."""
    layers = max(1, round(gib * LAYERS_PER_GIB))
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=16,
        max_position_embeddings=512,
    )
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in LlamaForCausalLM(config).state_dict().items()}
    state = {name: torch.full(shape, 0.01) for name, shape in shapes.items()}
    config.save_pretrained(folder)
    Tokenizer.train(["a red cube and a blue ring"] * 3, 300).save(folder)
    if form == "one file":
        save_file(state, folder / "model.safetensors")
    else:
        names = list(state)
        files = {f"model-{n + 1:05d}-of-00004.safetensors": names[n::4] for n in range(4)}
        for file, part in files.items():
            save_file({name: state[name] for name in part}, folder / file)
        placed = {name: file for file, part in files.items() for name in part}
        index = {"metadata": {}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=2.0)
    gib = parser.parse_args().gib
    print(f"{'form':10}  {'GB':>5}  {'own':>5}  {'peak':>5}  {'all read':>8}  seconds")
    for form in ("one file", "shards"):
        with tempfile.TemporaryDirectory() as folder:
            path = written(Path(folder), gib, form)
            done = subprocess.run([sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{form:10}  {done.stderr.strip().splitlines()[-1]}")
                continue
            got = json.loads(done.stdout)
            share = {key: got[key] / got["size"] for key in ("own", "peak", "read")}
            base = got["before"] / got["size"]
            print(
                f"{form:10}  {got['size'] / 1e9:5.2f}  {share['own']:5.2f}  {share['peak'] - base:5.2f}  "
                f"{share['read'] - base:8.2f}  {got['seconds']:.1f}"
            )


if __name__ == "__main__":
    main()
