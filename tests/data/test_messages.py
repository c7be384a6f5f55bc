"""The messages form of a conversation, to a record."""

from typing import Any

import pytest
from PIL import Image as PilImage

from isthmus.data.messages import conversation
from isthmus.errors import DataError

HELLO = {"role": "user", "content": "hello"}
BRIEF = {"role": "system", "content": "be brief"}
PICTURE = {"role": "user", "content": [{"type": "image", "image": PilImage.new("RGB", (4, 4))}]}


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([HELLO, {"role": "user", "content": "you"}], "messages 0 and 1 are both the user's"),
        ([HELLO, *[{"role": "assistant", "content": "a"}] * 2, HELLO], "messages 1 and 2 are both the assistant's"),
        ([BRIEF, BRIEF, HELLO], "message 1: the system's text stands in one message before all others"),
        ([HELLO, BRIEF, HELLO], "message 1: the system's text"),
    ],
)
def test_texts_that_would_run_into_each_other_are_refused(messages: list[dict[str, Any]], named: str) -> None:
    """Joined they were one text, "helloyou", which no template of transformers makes of them."""
    with pytest.raises(DataError, match=named):
        conversation(messages)


def test_a_picture_may_have_a_message_of_its_own() -> None:
    for messages in ([PICTURE, HELLO], [BRIEF, HELLO, PICTURE], [PICTURE, PICTURE, HELLO]):
        assert len(conversation(messages).texts) == len(messages) - messages.count(PICTURE)
