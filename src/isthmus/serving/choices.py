"""Answers in OpenAI's forms, complete or in pieces."""

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from isthmus.data.tokenizer import Tokenizer
from isthmus.data.words import token_bytes
from isthmus.serving.engine import Token
from isthmus.serving.scheduler import Said

NEVER = -9999.0
"""In place of minus infinity, which JSON does not have."""


@dataclass(slots=True)
class Choice:
    """One choice as far as it was heard."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    ended: str = ""


@dataclass(slots=True)
class Answer:
    """All choices of a request, and the facts around them."""

    model: str
    tokenizer: Tokenizer
    prompt_tokens: int
    chat: bool
    """Whether it is a chat's; else the continuation of a text."""
    top: int | None = None
    choices: dict[int, Choice] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def hear(self, said: Said) -> None:
        choice = self.choices.setdefault(said.choice, Choice())
        choice.text += said.text
        choice.ended = said.ended
        if said.token is not None:
            choice.tokens.append(said.token)

    def complete(self, choices: int) -> bool:
        return len(self.choices) == choices and all(c.ended for c in self.choices.values())

    def usage(self) -> dict[str, int]:
        written = sum(len(c.tokens) for c in self.choices.values())
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }

    def frame(self, object_type: str, choices: list[dict[str, object]]) -> dict[str, object]:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": object_type,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def response(self) -> dict[str, object]:
        """The answer in one piece."""
        if self.chat:
            choices = [self._chat(n, c) for n, c in sorted(self.choices.items())]
            return self.frame("chat.completion", choices) | {"usage": self.usage()}
        choices = [self._completion(n, c.text, c.tokens, c.ended, 0) for n, c in sorted(self.choices.items())]
        return self.frame("text_completion", choices) | {"usage": self.usage()}

    def piece(self, said: Said) -> dict[str, object]:
        """What one event adds. ``hear`` must have had it already."""
        tokens = [] if said.token is None else [said.token]
        if self.chat:
            choice: dict[str, object] = {
                "index": said.choice,
                "delta": {"content": said.text} if said.text else {},
                "logprobs": None if self.top is None else self._chat_logprobs(tokens),
                "finish_reason": said.ended or None,
            }
            return self.frame("chat.completion.chunk", [choice])
        before = len(self.choices[said.choice].text) - len(said.text)
        return self.frame("text_completion", [self._completion(said.choice, said.text, tokens, said.ended, before)])

    def opening(self, choice: int) -> dict[str, object]:
        """The first piece of a chat's choice: whose turn it is."""
        delta = {"role": "assistant", "content": ""}
        one = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}
        return self.frame("chat.completion.chunk", [one])

    def closing(self) -> dict[str, object]:
        """The last piece, where usage was requested."""
        return self.frame("chat.completion.chunk" if self.chat else "text_completion", []) | {"usage": self.usage()}

    def _chat(self, number: int, choice: Choice) -> dict[str, object]:
        return {
            "index": number,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": None if self.top is None else self._chat_logprobs(choice.tokens),
            "finish_reason": choice.ended,
        }

    def _chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, object]:
        return {
            "content": [
                self._one(t.id, t.logprob) | {"top_logprobs": [self._one(i, p) for i, p in t.top]} for t in tokens
            ],
            "refusal": None,
        }

    def _one(self, token: int | None, logprob: float | None) -> dict[str, object]:
        raw = self._bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}

    def _completion(
        self, number: int, text: str, tokens: Sequence[Token], ended: str, before: int
    ) -> dict[str, object]:
        logprobs = None
        if self.top is not None:
            names = [self._name(t.id) for t in tokens]
            offsets, at = [], before
            for name in names:
                offsets.append(at)
                at += len(name)
            logprobs = {
                "tokens": names,
                "token_logprobs": [_finite(t.logprob) for t in tokens],
                "top_logprobs": [{self._name(i): _finite(p) for i, p in t.top} for t in tokens],
                "text_offset": offsets,
            }
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": ended or None}

    def _bytes(self, token: int | None) -> bytes:
        assert token is not None  # only written tokens are kept
        return token_bytes(self.tokenizer, token)

    def _name(self, token: int | None) -> str:
        return self._bytes(token).decode("utf-8", "replace")


def _finite(logprob: float | None) -> float:
    return logprob if logprob is not None and math.isfinite(logprob) else NEVER
