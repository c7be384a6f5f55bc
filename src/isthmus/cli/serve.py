"""``isthmus serve``: models behind an API that existing clients speak."""

import ipaddress
import logging
import os
import threading
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from rich.console import Console

from isthmus.cli.options import Loading
from isthmus.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    import uvicorn

    from isthmus.model import Model
    from isthmus.serving.fetch import Remote

KEY = "ISTHMUS_API_KEY"
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Bounds(TypedDict, total=False):
    """Those fields of :class:`isthmus.serving.limits.Limits` that have an option."""

    rows: int
    queue: int
    deadline: float


def run(
    named: Sequence[str],
    *,
    host: str,
    port: int,
    domains: Sequence[str],
    limits: Bounds,
    log_requests: bool,
    given: Loading,
    browse: bool = False,
    pictures: Path | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; with ``browse`` a browser shows the page. ``given``: further arguments of
    :func:`isthmus.load`; ``pictures``: a folder that may be searched.
    """
    needs_extra()
    from isthmus.serving.api import create_app
    from isthmus.serving.limits import Limits
    from isthmus.serving.run import bound, server

    console, bounds = Console(emoji=False), Limits(**limits)
    with bound(host, port) as sockets:
        port = sockets[0].getsockname()[1]
        models = opened(named, given)
        key, local = os.environ.get(KEY) or None, _is_loopback(host)
        app = create_app(
            models,
            limits=bounds,
            remote=remote(domains, bounds.picture),
            key=key,
            hosts=_LOOPBACK if local else None,
            places={name: folder(place) for name, place in places(named).items()},
            pictures=pictures,
        )
        logging.basicConfig(
            format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO if log_requests else "WARN"
        )
        shown = f"[{host}]" if ":" in host else host
        console.print(f"Serving {', '.join(models)} at http://{shown}:{port}/v1", markup=False, highlight=False)
        console.print(f"The page: http://{shown}:{port}/", markup=False, highlight=False)
        if not local and key is None:
            warning = f"Everybody who reaches {host} may use it. Set {KEY} to require a key."
            console.print(warning, markup=False, highlight=False)
        running = server(app, host, port, bounds, log_requests=log_requests)
        if browse:
            threading.Thread(target=_browse, args=(running, f"http://{shown}:{port}/"), daemon=True).start()
        running.run(sockets)


def _browse(running: "uvicorn.Server", address: str) -> None:
    """Open the address as soon as the server listens."""
    while not running.started:
        if running.should_exit:
            return
        time.sleep(0.05)
    webbrowser.open(address)


def needs_extra() -> None:
    """Raises MissingExtraError, before any model is opened, when a package of the extra ``serve`` is missing."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        text = f"Serving needs the package {error.name}: install the extra with `pip install 'isthmus[serve]'`."
        raise MissingExtraError(text) from None


def opened(named: Sequence[str], given: Loading) -> dict[str, "Model"]:
    """The models by id, see :func:`places`."""
    from isthmus.opening import load

    return {name: load(place, **given) for name, place in places(named).items()}


def places(named: Sequence[str]) -> dict[str, str]:
    """What to open, by id: ``NAME=MODEL``, else the last component of MODEL's path; none named: those of the package.

    Raises ConfigError for one id given twice.
    """
    from isthmus.pretrained import SCHEME, names, shipped

    if not named:
        named = [f"{SCHEME}{name}" for name in names()] or [str(shipped(f"{SCHEME}llava"))]
    found: dict[str, str] = {}
    for each in named:
        name, place = _identified(each)
        if name in found:
            raise ConfigError(f"{found[name]} and {place} would both be called {name!r}; name one: NAME={place}.")
        found[name] = place
    return found


def folder(place: str) -> Path:
    """Where a MODEL is, if it is on this disk; a folder ``model`` of a run counts as the run."""
    from isthmus.pretrained import SCHEME, shipped

    found = shipped(place) if place.startswith(SCHEME) else Path(place)
    return found.parent if found.name == "model" and (found.parent / "run.json").is_file() else found


def _identified(named: str) -> tuple[str, str]:
    name, sign, place = named.partition("=")
    if sign and name and not Path(named).exists():
        return name, place
    return Path(named.rpartition(":")[2] if named.startswith("isthmus:") else named).resolve().name, named


def remote(domains: Sequence[str], size: int) -> "Remote | None":
    """What pictures may be fetched from; none without a host. Raises ConfigError for what is no host's name."""
    from isthmus.serving.fetch import Remote, is_host

    hosts = [domain.lower().rstrip(".") for domain in domains]
    for host in hosts:
        if not is_host(host):
            raise ConfigError(f"--allow-image-domain takes a host's name such as images.example.org, not {host!r}.")
    return Remote(frozenset(hosts), size) if hosts else None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
