"""Web pages with pictures among the text: OBELICS' and MMC4's layouts, as JSON lines or in tar shards.

OBELICS (2306.16527): parallel lists ``texts`` and ``images``; at each place exactly one of the two is there. MMC4
(2304.06939): ``text_list`` of sentences and ``image_info`` with the sentence each picture belongs to, before which it
is put. A picture is a file name, a member of the sample in a tar, or ``image_base64``.

In a tar the picture ``0.png`` of the page ``k.json`` is ``k.0.png``. Where no name of a page is a member's, the members
in natural order are the page's pictures in the order of its list.
"""

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping, Sequence

from isthmus.data.images import BytesImage, TarImage
from isthmus.data.mix import Source
from isthmus.data.record import Image, ImageSource, Part, Record, Text
from isthmus.data.sources.files import NamedImages
from isthmus.data.sources.members import called, in_order
from isthmus.data.sources.rows import Row, Rows
from isthmus.errors import ConfigError, DataError


class DocumentSource(Source):
    """Records of running text, all of it learnt, with pictures in their places.

    Args:
        pages: their fields, with the pictures that came with them, if any.
        layout: ``obelics`` or ``mmc4``.
        images: where pictures called by name are; none when each page brings its own.
        min_sim: of MMC4's pictures, the least ``matched_sim`` to be kept (OpenFlamingo: 0.24); unknown ones are kept.
        max_images: pages keep their first so many pictures.
        min_images: pages with fewer are left out when the source is opened.
    """

    def __init__(
        self,
        name: str,
        pages: Rows,
        layout: str,
        images: NamedImages | None,
        *,
        min_sim: float = 0.0,
        max_images: int | None = None,
        min_images: int = 1,
        limit: int | None = None,
    ) -> None:
        if min_images < 0 or (max_images is not None and max_images < max(min_images, 1)):
            raise ConfigError(f"source {name!r}: min_images {min_images} and max_images {max_images} leave no page")
        self.name, self.pages, self.images = name, pages, images
        self.min_sim, self.max_images = min_sim, max_images
        self._layout: Callable[[Row], Layout] = self._obelics if layout == "obelics" else self._mmc4
        kept = [i for i in range(len(pages)) if self._count(i) >= min_images]
        self._kept = kept if limit is None else kept[:limit]
        if not self._kept:
            raise DataError(f"source {name!r} holds no page with {min_images} pictures; lower min_images or min_sim")

    def __len__(self) -> int:
        return len(self._kept)

    def listing(self) -> Iterator[object]:
        """What a fingerprint reads beside complete samples."""
        yield self._kept
        yield from self.pages.listing()
        if self.images is not None:
            yield from self.images.listing()

    def __getitem__(self, index: int) -> Record:
        row = self.pages[self._kept[index]]
        pieces, listed = self._layout(row)
        members = [image for image in row.images if isinstance(image, TarImage)]
        own = _members(listed, members) if self.images is None else {}
        parts: list[Part] = []
        shown = 0
        for piece in pieces:
            if isinstance(piece, str):
                if parts and isinstance(last := parts[-1], Text):
                    parts[-1] = Text(_joined(str(last.text), piece), learn=True)
                else:
                    parts.append(Text(piece, learn=True))
                continue
            shown += 1
            if self.max_images is None or shown <= self.max_images:
                parts.append(Image(self._picture(piece, own), role="text"))
        url = row.values.get("url")
        return Record(row.id, tuple(parts), self.name, {"url": url} if isinstance(url, str) else {})

    def _count(self, index: int) -> int:
        """Pictures of a page; a page that cannot be read counts as full, and is met and counted when visited."""
        try:
            found = sum(not isinstance(piece, str) for piece in self._layout(self.pages[index])[0])
        except DataError:
            return 1 << 30
        return found

    def _obelics(self, row: Row) -> "Layout":
        texts, images = (_list(row.values, name) for name in ("texts", "images"))
        if len(texts) != len(images):
            raise DataError(f"bad page: {len(texts)} texts and {len(images)} images; the two lists must be parallel")
        pieces: list[str | Picture] = []
        for place, (text, image) in enumerate(zip(texts, images, strict=True)):
            if (text is None) == (image is None):
                raise DataError(f"bad page: place {place} must hold either a text or an image")
            pieces.append(str(text) if text is not None else Picture(image, None))
        return pieces, [piece for piece in pieces if isinstance(piece, Picture)]

    def _mmc4(self, row: Row) -> "Layout":
        sentences, infos = (_list(row.values, name) for name in ("text_list", "image_info"))
        before: dict[int, list[Picture]] = {}
        listed: list[Picture] = []
        for info in infos:
            if not isinstance(info, Mapping) or not isinstance(info.get("matched_text_index"), int):
                raise DataError("bad page: each image_info needs image_name and matched_text_index")
            place, sim = info["matched_text_index"], info.get("matched_sim")
            if sim is not None and not isinstance(sim, int | float):
                raise DataError(f"bad page: matched_sim should be a number and is {sim!r}")
            if not 0 <= place < len(sentences):
                raise DataError(f"bad page: an image belongs to sentence {place} of {len(sentences)}")
            listed.append(Picture(info.get("image_name"), info.get("image_base64")))
            if sim is None or sim >= self.min_sim:
                before.setdefault(place, []).append(listed[-1])
        pieces: list[str | Picture] = []
        for place, sentence in enumerate(sentences):
            pieces += before.get(place, [])
            if pieces and isinstance(pieces[-1], str):
                pieces[-1] = f"{pieces[-1]} {sentence}"
            else:
                pieces.append(str(sentence))
        return pieces, listed

    def _picture(self, piece: "Picture", own: "Mapping[Picture, ImageSource]") -> ImageSource:
        if piece.encoded is not None:
            try:
                if not isinstance(piece.encoded, str):
                    raise ValueError(piece.encoded)
                return BytesImage(base64.b64decode(piece.encoded, validate=True), str(piece.name or "image"))
            except (binascii.Error, ValueError):
                raise DataError(f"broken image: image_base64 of {piece.name!r} is no base64; write it again") from None
        if self.images is None:
            if piece not in own:
                raise DataError(
                    f"missing image: the page's sample in the tar holds no picture {piece.name!r}; check its names"
                )
            return own[piece]
        if not isinstance(piece.name, str):
            raise DataError(f"bad page: an image is called {piece.name!r}; it should be a file name")
        return self.images.find(piece.name)


class Picture:
    """A picture's place in a page: its name, or its bytes in base64."""

    def __init__(self, name: object, encoded: object) -> None:
        self.name, self.encoded = name, encoded


Layout = tuple[list[str | Picture], list[Picture]]
"""Text and pictures in reading order, and all pictures in the page's own order, also those left out of the former."""


class JsonPages:
    """Pages of JSON files: (stem of the file, fields)."""

    def __init__(self, rows: Sequence[tuple[str, Mapping[str, object]]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def listing(self) -> Iterator[object]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Row:
        stem, values = self.rows[index]
        return Row(f"{stem}/{index}", values)


def _members(listed: Sequence[Picture], images: Sequence[TarImage]) -> dict[Picture, TarImage]:
    """The picture of a tar's sample that each of the page's is: by name, else by number.

    Where names are known, one that is no member's is left out. Raises DataError when two names are one member's, or
    when there are too few members for their numbers.
    """
    members = in_order(images)
    wanted = [picture for picture in listed if picture.encoded is None]
    found = {p: m for p in wanted if isinstance(p.name, str) and (m := called(p.name, members)) is not None}
    if found:
        names: dict[str, object] = {}
        for picture, member in found.items():
            if names.setdefault(member.name, picture.name) != picture.name:
                raise DataError(
                    f"bad page: its pictures {names[member.name]!r} and {picture.name!r} both mean {member.name!r} in "
                    "the tar; name each member after one"
                )
        return found
    if len(members) < len(wanted):
        raise DataError(
            f"missing image: the page has {len(wanted)} pictures and its sample in the tar {len(members)}, none of "
            "them under a name of the page's; name them so"
        )
    return dict(zip(wanted, members, strict=False))


def _joined(before: str, after: str) -> str:
    """Two texts with a space between them, unless one brings it."""
    glued = before and after and not before[-1].isspace() and not after[0].isspace()
    return f"{before} {after}" if glued else before + after


def _list(values: Mapping[str, object], name: str) -> list[object]:
    found = values.get(name)
    if not isinstance(found, list):
        raise DataError(f"bad page: it has no list {name!r} (it has {', '.join(map(str, values)) or 'nothing'})")
    return found
