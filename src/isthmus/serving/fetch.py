"""The one function that fetches something from another machine because a request says so.

Off unless hosts are named. The address is parsed once, its host looked up once per hop, every address found is
checked, and the connection goes to an address that was checked, never to a name that is looked up again.
"""

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urljoin, urlsplit

from isthmus.errors import DataError

REDIRECTS = 3
CHUNK = 64 * 2**10
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"(?!-)[a-z0-9-]{1,63}(?:\.(?!-)[a-z0-9-]{1,63})+")
_URL = re.compile(r"[!#-;=?-\[\]_a-z~]+", re.IGNORECASE)
_REFUSED = [
    ipaddress.ip_network(block)
    for block in (
        "100.64.0.0/10",  # carrier-grade NAT
        "192.88.99.0/24",  # 6to4 relays
        "::/96",  # v4-compatible
        "64:ff9b::/96",  # NAT64
        "64:ff9b:1::/48",  # NAT64, local use
        "2001::/32",  # Teredo
        "2002::/16",  # 6to4
        "fec0::/10",  # site-local
    )
]


Resolved = tuple[object, object, object, object, tuple[object, ...]]
"""An entry of what the socket module finds for a host: the last one is the address, an IP address first."""


class RefusedError(DataError):
    """An address that may not be fetched, or that did not give what was requested."""


@dataclass(frozen=True, slots=True)
class Remote:
    """Which hosts may be fetched from, and how much and how long.

    ``hosts`` are names in full, nothing below them. ``resolve`` and ``connect`` are those of the socket module.
    """

    hosts: frozenset[str]
    size: int
    seconds: float = 10.0
    resolve: Callable[..., Sequence[Resolved]] = field(default=socket.getaddrinfo)
    connect: Callable[..., socket.socket] = field(default=socket.create_connection)


def fetch(url: str, remote: Remote) -> bytes:
    """What ``url`` gives, at most ``remote.size`` bytes within ``remote.seconds``, over at most REDIRECTS redirects.

    Raises RefusedError: a scheme other than http and https, a host that is not named in ``remote``, a host any of
    whose addresses is not public, anything but status 200, too much, too late.
    """
    ends = time.monotonic() + remote.seconds
    for _ in range(REDIRECTS + 1):
        scheme, host, target = _parsed(url, remote.hosts)
        try:
            address = _checked(host, _PORTS[scheme], remote)
            status, place, body = _get(scheme, host, address, target, remote, ends)
        except RefusedError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise RefusedError("the host cannot be reached, or does not speak HTTP") from error
        if status == 200:
            return body
        if status not in (301, 302, 303, 307, 308) or not place:
            raise RefusedError("the host does not give this address")
        url = urljoin(url, place)
    raise RefusedError("too many redirects")


def _parsed(url: str, hosts: frozenset[str]) -> tuple[str, str, str]:
    """Scheme, host and target of an address that is written plainly."""
    if not _URL.fullmatch(url) or "\\" in url:
        raise RefusedError("the address holds characters that no address has")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise RefusedError("the address cannot be understood") from None
    host = parts.netloc.lower()
    if parts.scheme not in _PORTS:
        raise RefusedError("only http and https are fetched")
    if port is not None and host == f"{parts.hostname}:{_PORTS[parts.scheme]}":
        host = host.rpartition(":")[0]
    if not is_host(host) or host not in hosts:
        raise RefusedError("the host is not among those that are allowed")
    return parts.scheme, host, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def is_host(name: str) -> bool:
    """Whether this is a host's name in full, in small letters, and no address."""
    return _HOST.fullmatch(name) is not None and not name.rpartition(".")[2].isdigit()


def _checked(host: str, port: int, remote: Remote) -> tuple[str, int]:
    """An address of the host, all of whose addresses are public."""
    found = [str(entry[4][0]) for entry in remote.resolve(host, port, type=socket.SOCK_STREAM)]
    if not found or not all(is_public(address) for address in found):
        raise RefusedError("the host's address is not a public one")
    return found[0], port


def is_public(address: str) -> bool:
    """Whether an IP address lies in the public internet, by itself and by the IPv4 address it may hold."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # with a scope, or no address at all
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        return is_public(str(ip.ipv4_mapped))
    refused = any(ip in block for block in _REFUSED if block.version == ip.version)
    return ip.is_global and not (refused or ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def _get(
    scheme: str, host: str, address: tuple[str, int], target: str, remote: Remote, ends: float
) -> tuple[int, str | None, bytes]:
    """Status, redirect and body of one GET over a connection to ``address``, which speaks for ``host``."""
    raw = sock = remote.connect(address, timeout=_left(ends))
    # A host that drips its headers keeps every single read within the timeout; this ends them all together.
    alarm = threading.Timer(_left(ends) + 0.01, _hang_up, [raw])
    alarm.daemon = True
    alarm.start()
    try:
        if scheme == "https":
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        connection = http.client.HTTPConnection(host)
        connection.sock = sock
        connection.request("GET", target, headers={"Accept": "image/*", "Connection": "close"})
        response = connection.getresponse()
        body = b""
        if response.status == 200:
            if response.getheader("Content-Encoding", "identity") != "identity":
                raise RefusedError("the host gives a compressed answer, which was not requested")
            body = _body(response, sock, remote.size, ends)
        return response.status, response.getheader("Location"), body
    finally:
        alarm.cancel()
        sock.close()


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _body(response: http.client.HTTPResponse, sock: socket.socket, size: int, ends: float) -> bytes:
    body = b""
    while True:
        sock.settimeout(_left(ends))
        piece = response.read1(CHUNK)
        if not piece:
            _left(ends)  # the end may be that of the time, not of the body
            if response.length:
                raise RefusedError("the host gives less than it announced")
            return body
        body += piece
        if len(body) > size:
            raise RefusedError("the host gives more than a picture may have")


def _left(ends: float) -> float:
    left = ends - time.monotonic()
    if left <= 0:
        raise RefusedError("the host takes too long")
    return left
