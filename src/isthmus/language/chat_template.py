"""A chat template in Jinja, rendered in transformers' sandbox within a time limit; nothing else of a folder is run."""

import ctypes
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from isthmus.errors import DataError

SECONDS = 2.0
"""Longest time a template may take for one conversation; published ones take about a millisecond."""


class TemplateTimeoutError(DataError):
    """A template that ran past its time."""


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, object]],
    names: Mapping[str, str],
    *,
    prompt: bool,
    seconds: float = SECONDS,
) -> str:
    """What transformers makes of ``messages`` by ``template``, up to the answer where it is a ``prompt``; ``names`` are
    the special tokens by name. Raises DataError for a template that refuses them, is no Jinja or does not end."""
    from transformers.utils.chat_template_utils import render_jinja_template

    own: dict[str, Any] = dict(names)  # the template's own words, beside the function's
    try:
        with _within(seconds):
            found, _ = render_jinja_template(
                [[dict(message) for message in messages]],
                chat_template=template,
                add_generation_prompt=prompt,
                **own,
            )
    except TemplateTimeoutError:
        raise TemplateTimeoutError(
            f"the chat template did not end within {seconds:g} s; it may loop for ever"
        ) from None
    except Exception as error:  # whatever a template raises
        said = (str(error).strip().splitlines() or ["no more is said"])[0]
        raise DataError(f"the chat template refuses this: {type(error).__name__}: {said[:200]}") from error
    return found[0]


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raises TemplateTimeoutError in this thread when the block takes longer. Python code alone can be stopped so, as
    a template is; a signal would reach the main thread only."""
    thread, lock, over = threading.get_ident(), threading.Lock(), False

    def stop() -> None:
        with lock:
            if not over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread), ctypes.py_object(TemplateTimeoutError)
                )

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            over = True
        timer.cancel()
