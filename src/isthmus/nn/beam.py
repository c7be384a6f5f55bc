"""Beam search over any next-token function, all rows at once and without a round trip to the host.

Legend: B rows, K beams, T tokens written so far, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Step = Callable[[Tensor], Tensor]
"""(B·K, T) tokens written, the start token first -> (B·K, V) log-probabilities of the next, or scores that stand for
them. Row b·K + k is beam k of row b."""

BARRED = -1e9
"""What takes a text out of the running, as the search of transformers has it."""


class Beams:
    """The state of a search in B rows of K beams; row b·K + k of every flat tensor is beam k of row b.

    A text of n new tokens (its stop token counts) scores Σ log p / n^length_penalty: a negative penalty favours short
    texts. One beam is greedy search. A row is done when it has K finished texts and none of its open ones, at its
    present length, scores above the worst of them; texts still open at ``max_new`` compete as they are.
    """

    def __init__(
        self,
        rows: int,
        beams: int,
        *,
        max_new: int,
        stop_ids: Sequence[int] = (),
        length_penalty: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.beams, self.max_new, self.length_penalty, self.length = beams, max_new, length_penalty, 0
        self.stops = torch.tensor(sorted(set(stop_ids)), dtype=torch.long, device=device)
        self.open = torch.zeros(rows, beams, 0, dtype=torch.long, device=device)  # texts of the open beams
        self.total = torch.full((rows, beams), BARRED, device=device)
        self.total[:, 0] = 0.0  # all beams start alike: only one may be continued at first
        self.texts = torch.zeros(rows, beams, max_new, dtype=torch.long, device=device)
        self.lengths = torch.zeros(rows, beams, dtype=torch.long, device=device)
        self.scores = torch.full((rows, beams), BARRED, device=device)
        self.finished = torch.zeros(rows, beams, dtype=torch.bool, device=device)
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)

    @property
    def written(self) -> Tensor:
        """(B·K, T) texts of the open beams."""
        return self.open.flatten(0, 1)

    def advance(self, log_probs: Float[Tensor, "rows V"]) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
        """One step from (B·K, V): the flat number of the beam that each beam now continues, and its new token."""
        width, rows = log_probs.shape[-1], len(self.open)
        sums = (log_probs.float() + self.total.flatten()[:, None]).view(rows, -1)
        kept = min(max(2, 1 + len(self.stops)) * self.beams, sums.shape[1])
        value, place = sums.topk(kept, dim=1)
        beam, token = place // width, place % width
        self.length += 1
        ended = torch.isin(token, self.stops) | (self.length == self.max_new)

        self._finish(value, beam, token, ended)
        value, best = (value + ended * BARRED).topk(self.beams, dim=1)
        self.total, beam, token = value, beam.gather(1, best), token.gather(1, best)
        self.open = torch.cat([self._texts_of(beam), token[..., None]], dim=-1)
        could = self.total[:, :1] / self.length**self.length_penalty
        worst = torch.where(self.finished, self.scores.amin(1, keepdim=True), BARRED)
        self.done = self.done | ~(could > worst).any(1) | (self.length == self.max_new)
        offset = torch.arange(rows, device=beam.device)[:, None] * self.beams
        return (beam + offset).flatten(), token.flatten()

    def _texts_of(self, beam: Tensor) -> Tensor:
        return self.open.gather(1, beam[..., None].expand(-1, -1, self.open.shape[-1]))

    def _finish(self, value: Tensor, beam: Tensor, token: Tensor, ended: Tensor) -> None:
        """Texts that just ended among the K best join the finished ones, of which the K best stay."""
        just = ended.clone()
        just[:, self.beams :] = False
        score = value / self.length**self.length_penalty + (self.done[:, None] | ~just) * BARRED
        texts = torch.zeros(*beam.shape, self.max_new, dtype=torch.long, device=beam.device)
        texts[..., : self.length - 1], texts[..., self.length - 1] = self._texts_of(beam), token
        self.scores, best = torch.cat([self.scores, score], dim=1).topk(self.beams, dim=1)
        self.finished = torch.cat([self.finished, just], dim=1).gather(1, best)
        lengths = torch.full_like(beam, self.length)
        self.lengths = torch.cat([self.lengths, lengths], dim=1).gather(1, best)
        merged = torch.cat([self.texts, texts], dim=1)
        self.texts = merged.gather(1, best[..., None].expand(-1, -1, self.max_new))

    def best(self) -> list[list[int]]:
        """The best finished text of each row, with its stop token where it has one."""
        return [row[:n] for row, n in zip(self.texts[:, 0].tolist(), self.lengths[:, 0].tolist(), strict=True)]

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on."""
        for name in ("open", "total", "texts", "lengths", "scores", "finished", "done"):
            setattr(self, name, getattr(self, name)[rows])


@torch.no_grad()
def beam_search(
    step: Step,
    start: Int[Tensor, " B"],
    *,
    beams: int,
    max_new: int,
    min_new: int = 0,
    stop_ids: Sequence[int] = (),
    forbidden_ids: Sequence[int] = (),
    length_penalty: float = 1.0,
) -> list[list[int]]:
    """The best continuation of each row of ``start`` (B,): new tokens only, without the stop token."""
    state = Beams(
        len(start),
        beams,
        max_new=max_new,
        stop_ids=stop_ids,
        length_penalty=length_penalty,
        device=start.device,
    )
    first = start.repeat_interleave(beams)[:, None]
    for length in range(1, max_new + 1):
        scores = step(torch.cat([first, state.written], dim=1)).float().clone()
        scores[:, [*forbidden_ids, *(stop_ids if length <= min_new else ())]] = -torch.inf
        state.advance(scores)
        if bool(state.done.all()):
            break
    return [text[:-1] if text and text[-1] in set(stop_ids) else text for text in state.best()]
