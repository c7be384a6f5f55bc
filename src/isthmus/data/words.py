"""From token ids to the text of an answer, as far as it is final already.

Of an answer that is still being written three things are held back: a character of which only some bytes are there,
the beginning of what may become a stop text, and white space that may turn out to be the answer's end. What was said
is never taken back, and all pieces together are what ``decode(ids).strip()`` gives, cut at the first stop text.
"""

from collections.abc import Sequence

from isthmus.data.tokenizer import Tokenizer

_BROKEN = "\ufffd"
_BYTES = "<0x"


class Words:
    """The text of one answer. ``strip`` takes white space off both ends, as ``Model.generate`` does."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, strip: bool = True) -> None:
        self.tokenizer, self.stops, self.strip = tokenizer, tuple(stops), strip
        self.ids: list[int] = []
        self.stopped = False
        self._from, self._read = 0, 0  # ids whose text is known lie before _read; decoding begins at _from
        self._text = ""  # everything decoded
        self._said = 0  # how much of it was said

    def push(self, token: int) -> str:
        """What can be said now that ``token`` was written. Sets ``stopped`` when a stop text is complete."""
        self.ids.append(token)
        known = self.tokenizer.decode(self.ids[self._from : self._read])
        grown = self.tokenizer.decode(self.ids[self._from :])
        if len(grown) > len(known) and not grown.endswith(_BROKEN):
            self._add(grown[len(known) :])
            self._from, self._read = self._read, len(self.ids)
        return self._say(self._settled())

    def end(self) -> str:
        """What was held back, now that nothing follows."""
        if not self.stopped:
            known = self.tokenizer.decode(self.ids[self._from : self._read])
            self._add(self.tokenizer.decode(self.ids[self._from :])[len(known) :])
        said = self._text.rstrip() if self.strip else self._text
        return self._say(max(len(said), self._said))

    def _add(self, text: str) -> None:
        before = len(self._text)
        self._text += text
        longest = max(map(len, self.stops), default=0)
        start = max(0, before - longest)
        found = [at for at in (self._text.find(stop, start) for stop in self.stops) if at >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True
        if self.strip and self._said == 0:
            self._text = self._text.lstrip()

    def _settled(self) -> int:
        """How many characters of the text cannot change any more."""
        end = len(self._text)
        if not self.stopped:
            for stop in self.stops:
                held = next((k for k in range(min(len(stop) - 1, end), 0, -1) if self._text.endswith(stop[:k])), 0)
                end = min(end, len(self._text) - held)
        return len(self._text[:end].rstrip()) if self.strip else end

    def _say(self, end: int) -> str:
        said = self._text[self._said : end]
        self._said = max(self._said, end)
        return said


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes that a token stands for, which may be a part of a character."""
    entry = tokenizer.backend.id_to_token(token) or ""
    if len(entry) == 6 and entry.startswith(_BYTES) and entry.endswith(">"):  # SentencePiece's bytes
        return bytes([int(entry[3:5], 16)])
    text = tokenizer.decode([token], skip_special=False)
    if _BROKEN in text and all(c in _LEVELS for c in entry):
        return bytes(_LEVELS[c] for c in entry)
    if entry.startswith("▁") and not text.startswith(" "):  # its space, which a text's beginning loses
        text = " " + text
    return text.encode("utf-8", "replace")


def _levels() -> dict[str, int]:
    """Character -> byte of byte-level vocabularies (GPT-2's): printable ones stand for themselves."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + n): b for n, b in enumerate(others)}


_LEVELS = _levels()
