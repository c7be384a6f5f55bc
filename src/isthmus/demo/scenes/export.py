"""Writing scenes for other tools: a LLaVA JSON, WebDataset tar shards or a COCO captions JSON, with PNG files."""

import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image as PilImage

from isthmus.data.record import Record
from isthmus.demo.scenes.scene import Split
from isthmus.demo.scenes.source import SceneSource
from isthmus.errors import ConfigError, DataError, nearest

_PER_SHARD = 1000


def export(
    out: str | Path, *, format: str = "llava", split: Split = "train", count: int = 1000, seed: int = 0, size: int = 64
) -> Path:
    """Write ``count`` scenes to the folder ``out`` and return it.

    Formats: ``llava`` (conversations), ``webdataset`` and ``coco`` (captions).
    The folder appears under its name only when it is complete. Raises DataError when it exists and is not empty,
    ConfigError for an unknown format.
    """
    if format not in _WRITERS:
        raise ConfigError(f"scenes cannot be written as {format!r}; {nearest(format, _WRITERS)}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not an empty folder; give another name or remove it first")
    source = SceneSource(
        "conversations" if format == "llava" else "captions", split=split, count=count, seed=seed, size=size
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        aside.chmod(0o755)
        _WRITERS[format](aside, source)
        os.replace(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return out


def _png(record: Record) -> bytes:
    buffer = io.BytesIO()
    picture = record.images[0].source.read()
    assert isinstance(picture, PilImage.Image)  # scenes are drawn
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _samples(source: SceneSource) -> Iterator[tuple[str, Record]]:
    for i in range(len(source)):
        yield f"{i:06d}", source[i]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _llava(folder: Path, source: SceneSource) -> None:
    """``scenes.json`` with human and gpt turns, the first one starting with ``<image>``, and ``images/``."""
    (folder / "images").mkdir()
    items = []
    for name, record in _samples(source):
        (folder / "images" / f"{name}.png").write_bytes(_png(record))
        turns = [{"from": "human" if t.role == "user" else "gpt", "value": t.text} for t in record.texts]
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        items.append({"id": name, "image": f"{name}.png", "conversations": turns})
    _write_json(folder / "scenes.json", items)


def _webdataset(folder: Path, source: SceneSource) -> None:
    """``00000.tar`` ...: per sample a PNG, its first caption as text, and all of them as JSON."""
    samples = list(range(len(source)))
    for shard, start in enumerate(range(0, len(samples), _PER_SHARD)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in samples[start : start + _PER_SHARD]:
                record = source[i]
                texts = list(record.texts[0].text)
                facts = json.dumps({"captions": texts, "key": record.images[0].key})
                for ending, data in (("png", _png(record)), ("txt", texts[0].encode()), ("json", facts.encode())):
                    member = tarfile.TarInfo(f"{i:06d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def _coco(folder: Path, source: SceneSource) -> None:
    """``captions.json`` with images and annotations, and ``images/``."""
    (folder / "images").mkdir()
    images, annotations = [], []
    for i, (name, record) in enumerate(_samples(source)):
        (folder / "images" / f"{name}.png").write_bytes(_png(record))
        images.append({"id": i, "file_name": f"{name}.png", "width": source.size, "height": source.size})
        for text in record.texts[0].text:
            annotations.append({"id": len(annotations), "image_id": i, "caption": text})
    _write_json(folder / "captions.json", {"images": images, "annotations": annotations})


_WRITERS: dict[str, Callable[[Path, SceneSource], None]] = {"llava": _llava, "webdataset": _webdataset, "coco": _coco}
