"""Beam search over any next-token function; for networks that transformers' own search does not know.

Legend: B rows, K beams, T tokens written so far, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Step = Callable[[Tensor], Tensor]
"""(B·K, T) tokens written, the start token first -> (B·K, V) log-probabilities of the next, or scores that stand for
them. Row b·K + k is beam k of row b."""


@torch.no_grad()
def beam_search(
    step: Step,
    start: Tensor,
    *,
    beams: int,
    max_new: int,
    min_new: int = 0,
    stop_ids: Sequence[int] = (),
    forbidden_ids: Sequence[int] = (),
    length_penalty: float = 1.0,
) -> list[list[int]]:
    """The best continuation of each row of ``start`` (B,): new tokens only, without the stop token.

    A text of n new tokens (its stop token counts) scores Σ log p / n^length_penalty: a negative penalty favours short
    texts. One beam is greedy search. A row ends when it has K finished texts and none of its open ones, at its
    present length, scores above the worst of them; texts still open at ``max_new`` compete as they are.
    """
    rows, device = len(start), start.device
    written = start.repeat_interleave(beams)[:, None]
    total = torch.full((rows, beams), -torch.inf, device=device)
    total[:, 0] = 0.0  # all beams start alike: only one may be continued at first
    done: list[list[tuple[float, list[int]]]] = [[] for _ in range(rows)]
    open_rows = set(range(rows))
    for length in range(1, max_new + 1):
        scores = step(written).float().clone()
        barred = [*forbidden_ids, *(stop_ids if length <= min_new else ())]
        scores[:, barred] = -torch.inf
        width = scores.shape[-1]
        candidates = (total.flatten()[:, None] + scores).unflatten(0, (rows, beams)).flatten(1)
        best, place = candidates.topk(min((1 + len(stop_ids)) * beams, candidates.shape[1]), dim=1)
        pick = torch.zeros(rows, beams, 2, dtype=torch.long, device=device)
        for row in range(rows):
            found = [(v, *divmod(p, width)) for v, p in zip(best[row].tolist(), place[row].tolist(), strict=True)]
            ended = [c for c in found[:beams] if c[2] in stop_ids and c[0] > -torch.inf]
            going = [c for c in found if c[2] not in stop_ids][:beams]
            for value, beam, _ in ended if row in open_rows else ():
                text = written[row * beams + beam, 1:].tolist()
                done[row].append((value / length**length_penalty, text))
            total[row] = -torch.inf
            for k, (value, beam, token) in enumerate(going):
                total[row, k] = value
                pick[row, k] = torch.tensor([row * beams + beam, token])
            done[row] = sorted(done[row], key=lambda pair: -pair[0])[:beams]
            if len(done[row]) == beams and float(total[row].max()) / length**length_penalty <= done[row][-1][0]:
                open_rows.discard(row)
        written = torch.cat([written[pick[..., 0].flatten()], pick[..., 1].flatten()[:, None]], dim=1)
        if not open_rows:
            break
    for row in open_rows:
        for beam in range(beams):
            value = float(total[row, beam]) / max_new**length_penalty
            done[row].append((value, written[row * beams + beam, 1:].tolist()))
    return [max(texts, key=lambda pair: pair[0])[1] for texts in done]
