"""Training steps of a small language model on a CPU, with freed memory kept in the process and without.

python benchmarks/allocator.py
"""

import statistics
import subprocess
import sys

STEP = """
import sys, time, torch
from isthmus.allocator import keep_freed_memory
from isthmus.batch import Tokens
from isthmus.language import LanguageModel
if sys.argv[1] == "kept":
    keep_freed_memory()
torch.manual_seed(0)
lm = LanguageModel.build({"model_type": "llama", "vocab_size": 640, "hidden_size": 192, "intermediate_size": 512,
                          "num_hidden_layers": 5, "num_attention_heads": 3, "tie_word_embeddings": True})
ids = torch.randint(0, 640, (32, 128))
tokens = Tokens(ids=ids, lengths=torch.full((32,), 128), labels=ids)
for number in range(10):
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        total, count = lm.loss(lm.embed(ids), tokens)
    (total / count).backward()
    if number >= 2:
        print(time.perf_counter() - start)
"""


def steps(how: str) -> list[float]:
    """Seconds of each step in a process of its own."""
    done = subprocess.run([sys.executable, "-c", STEP, how], capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


def main() -> None:
    times: dict[str, list[float]] = {"returned": [], "kept": []}
    for _ in range(3):
        for how, found in times.items():
            found += steps(how)
    returned, kept = (statistics.median(found) for found in times.values())
    print(
        f"freed memory returned {1000 * returned:.0f} ms a step, kept {1000 * kept:.0f} ms, ratio {returned / kept:.1f}"
    )


if __name__ == "__main__":
    main()
