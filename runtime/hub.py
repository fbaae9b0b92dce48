"""Downloads from the Hugging Face hub: every request has a limit, and whatever goes wrong is one message.

The hub's client keeps what has arrived whole, takes no file for whole that is not (it writes aside and compares sizes), and uses its
cache where the hub cannot be reached. But its first request waits for an answer without a limit: a proxy that is silent would have the
run wait for ever. So a limit is put on each request that has none. Files that the hub hands to hf_xet come by that one's own connections.
"""

from __future__ import annotations

from pathlib import Path

from runtime.errors import clean

WAIT_S = 30.0  # for a connection, and for each piece of an answer


class NotHad(Exception):
    """The hub did not give it; says why, and what to do."""


def snapshot(repo: str, **which: object) -> Path:
    """The folder of `repo` in the hub's cache, downloaded first as far as it is not there. `which`: as for `snapshot_download`.

    Raises:
        NotHad: it is not to be had whole.
    """
    from huggingface_hub import snapshot_download

    try:
        _limit()
        return Path(snapshot_download(repo, **which))
    except Exception as error:  # the client raises several families of exceptions; each means "not to be had"
        why = f"{type(error).__name__}: {clean(error) or 'no reason given'}"
        raise NotHad(f"{why}; if the network is at fault, try again: what has arrived whole is kept") from error


def _limit() -> None:
    """Every client that huggingface_hub makes from now on has the limit; it makes a new one after a connection that failed."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http  # the factory that is in use has no public name

    make = _http._GLOBAL_CLIENT_FACTORY
    if getattr(make, "bounded", False):
        return

    def bounded():
        client = make()
        client.event_hooks = client.event_hooks | {"request": [*client.event_hooks["request"], _bounded]}
        return client

    bounded.bounded = True
    set_client_factory(bounded)


def _bounded(request) -> None:
    """A hook of the HTTP client, called before each request."""
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        kind: WAIT_S if limits.get(kind) is None else limits[kind] for kind in ("connect", "read", "write", "pool")
    }
