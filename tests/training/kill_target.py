"""A training process to be killed: ``python kill_target.py FOLDER KILLS SEED`` forks one run after another.

Forking spares the import of torch for each run. The parent kills the child with SIGKILL at a random step; every
second time inside a save, which a slow writer makes long enough to hit. The last child is left to finish.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from isthmus import checkpoint
from isthmus.stage import Group, Stage
from isthmus.training import train
from isthmus.weights import state_tensors
from tests.training.toys import ToyLoader, ToyNet

STEPS = 40


def train_once(folder: Path, *, slow: bool) -> None:
    torch.set_num_threads(1)
    if slow:
        real = checkpoint._write_file

        def slowly(path, content):
            time.sleep(0.006)
            real(path, content)
            time.sleep(0.006)

        checkpoint._write_file = slowly
    loader = ToyLoader()
    net = ToyNet()
    groups = (Group("connector.*", lr=2e-2, weight_decay=0.1), Group("language.*", lr=1e-2))
    train(net, loader, Stage(name="s", train=groups, steps=STEPS, save_every=3, warmup=6), folder, progress=False)
    checkpoint.write_folder(folder / "final", {"net.safetensors": state_tensors(net)}, replace=True)


def start(folder: Path, *, slow: bool) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train_once(folder, slow=slow)
            code = 0
        finally:
            os._exit(code)
    return child


def logged(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def ended(child: int) -> bool:
    return os.waitpid(child, os.WNOHANG)[0] == child


def kill_at(child: int, folder: Path, step: int, *, inside_save: bool) -> bool:
    """Wait until ``step`` lines are logged (and a save is under way), then kill -9. False if it ended before."""
    while not ended(child):
        if logged(folder) >= step and (not inside_save or list((folder / "checkpoints").glob("*.tmp-*"))):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.001)
    return False


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    dice = random.Random(seed)
    # The first optimizer imports half of torch; done here once instead of in every child.
    torch.optim.AdamW([torch.zeros(1)], fused=True).zero_grad()
    torn = 0
    for n in range(kills):
        inside = n % 2 == 1
        # Steps are dealt out over the run so that every kill finds something left to do.
        low = 1 + n * (STEPS - 12) // kills
        if not kill_at(start(folder, slow=inside), folder, dice.randint(low, low + 6), inside_save=inside):
            raise SystemExit(f"run {n} ended before it was killed")
        torn += bool(list((folder / "checkpoints").glob("*.tmp-*")))
    status = os.waitpid(start(folder, slow=False), 0)[1]
    print(
        f"killed {kills}, inside a save {torn}, status {status}, "
        f"left over {len(list((folder / 'checkpoints').glob('*.tmp-*')))}"
    )


if __name__ == "__main__":
    main()
