"""The scheduler: one thread that computes, a fair queue before it, and texts decoded together.

    submit -> queue (bounded, fair among clients) -> begin -> step, step, ... -> events of the request

All of a server's computing happens in this one thread, a token of every running text at a time; calls (vectors,
scores) take their turn between two tokens. Requests live in the event loop and hear by events.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from isthmus.data.record import Example
from isthmus.data.words import Words
from isthmus.language import Decoding
from isthmus.model import Model
from isthmus.serving import errors
from isthmus.serving.engine import Speaker, Token, speaker_of
from isthmus.serving.errors import ApiError, answer_to
from isthmus.serving.limits import Limits
from isthmus.serving.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Said:
    """A step of one choice: ``text`` that can be shown now (perhaps none), ``token`` that was written (perhaps none,
    at the end), ``ended`` why nothing follows."""

    choice: int
    text: str
    token: Token | None
    ended: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """What a call returned."""

    value: object


Event = Said | Found | ApiError


@dataclass(eq=False, slots=True, kw_only=True)
class Ticket:
    """One request before the scheduler. ``hear`` is called from the computing thread with each event."""

    client: str
    model: str
    hear: Callable[[Event], None]
    deadline: float
    arrived: float = field(default_factory=time.monotonic)
    waiting: int = 0
    started: bool = False
    over: bool = False


@dataclass(eq=False, slots=True)
class Text:
    """One text to be written: a choice of a request, and the row of its speaker."""

    ticket: Ticket
    choice: int
    example: Example
    decoding: Decoding
    words: Words
    top: int | None


@dataclass(eq=False, slots=True)
class Call:
    """Something to be computed, a piece between two tokens of the texts; its last value is the answer."""

    ticket: Ticket
    pieces: Iterator[object]
    value: object = None


Work = Text | Call


class Scheduler:
    """Start it with :meth:`start`; every method but that may be called from any thread."""

    def __init__(self, models: Mapping[str, Model], limits: Limits, metrics: Metrics) -> None:
        self.models, self.limits, self.metrics = dict(models), limits, metrics
        self.speakers: dict[str, Speaker] = {
            name: speaker_of(model, limits) for name, model in models.items() if "generate" in model.capabilities
        }
        self._lock = threading.Condition()
        self._queue: OrderedDict[str, deque[Work]] = OrderedDict()
        self._waiting: dict[str, int] = {}
        self._rows: dict[str, dict[Text, None]] = {name: {} for name in self.speakers}
        self._gone: list[Ticket] = []
        self._call: Call | None = None
        self._stopping = False
        self.draining = False
        self._thread = threading.Thread(target=self._run, name="isthmus-scheduler", daemon=True)

    # From the event loop

    def start(self) -> None:
        self._thread.start()

    @property
    def takes_requests(self) -> bool:
        return not (self.draining or self._stopping)

    def stop(self) -> None:
        """What still waits or runs is answered that the server stops; the thread ends."""
        with self._lock:
            self._stopping = True
            self._lock.notify()
        self._thread.join(timeout=30)

    def reserve(self, client: str, model: str, hear: Callable[[Event], None], units: int = 1) -> Ticket:
        """A place in the queue, before anything is prepared. Raises ApiError when there is none."""
        with self._lock:
            if not self.takes_requests:
                raise errors.stopping()
            total, own = sum(self._waiting.values()), self._waiting.get(client, 0)
            # Alone in the queue, even a request of more texts than half of it may wait.
            if total + units > self.limits.queue or (own and own + units > self.limits.queue // 2):
                raise errors.busy()
            ticket = Ticket(
                client=client, model=model, hear=hear, deadline=time.monotonic() + self.limits.deadline, waiting=units
            )
            self._waiting[client] = own + units
            self._note_queue()
            return ticket

    def submit(self, ticket: Ticket, work: list[Work]) -> None:
        """Work of a ticket, as many pieces as were reserved."""
        with self._lock:
            if ticket.over:
                return
            assert len(work) == ticket.waiting
            self._queue.setdefault(ticket.client, deque()).extend(work)
            self._lock.notify()

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for it any more: what was written stays unheard, and no further token is."""
        with self._lock:
            if not ticket.over:
                self._end(ticket)
                self._gone.append(ticket)
                self.metrics.cancelled.inc()
                self._lock.notify()

    def _end(self, ticket: Ticket) -> None:
        """With the lock held: the ticket takes no place in the queue any more."""
        ticket.over = True
        self._unwait(ticket, ticket.waiting)

    def _unwait(self, ticket: Ticket, units: int) -> None:
        ticket.waiting -= units
        left = self._waiting.get(ticket.client, 0) - units
        if left > 0:
            self._waiting[ticket.client] = left
        else:
            self._waiting.pop(ticket.client, None)
        self._note_queue()

    def _note_queue(self) -> None:
        self.metrics.queue.set(sum(self._waiting.values()))

    # In the computing thread

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (self._stopping or self._gone or self._queue or self._busy()):
                    self._lock.wait()
                stopping = self._stopping
                gone, self._gone = self._gone, []
            if stopping:
                self._fail_everything(errors.stopping())
                return
            for ticket in gone:
                self._drop(ticket)
            self._late()
            for work in self._take():
                self._begin(work)
            self._piece()
            for name in self.speakers:
                if self._rows[name]:
                    self._step(name)

    def _busy(self) -> bool:
        return self._call is not None or any(self._rows.values())

    def _piece(self) -> None:
        """The next piece of the call whose turn it is."""
        call = self._call
        if call is None:
            return
        if call.ticket.over:
            self._call = None
            return
        try:
            call.value = next(call.pieces)
        except StopIteration:
            self._call = None
            self._tell(call.ticket, Found(call.value))
            with self._lock:
                self._end(call.ticket)
        except Exception as error:
            self._call = None
            self._fail(call.ticket, answer_to(error))

    def _take(self) -> list[Work]:
        """What starts now: texts while their model has room, and one call, the clients in turn."""
        taken: list[Work] = []
        room = {name: speaker.room() for name, speaker in self.speakers.items()}
        called = self._call is not None
        with self._lock:
            progress = True
            while progress:
                progress = False
                for client in list(self._queue):
                    waiting = self._queue[client]
                    while waiting and waiting[0].ticket.over:
                        waiting.popleft()
                    if not waiting:
                        del self._queue[client]
                        continue
                    work = waiting[0]
                    if isinstance(work, Call):
                        fits, called = not called, True
                    else:
                        fits = room[work.ticket.model] > 0
                        room[work.ticket.model] -= fits
                    if not fits:
                        continue
                    taken.append(waiting.popleft())
                    self._unwait(work.ticket, 1)
                    self._queue.move_to_end(client)
                    progress = True
        return taken

    def _begin(self, work: Work) -> None:
        if work.ticket.over:
            return
        if isinstance(work, Call):
            self._call = work
            return
        name = work.ticket.model
        try:
            self.speakers[name].begin(work, work.example, work.decoding, work.top)
        except Exception as error:
            self._fail(work.ticket, answer_to(error))
            return
        self._rows[name][work] = None
        self.metrics.running.labels(name).set(len(self._rows[name]))

    def _step(self, name: str) -> None:
        rows = self._rows[name]
        self.metrics.batch.labels(name).observe(len(rows))
        try:
            tokens = self.speakers[name].step()
        except Exception as error:  # all rows were in it; the next ones start afresh
            broken = answer_to(error)
            for text in list(rows):
                self._fail(text.ticket, broken)
            self.speakers[name] = speaker_of(self.models[name], self.limits)
            return
        for token in tokens:
            text = token.row
            if isinstance(text, Text) and text in rows:
                self._say(name, text, token)

    def _say(self, name: str, text: Text, token: Token) -> None:
        """Hand a token on as text, and end the row where the text ends."""
        ticket, said = text.ticket, ""
        if token.id is not None:
            said = text.words.push(token.id)
            self.metrics.tokens.labels(name, "written").inc()
            if not ticket.started:
                ticket.started = True
                self.metrics.first.labels(name).observe(time.monotonic() - ticket.arrived)
        ended = "stop" if text.words.stopped else token.ended
        if ended:
            said += text.words.end()
            self._forget(name, text)
        self._tell(ticket, Said(text.choice, said, token if token.id is not None else None, ended))
        if ended and not self._left(ticket):
            with self._lock:
                self._end(ticket)

    def _left(self, ticket: Ticket) -> bool:
        """Whether any text of a ticket is still to be written."""
        return ticket.waiting > 0 or any(text.ticket is ticket for text in self._rows[ticket.model])

    def _forget(self, name: str, text: Text) -> None:
        self.speakers[name].drop(text)
        self._rows[name].pop(text, None)
        self.metrics.running.labels(name).set(len(self._rows[name]))

    def _drop(self, ticket: Ticket) -> None:
        for name, rows in self._rows.items():
            for text in [t for t in rows if t.ticket is ticket]:
                self._forget(name, text)

    def _fail(self, ticket: Ticket, error: ApiError) -> None:
        self._tell(ticket, error)
        with self._lock:
            self._end(ticket)
        self._drop(ticket)

    def _late(self) -> None:
        now = time.monotonic()
        for ticket in {w.ticket: None for w in self._everything() if w.ticket.deadline < now and not w.ticket.over}:
            self._fail(ticket, errors.too_late())

    def _everything(self) -> Iterator[Work]:
        with self._lock:
            waiting = [work for queue in self._queue.values() for work in queue]
        yield from waiting
        if self._call is not None:
            yield self._call
        for rows in self._rows.values():
            yield from list(rows)

    def _fail_everything(self, error: ApiError) -> None:
        for ticket in {w.ticket: None for w in self._everything() if not w.ticket.over}:
            self._fail(ticket, error)

    @staticmethod
    def _tell(ticket: Ticket, event: Event) -> None:
        if not ticket.over:
            ticket.hear(event)
