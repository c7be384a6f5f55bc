"""CapFilt as BLIP-2 uses it (2301.12597, sec. 3.4): several synthetic captions per picture beside the one from the web,
ranked by a CLIP model, the best kept.

Written is a data set of its own: ``captions.jsonl`` (one line per picture, ``caption`` the list of those kept) and
``images/``, read back with ``{kind: jsonl, file: captions.jsonl, image_folder: images}``; a caption is drawn anew
in every epoch, as the paper does.
"""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict

import torch
from torch import Tensor

from isthmus.data.mix import Source, key
from isthmus.data.quarantine import Quarantine
from isthmus.data.record import Image, Record, Text
from isthmus.errors import ConfigError, DataError
from isthmus.evaluation.sound import Sound
from isthmus.evaluation.turns import captions_of
from isthmus.evaluation.window import original

CHUNK = 64
_ENDINGS = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpg"), (b"RIFF", "webp"), (b"GIF8", "gif"), (b"BM", "bmp"))
"""How a picture's file begins, and how its name ends."""


class Captioner(Protocol):
    """Writes captions: any model with eyes that generates. It takes the decoding among options of its own kinds."""

    def generate(self, records: Sequence[Record], **decoding: Any) -> list[str]: ...


class Judge(Protocol):
    """Compares pictures with texts: a CLIP, or a BLIP-2 of the first stage."""

    def similarity(self, images: Sequence[Image], texts: Sequence[str]) -> Tensor: ...


class Line(TypedDict):
    """A line of ``captions.jsonl``: the captions kept, best first, each one's similarity, the caption from the web."""

    id: str
    caption: list[str]
    similarity: list[float]
    web: str
    image: NotRequired[str]


@dataclass(frozen=True, slots=True)
class CapfiltReport:
    """What came out. ``correct_before`` and ``correct_after`` are shares of captions that are among the true ones of
    their picture, where these are known; ``web_kept`` is the share of pictures that keep their web caption, and
    ``right_web_kept`` and ``wrong_web_kept`` are that of those whose web caption was right, and wrong. ``bad`` samples
    were left out."""

    pictures: int
    captions: int
    web_kept: float
    correct_before: float | None = None
    correct_after: float | None = None
    right_web_kept: float | None = None
    wrong_web_kept: float | None = None
    bad: int = 0

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


class Mislabelled(Source):
    """A source in which a ``share`` of the records carries the caption of another picture; the truth stays in meta.

    Which records, and whose caption, is a function of the seed.
    """

    def __init__(self, source: Source, share: float, seed: int = 0) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(f"the share of wrong captions is {share}; it must lie between 0 and 1.")
        self.source, self.share, self.seed, self.name = source, share, seed, source.name

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        record = self.source[index]
        truth = _captions(record)
        if key(self.seed, "wrong", index) / 2**64 >= self.share or len(self) < 2:
            given = truth[key(self.seed, "which", index) % len(truth)]
        else:
            other = self.source[(index + 1 + key(self.seed, "other", index) % (len(self) - 1)) % len(self)]
            wrong = _captions(other)
            given = wrong[key(self.seed, "which", index) % len(wrong)]
        parts = tuple(p for p in record.parts if isinstance(p, Image))
        return replace(record, parts=(*parts, Text(given, learn=True)), meta={**record.meta, "true_captions": truth})


def capfilt(
    source: Source,
    captioner: Captioner,
    judge: Judge,
    out: str | Path,
    *,
    k: int = 10,
    keep: int = 2,
    seed: int = 0,
    decoding: Mapping[str, object] | None = None,
    bad_samples: float = 0.01,
    progress: Callable[[int, int], None] | None = None,
) -> CapfiltReport:
    """Write the data set ``out``: per picture the best ``keep`` among its web caption and ``k`` synthetic ones.

    ``decoding`` is how captions are drawn (default: temperature 1, nucleus of 0.9, at most 40 tokens). The folder
    appears only when it is complete. A record that cannot be read, or has not exactly one picture and a caption, is
    left out, counted and listed in ``OUT.quarantine.jsonl``.

    Raises ConfigError for counts that make no sense, DataError when ``out`` exists or more than the share
    ``bad_samples`` is bad.
    """
    if k < 1 or keep < 1:
        raise ConfigError(f"capfilt makes and keeps at least one caption a picture, not k={k} and keep={keep}.")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not an empty folder; give another name or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    listed = out.parent / f"{out.name}.quarantine.jsonl"
    listed.unlink(missing_ok=True)  # of an earlier attempt, whose samples may be mended
    bad = Quarantine(listed, threshold=bad_samples)
    sound = Sound(source, bad, demand=lambda record: (_picture(record), _captions(record)))
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    settings = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 40, **(decoding or {})}
    tally = _Tally()
    try:
        aside.chmod(0o755)
        (aside / "images").mkdir()
        with (aside / "captions.jsonl").open("w", encoding="utf-8") as file:
            for start in range(0, len(sound), CHUNK):
                records = [sound[i] for i in range(start, min(start + CHUNK, len(sound)))]
                made = synthetic(captioner, records, k=k, seed=seed, decoding=settings)
                for number, (record, texts) in enumerate(zip(records, made, strict=True), start=start):
                    line = _line(record, texts, judge, keep)
                    line["image"] = _write_picture(record, aside / "images", number)
                    tally.add(record, line)
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                if progress is not None:
                    progress(start + len(records), len(sound))
        report = tally.report(len(bad))
        (aside / "report.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
        os.replace(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return report


def synthetic(
    captioner: Captioner, records: Sequence[Record], *, k: int, seed: int, decoding: Mapping[str, object]
) -> list[list[str]]:
    """``k`` captions per record, each drawn with a seed of its own; empty ones are left out."""
    shown = [Record(record.id, (_picture(record),), record.source) for record in records]
    drawn = [captioner.generate(shown, **{**decoding, "seed": seed * k + n}) for n in range(k)]
    return [[texts[i].strip() for texts in drawn if texts[i].strip()] for i in range(len(records))]


def _line(record: Record, texts: Sequence[str], judge: Judge, keep: int) -> Line:
    """The row of one picture, which has no name yet. Equal captions count once."""
    web = _captions(record)[0]
    candidates = list(dict.fromkeys([web, *texts]))
    scores = judge.similarity([_picture(record)], candidates)[0]
    best = torch.argsort(scores, descending=True, stable=True)[:keep].tolist()
    return {
        "id": record.id,
        "caption": [candidates[i] for i in best],
        "similarity": [round(float(scores[i]), 6) for i in best],
        "web": web,
    }


class _Tally:
    """Counts over the pictures written."""

    def __init__(self) -> None:
        self.pictures = self.captions = self.web = self.known = self.right_before = self.right_after = 0
        self.judged = self.right_kept = self.wrong_kept = 0

    def add(self, record: Record, line: Line) -> None:
        self.pictures += 1
        self.captions += len(line["caption"])
        kept = line["web"] in line["caption"]
        self.web += kept
        known = record.meta.get("true_captions")
        truth = {_plain(t) for t in known} if isinstance(known, list | tuple) else set()
        if truth:
            self.known += 1
            self.judged += len(line["caption"])
            right = _plain(line["web"]) in truth
            self.right_before += right
            self.right_kept += kept and right
            self.wrong_kept += kept and not right
            self.right_after += sum(_plain(t) in truth for t in line["caption"])

    def report(self, bad: int) -> CapfiltReport:
        known = self.known > 0
        return CapfiltReport(
            pictures=self.pictures,
            captions=self.captions,
            web_kept=self.web / max(1, self.pictures),
            correct_before=self.right_before / self.known if known else None,
            correct_after=self.right_after / self.judged if known else None,
            right_web_kept=self.right_kept / self.right_before if self.right_before else None,
            wrong_web_kept=self.wrong_kept / wrong if (wrong := self.known - self.right_before) else None,
            bad=bad,
        )


def _plain(text: str) -> str:
    """A caption without what the captioner cannot know: case, final stop, double spaces."""
    return " ".join(text.lower().strip(" .").split())


def _captions(record: Record) -> tuple[str, ...]:
    found = [caption for caption in captions_of(record) if caption.strip()]
    if not found:
        raise DataError(f"sample {record.id!r} has no caption to compare synthetic ones with.")
    return tuple(found)


def _picture(record: Record) -> Image:
    if len(record.images) != 1:
        raise DataError(f"sample {record.id!r} has {len(record.images)} pictures; capfilt takes one picture a sample.")
    return record.images[0]


def _write_picture(record: Record, folder: Path, number: int) -> str:
    """The picture as it came (encoded bytes), or as PNG when it was made; its name in the folder."""
    raw = original(_picture(record).source).read()
    if not isinstance(raw, bytes):
        buffer = io.BytesIO()
        raw.save(buffer, "PNG")
        raw = buffer.getvalue()
    extension = next((ending for start, ending in _ENDINGS if raw.startswith(start)), "img")
    name = f"{number:08d}.{extension}"
    (folder / name).write_bytes(raw)
    return name
