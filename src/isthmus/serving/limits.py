"""What a request may cost, checked before any work is done for it."""

from dataclasses import dataclass

from isthmus.data.images import ImageLimits

MOST_MESSAGES = 256
MOST_INPUTS = 256
MOST_CHOICES = 8
MOST_STOPS = 4
MOST_TOP_LOGPROBS = 20
MOST_NEW_TOKENS = 4096
LONGEST_TEXT = 262_144
"""Characters of one text. What the model reads is far less; this is what the tokenizer is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes in bytes, times in seconds.

    Args:
        body: encoded request, whether its length is announced or not.
        headers: request line and headers together.
        depth: how deep lists and objects of a body may be nested.
        pictures: in one request.
        picture: one encoded picture; ``pixels`` its width x height, read from its header, ``side`` the longer of
            them, ``aspect`` the longer over the shorter: a narrow strip grows when it is resized.
        queue: requests that wait; half of it for any one client.
        rows: texts that are decoded together, of one model.
        deadline: from a request's arrival to its last token, waiting included.
        reading: until a request has arrived in full, and for an idle connection.
        connections: at the same time; beyond them 503.
        features: what encoded pictures may keep in memory, per model; ``prefixes`` what prompts may.
    """

    body: int = 20 * 2**20
    headers: int = 16 * 2**10
    depth: int = 24
    pictures: int = 8
    picture: int = 10 * 2**20
    pixels: int = 50_000_000
    side: int = 16_384
    aspect: float = 200.0
    queue: int = 64
    rows: int = 16
    deadline: float = 120.0
    reading: float = 20.0
    connections: int = 512
    features: int = 64 * 2**20
    prefixes: int = 256 * 2**20

    @property
    def images(self) -> ImageLimits:
        """What is refused of a picture before it is decoded."""
        return ImageLimits(file_bytes=self.picture, pixels=self.pixels, side=self.side, aspect=self.aspect)
