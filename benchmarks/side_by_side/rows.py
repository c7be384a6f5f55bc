"""The rows of the table: each makes the two sides, as callables that answer with what must be equal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from benchmarks.side_by_side import peers
from benchmarks.side_by_side.models import Beside, Sizes, beside, blip2, clip, idefics, llava, picture
from benchmarks.side_by_side.samples import (
    LONG,
    contrast_records,
    interleaved_records,
    own_step,
    pixels_of,
    step,
    with_features,
)
from torch import Tensor

from isthmus.data.collate import collate
from isthmus.data.reading import scored
from isthmus.data.record import Example, Record, Text
from isthmus.language import Decoding
from isthmus.stage import Group, apply_stage
from isthmus.systems.peers import text_ids
from isthmus.together import together

Side = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """``peer`` is what stands on the other side, ``note`` what the reader must know."""

    peer: str
    make: Callable[[Sizes, int], tuple[Side, Side]]
    note: str = ""

    @property
    def elsewhere(self) -> bool:
        """Whether the peer lives in an environment of its own, and cannot be imported in this one."""
        return self.peer.startswith("open_") and find_spec(self.peer) is None


def _record(name: str, *parts: Any, answer: str | None = None) -> Record:
    said = [Text(p, role="user") if isinstance(p, str) else p for p in parts]
    return Record(name, (*said, *([] if answer is None else [Text(answer, role="assistant", learn=True)])))


def _joined(both: Beside, examples: Sequence[Example], *, labels: bool = True) -> dict[str, Tensor]:
    """What transformers' class reads of all the rows, right-padded."""
    rows = [both.ours.system.peer_inputs(both.ours, example, both.token) for example in examples]
    found: dict[str, Tensor] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if values[0].ndim == 2:
            found[name] = torch.nn.utils.rnn.pad_sequence([v[0] for v in values], batch_first=True)
        else:
            width = max(v.shape[1] for v in values)
            padded = name.endswith("attention_mask")
            values = [
                torch.cat([v, v.new_zeros(1, width - v.shape[1], *v.shape[2:])], 1) if padded else v for v in values
            ]
            found[name] = torch.cat(values)
    if labels:
        told = collate(examples).text["lm"].labels
        assert told is not None
        found["labels"] = told
    return found


def _answering(both: Beside, sizes: Sizes) -> None:
    """Both sides in the precision to answer in. Buffers of the peer (rotary frequencies) stay what they are, as where
    transformers opens a folder with a dtype."""
    both.ours.cast(sizes.dtype).net.eval()
    both.theirs.eval()
    for parameter in both.theirs.parameters():
        parameter.data = parameter.data.to(sizes.dtype)


def _cast(given: dict[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Pictures in the precision of a net that was cast; ids stay."""
    return {name: value.to(sizes.dtype) if value.is_floating_point() else value for name, value in given.items()}


def _opened(net: Any, theirs: Any, ours: Sequence[str], names: Sequence[str]) -> None:
    """The same parts train on both sides."""
    apply_stage(net, tuple(Group(pattern, lr=1.0) for pattern in ours))
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(any(part in name for part in names))
    net.float().train()
    theirs.float().train()


def _steps(
    both: Beside, examples: Sequence[Example], sizes: Sizes, *, cached: bool = False, own_loss: bool = True
) -> tuple[Side, Side]:
    """Loss and gradients of one batch on both sides; answers with the mean loss. Without ``own_loss`` the peer's is
    taken of its logits: IDEFICS's class counts its vocabulary without the tokens that were added."""
    net, theirs = both.ours.net, both.theirs
    given = _joined(both, examples)
    labels = given["labels"] if own_loss else given.pop("labels")
    if cached:
        with torch.no_grad():
            examples = [with_features(net, example) for example in examples]
    batch = collate(examples)

    def loss() -> Tensor:
        found = theirs(**given, use_cache=False)
        return found.loss if own_loss else _next_token_loss(found.logits, labels)

    return own_step(net, batch, sizes), step(theirs, loss, sizes)


def _next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _clip(sizes: Sizes, rows: int) -> tuple[Side, Side]:
    both = beside(clip, sizes)
    model, theirs = both.ours, both.theirs
    side = model.net.config.vision.image_size
    records = contrast_records(rows * 4, side)
    examples = [model.processor.example(record, 0) for record in records]
    batch = collate(examples)
    texts, towers = batch.text["text"], (model.net.config.text, theirs.config.text_config)
    own = [text_ids(*towers, example)[0] for example in examples]
    ids = torch.nn.utils.rnn.pad_sequence(own, batch_first=True)
    for net in (model.net, theirs):
        net.float().requires_grad_(True)

    def loss() -> Tensor:
        return theirs(
            input_ids=ids,
            attention_mask=texts.mask.long(),
            pixel_values=pixels_of(batch)[:, 0],
            return_loss=True,
        ).loss

    return own_step(model.net, batch, sizes), step(theirs, loss, sizes)


def _llava_train(stage: int, cached: bool) -> Callable[[Sizes, int], tuple[Side, Side]]:
    def make(sizes: Sizes, rows: int) -> tuple[Side, Side]:
        both = beside(llava, sizes)
        lengths = [1] * rows * 2 if stage == 1 else [1 + n * 12 // rows for n in range(rows * 2)]
        records = [
            _record(str(n), picture(n, sizes.side), "what is it?", answer=LONG * times)
            for n, times in enumerate(lengths)
        ]
        opened = (["connector.*"], ["multi_modal_projector"])
        if stage == 2:
            opened = (["connector.*", "language.*"], ["multi_modal_projector", "language_model", "lm_head"])
        _opened(both.ours.net, both.theirs, *opened)
        return _steps(both, [both.ours.processor.example(r, 0) for r in records], sizes, cached=cached)

    return make


def _blip2_train(cached: bool) -> Callable[[Sizes, int], tuple[Side, Side]]:
    def make(sizes: Sizes, rows: int) -> tuple[Side, Side]:
        both = beside(blip2, sizes)
        records = [_record(str(n), picture(n, sizes.side), answer=LONG) for n in range(rows * 4)]
        _opened(both.ours.net, both.theirs, ["connector.*"], ["qformer", "language_projection", "query_tokens"])
        return _steps(both, [both.ours.processor.example(r, 0) for r in records], sizes, cached=cached)

    return make


def _idefics_train(sizes: Sizes, rows: int) -> tuple[Side, Side]:
    both = beside(idefics, sizes)
    records = interleaved_records(rows, sizes.side)
    _opened(
        both.ours.net,
        both.theirs,
        ["connector.*", "xattn.*", "language.new_rows.*"],
        ["perceiver", "gated_cross_attn", "additional"],
    )
    return _steps(both, [both.ours.processor.example(r, 0) for r in records], sizes, own_loss=False)


def _writes(make_model: Callable[[Sizes], Any], new: int, *, pictures: int = 1) -> Callable[[Sizes, int], Any]:
    def make(sizes: Sizes, rows: int) -> tuple[Side, Side]:
        both = beside(make_model, sizes)
        model, theirs = both.ours, both.theirs
        shown = [[picture(pictures * n + k, sizes.side) for k in range(pictures)] for n in range(rows)]
        examples = [model.processor.prompt(_record(str(n), *own, "what is it?")) for n, own in enumerate(shown)]
        batch, given = collate(examples), _joined(both, examples, labels=False)
        never = (*model.system.never(model.net), *(() if both.token is None else (both.token,)))
        stops = set(range(model.net.language.vocab_size)) & set(never)
        # IDEFICS's own ending tokens stop ours, so that nobody may write them.
        ends = getattr(model.net.config, "new_ids", ())
        barred = tuple(sorted({*stops, *ends}))
        decoding = Decoding(max_new_tokens=new, forbidden_ids=barred)
        _answering(both, sizes)
        given = _cast(given, sizes)
        if ends:
            model.net.language.settled = lambda decoding, prompt: decoding

        def ours() -> list[list[int]]:
            with torch.inference_mode():
                return model.net.generate(batch, decoding)

        def peers() -> list[list[int]]:
            with torch.inference_mode():
                found = theirs.generate(
                    **given,
                    max_new_tokens=new,
                    do_sample=False,
                    suppress_tokens=list(barred) or None,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            return [row[-new:] for row in found.tolist()]

        return ours, peers

    return make


def _rank(sizes: Sizes, rows: int) -> tuple[Side, Side]:
    both = beside(llava, sizes)
    model, theirs = both.ours, both.theirs
    shown, question = picture(0, sizes.side), "what is it?"
    words = ["red", "blue", "cube", "rings", "left", "two", "large", "small"]
    candidates = [f"{a} {b}" for a in words for b in words][: 8 * rows]
    _answering(both, sizes)
    examples = [scored(model.processor, _record(c, shown, question, answer=c), c) for c in candidates]

    def ours() -> list[float]:
        return model.score([shown, question], candidates)

    def peers() -> list[float]:
        found = []
        for example in examples:
            given = _cast(_joined(both, [example]), sizes)
            labels = given.pop("labels")[0]
            with torch.inference_mode():
                told = theirs(**given).logits[0, :-1].log_softmax(-1)
            place = torch.nonzero(labels[1:] != -100).flatten()
            found.append(float(told[place, labels[1:][place]].sum()))
        return found

    return ours, peers


def _shots(sizes: Sizes, rows: int) -> tuple[Side, Side]:
    both = beside(idefics, sizes)
    model = both.ours
    _answering(both, sizes)
    before: list[Any] = []
    for n in range(8):
        before += [picture(n, sizes.side), "what is it?", Text(LONG, role="assistant")]
    records = [_record(str(n), *before, picture(100 + n, sizes.side), "what is it?") for n in range(25 * rows)]
    examples = [model.processor.prompt(record) for record in records]
    decoding = Decoding(max_new_tokens=5)
    cpu = torch.device("cpu")

    def ours() -> list[list[int]]:
        with torch.inference_mode():
            return together(model.net, examples, decoding, batch_size=25, device=cpu)

    def peers() -> list[list[int]]:
        found: list[list[int]] = []
        with torch.inference_mode():
            for start in range(0, len(examples), 25):
                found += model.net.generate(collate(examples[start : start + 25]), decoding)
        return found

    return ours, peers


TRANSFORMERS = "transformers"
LENGTHS = "our texts as long as they are, the peer's of the whole context"
CACHED = "our features are cached, the peer's are not"
ROWS: dict[str, Row] = {
    "clip_vs_openclip": Row("open_clip", peers.clip_beside_open_clip, LENGTHS),
    "clip_vs_hf": Row(TRANSFORMERS, _clip),
    "llava1": Row(TRANSFORMERS, _llava_train(1, False)),
    "llava1_cached": Row(TRANSFORMERS, _llava_train(1, True), CACHED),
    "llava2": Row(TRANSFORMERS, _llava_train(2, False)),
    "llava2_cached": Row(TRANSFORMERS, _llava_train(2, True), CACHED),
    "llava_gen": Row(TRANSFORMERS, _writes(llava, 64)),
    "blip2": Row(TRANSFORMERS, _blip2_train(False)),
    "blip2_cached": Row(TRANSFORMERS, _blip2_train(True), CACHED),
    "blip2_gen": Row(TRANSFORMERS, _writes(blip2, 32)),
    "flamingo_of": Row("open_flamingo", peers.flamingo_whole),
    "flamingo_of_cached": Row("open_flamingo", peers.flamingo_cached, CACHED),
    "flamingo_idefics": Row(TRANSFORMERS, _idefics_train),
    "flamingo_idefics_gen": Row(TRANSFORMERS, _writes(idefics, 32, pictures=3)),
    "rank32": Row(TRANSFORMERS, _rank, "the peer scores a row each"),
    "shots8": Row("isthmus without reuse", _shots, "8 shots that all questions share, 25 questions per row of four"),
}
