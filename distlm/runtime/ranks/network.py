"""Errors of the network between ranks, told apart from all others, and which machine an address means."""

import socket
import sys

import psutil

from distlm.errors import EXIT_STOPPED, DistlmError

_GONE = ("closed by peer", "reset by peer", "Broken pipe", "pair closure", "remote process exited")
"""How gloo and NCCL say that the other end of a connection is gone."""
_UNREACHED = (
    "Connection refused", "Connection reset", "Connection timed out", "No route to host", "Network is unreachable",
    "Host is unreachable", "connectFullMesh", "Timed out", "timed out", "Socket Timeout", "failed to recv",
    "unhandled system error", "remote error", "Broken pipe", "gloo/transport",
)  # fmt: skip
_OWN_FAULT = ("invalid usage", "invalid argument", "Duplicate GPU", "no kernel image", "out of memory")
"""Of what torch.distributed raises: the settings or the machine, not the network."""


class Unreached(DistlmError):
    """Ranks lost their connection or never had one. Run again, it may work: what is complete is kept."""

    exit_code = EXIT_STOPPED


def of_network(error: BaseException) -> bool:
    """Whether the network between the ranks failed, or the rank at its other end, and not what was asked of it."""
    text = str(error)
    if isinstance(error, DistlmError) or any(words in text for words in _OWN_FAULT):
        return isinstance(error, Unreached)
    if _of_torch(error):
        return True
    return isinstance(error, RuntimeError) and any(words in text for words in (*_GONE, *_UNREACHED))


def network_error(error: BaseException, doing: str) -> Unreached:
    """What the user is told of it; `doing`: what a rank could not do."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    made = Unreached(
        f"{doing}: {first}; the network between the nodes failed or a rank ended (see the other ranks' logs). Complete "
        "work is kept: run the same command again to continue"
    )
    made.__cause__ = error
    return made


def is_here(host: str) -> bool:
    """Whether a host name or address means this machine."""
    if host in ("localhost", socket.gethostname(), socket.gethostname().partition(".")[0]):
        return True
    mine = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    return any(address in mine or address.startswith("127.") for address in addresses_of(host))


def addresses_of(host: str) -> list[str]:
    """What a name leads to; empty where it leads nowhere."""
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except OSError:
        return []


def _of_torch(error: BaseException) -> bool:
    # Not imported for this: what torch raised, torch is there for.
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and isinstance(error, dist.DistError)
