"""Many requests at once: each is answered once and kept, within a budget, and what is running when the work stops is
still kept."""

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from isthmus.endpoint.client import Endpoint, Reply, Request
from isthmus.endpoint.replies import Replies
from isthmus.errors import ConfigError, EndpointError, ReplyError, as_sentence

_PATIENCE = 5
"""Requests in a row without an answer before the endpoint is given up."""
_TOKENS_PER_BYTE = 0.5
"""Of the first prompt: more than tokenizers make of English."""


@dataclass(kw_only=True)
class Budget:
    """What may be spent on all replies of one file, those of earlier runs among them. Prices are per million tokens.

    No request is sent that could pass the limit together with those that are out: its prompt is reckoned at the most
    tokens per byte met so far (the first one goes alone, to measure it), and its reply at ``max_tokens``.
    """

    price_in: float | None = None
    price_out: float | None = None
    money: float | None = None
    tokens: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unreported: int = 0
    _rate: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        if self.money is not None and (self.price_in is None or self.price_out is None):
            raise ConfigError("A budget of money needs the prices of a million tokens (--price-in and --price-out).")
        for value in (self.price_in, self.price_out, self.money, self.tokens):
            if value is not None and value < 0:
                raise ConfigError("Prices and budgets are not negative.")

    @property
    def cost(self) -> float | None:
        """Of what was reported; none without prices."""
        return self._price(self.prompt_tokens, self.completion_tokens)

    def _price(self, prompt: float, completion: float) -> float | None:
        if self.price_in is None or self.price_out is None:
            return None
        return (prompt * self.price_in + completion * self.price_out) / 1e6

    def add(self, reply: Reply) -> None:
        """Raises EndpointError when there is a limit and the endpoint does not say what a reply took."""
        if reply.prompt_tokens is None or reply.completion_tokens is None:
            self.unreported += 1
            if self.money is not None or self.tokens is not None:
                raise EndpointError(
                    f"The endpoint did not report the tokens of {reply.name}, so no budget can be kept. Leave it "
                    "out, or take an endpoint that reports `usage`."
                )
            return
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens

    def learn(self, request: Request, reply: Reply) -> None:
        """How many tokens a byte of a prompt may take."""
        self._rate = max(self._rate, (reply.prompt_tokens or 0) / max(1, _bytes(request)))

    def allows(self, request: Request, out: Iterable[Request], max_tokens: int) -> bool:
        """Whether this request fits beside those that are ``out``."""
        if self.money is None and self.tokens is None:
            return True
        rate = self._rate or _TOKENS_PER_BYTE
        sent = [request, *out]
        if not self._rate and len(sent) > 1:
            return False
        prompt = self.prompt_tokens + rate * sum(map(_bytes, sent))
        completion = self.completion_tokens + max_tokens * len(sent)
        if self.tokens is not None and prompt + completion > self.tokens:
            return False
        return self.money is None or (self._price(prompt, completion) or 0.0) <= self.money


@dataclass(slots=True)
class Outcome:
    """``failed``: name of a request -> why it has no reply. ``sent`` counts the requests that were answered now, not
    those known before. ``stopped`` says why requests were not sent, empty where all were."""

    sent: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    stopped: str = ""


def send_all(
    endpoint: Endpoint,
    requests: Iterable[Request],
    replies: Replies,
    *,
    concurrency: int = 8,
    budget: Budget | None = None,
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Every request that ``replies`` has no answer to is sent, ``concurrency`` at a time, and its reply kept as soon
    as it comes. ``progress`` gets the number of those that are done, those known before among them.

    Raises EndpointError where going on would be of no use; what was answered is kept.
    """
    if concurrency < 1:
        raise ConfigError(f"concurrency must be at least 1, not {concurrency}.")
    crowd = _Crowd(endpoint, replies, budget or Budget(), progress)
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            for request in requests:
                if not crowd.needs(request):
                    continue
                while len(crowd.out) >= concurrency:
                    crowd.take()
                while not crowd.affordable(request):
                    if not crowd.out:
                        crowd.found.stopped = "the budget is used up"
                        return crowd.found
                    crowd.take()
                crowd.out[pool.submit(endpoint.send, request)] = request
            while crowd.out:
                crowd.take()
        except BaseException:
            crowd.rescue()
            raise
    return crowd.found


class _Crowd:
    """The requests that are out, and what has come of the others."""

    def __init__(
        self, endpoint: Endpoint, replies: Replies, budget: Budget, progress: Callable[[int], None] | None
    ) -> None:
        self.endpoint, self.replies, self.budget, self.progress = endpoint, replies, budget, progress
        self.out: dict[Future[Reply], Request] = {}
        self.found = Outcome()
        self._met: set[str] = set()
        self._in_a_row = 0
        for reply in replies:
            budget.add(reply)

    def needs(self, request: Request) -> bool:
        """Whether it must be sent; one that is known, or was sent already, is only counted."""
        name = self.endpoint.hash(request)
        reply = self.replies.get(name)
        known = reply is not None or name in self._met
        if reply is not None:
            self.budget.learn(request, reply)
        self._met.add(name)
        if known:
            self._report()
        return not known

    def affordable(self, request: Request) -> bool:
        return self.budget.allows(request, self.out.values(), self.endpoint.max_tokens)

    def take(self) -> None:
        """Wait for some of those that are out, and keep what they bring."""
        for future in wait(self.out, return_when=FIRST_COMPLETED).done:
            request = self.out.pop(future)
            try:
                self._keep(future.result(), request)
                self._in_a_row = 0
            except ReplyError as error:
                self.found.failed[request.name] = str(error)
                self._in_a_row += 1
                if self._in_a_row >= _PATIENCE:
                    raise EndpointError(
                        f"{self._in_a_row} requests in a row got no answer; the last: {as_sentence(error)} The same "
                        "command goes on where this one stopped."
                    ) from None
            self._report()

    def _keep(self, reply: Reply, request: Request) -> None:
        self.replies.add(reply)
        self.found.sent += 1
        self.budget.learn(request, reply)
        self.budget.add(reply)

    def _report(self) -> None:
        if self.progress is not None:
            done = len(self._met) - len(self.out)
            self.progress(done)

    def rescue(self) -> None:
        """Keep the replies that are still on their way: they are paid for."""
        for future, request in self.out.items():
            if not future.cancel():
                try:
                    self._keep(future.result(), request)
                except (ReplyError, EndpointError):
                    self.found.failed[request.name] = "given up"


def _bytes(request: Request) -> int:
    return sum(len(str(value).encode()) for message in request.messages for value in message.values())
