"""What each process of the distributed BLIP-2 test runs (imported by freshly started processes, so kept light)."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from isthmus.batch import Tokens
from isthmus.nn.matching import Contrast, gather_tokens, hard_negatives, query_contrast

ROWS, QUERIES, WIDTH = 6, 3, 5
KEYS = ("a", "b", "c", "d", "e", "a")
"""Rows 0 and 5, on different ranks, show the same picture."""


def leaves() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit image vectors (6, 3, 5), unit text vectors (6, 5) and the temperature, all leaves."""
    g = torch.Generator().manual_seed(3)
    images = torch.nn.functional.normalize(torch.randn(ROWS, QUERIES, WIDTH, generator=g), dim=-1)
    texts = torch.nn.functional.normalize(torch.randn(ROWS, WIDTH, generator=g), dim=-1)
    return images.requires_grad_(), texts.requires_grad_(), torch.tensor(0.2, requires_grad=True)


def text() -> Tokens:
    """Rows of different lengths; the second rank's are longer."""
    lengths = torch.tensor([2, 3, 2, 5, 4, 5])
    ids = torch.arange(1, ROWS + 1)[:, None].repeat(1, 5) * (torch.arange(5) < lengths[:, None])
    return Tokens(ids=ids, lengths=lengths)


def run(rank: int, world: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    images, texts, temperature = leaves()
    rows = slice(rank * 3, rank * 3 + 3)
    found = query_contrast(images[rows], texts[rows], temperature)
    found.loss.backward()
    torch.manual_seed(10 + rank)
    names = [f"row {i}" for i in range(ROWS)][rows]
    flat = Contrast(found.loss, torch.zeros_like(found.image_to_text), torch.zeros_like(found.text_to_image))
    drawn = [torch.stack(hard_negatives(flat, KEYS[rows], names)) for _ in range(60)]
    gathered = gather_tokens(text().rows(torch.arange(ROWS)[rows]))
    torch.save(
        {
            "loss": found.loss.detach(),
            "image_to_text": found.image_to_text.detach(),
            "text_to_image": found.text_to_image.detach(),
            "images": images.grad,
            "texts": texts.grad,
            "temperature": temperature.grad,
            "drawn": torch.cat(drawn),
            "ids": gathered.ids,
            "lengths": gathered.lengths,
        },
        Path(folder, f"rank{rank}.pt"),
    )
    dist.destroy_process_group()
