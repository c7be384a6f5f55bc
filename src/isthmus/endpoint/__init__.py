"""Language models behind an OpenAI-compatible endpoint: instruction data and judges. Nothing here is contacted unless
its URL was named.

    client.py   one request and its reply, through the ``openai`` client (extra ``endpoint``)
    replies.py  an append-only file of replies by request hash, which survives ``kill -9``
    crowd.py    many requests at once, each answered once, within a budget
"""

from isthmus.endpoint.client import Endpoint, Reply, Request
from isthmus.endpoint.crowd import Budget, Outcome, send_all
from isthmus.endpoint.replies import Replies

__all__ = ["Budget", "Endpoint", "Outcome", "Replies", "Reply", "Request", "send_all"]
