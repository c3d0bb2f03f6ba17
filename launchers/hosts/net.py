"""What a front asks of the network before it starts anything: is a host this machine, is a port free, does ssh work."""

import errno
import ipaddress
import re
import shlex
import socket
import subprocess
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from distlm.errors import DistlmError, UsageError
from distlm.runtime.ranks.network import addresses_of, is_here

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
"""BatchMode: no question is asked, because nobody would see it."""
_NO_PYTHON, _NO_FOLDER = 41, 42


def require_address(host: str) -> None:
    """UsageError when a host name leads nowhere from here."""
    if not addresses_of(host):
        raise UsageError(f"host {host}: its name cannot be resolved on {socket.gethostname()}; correct it in the hosts")


def address_towards(host: str) -> str:
    """This machine's address on the way to `host`; empty where it cannot be found out."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # Connecting a datagram socket sends nothing: it only chooses the route.
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def subnet_towards(host: str) -> str:
    """Network, in CIDR form, of the interface by which `host` is reached: nodes may name their interfaces differently.

    Empty where it cannot be found out.
    """
    here = address_towards(host)
    for addresses in psutil.net_if_addrs().values():
        for each in addresses:
            if each.address == here and each.netmask:
                return str(ipaddress.ip_network(f"{here}/{each.netmask}", strict=False))
    return ""


def choose_port(asked: int, key: str, master: str, only_one_front: bool) -> int:
    """Port of the master: `asked`, or one derived from `key` (job or run directory), so that starts do not collide.

    Where the master is this machine the port is tried, and a derived one moves on when it is taken, unless other fronts
    must derive the same. Raises DistlmError when the port is taken.
    """
    # Below the ephemeral range, which begins at 32768.
    first = asked or 20000 + zlib.crc32(key.encode()) % 10000
    if not is_here(master):
        return first
    for port in [first] if asked or not only_one_front else range(first, first + 100):
        if _free(port):
            return port
    raise DistlmError(
        f"master port {first} on {socket.gethostname()} is taken by another program; give --master-port "
        f"a free one from 20000 to 32767{'' if only_one_front else ', the same on all nodes'}"
    )


def check_hosts(hosts: Sequence[str], python: str, folder: Path) -> None:
    """Log in to every host at once and look for this Python and for `folder`.

    Raises one DistlmError that names the hosts where ssh fails, where Python is missing, or that do not see the folder.
    """
    look = (
        f"test -x {shlex.quote(python)} || exit {_NO_PYTHON}; test -r {shlex.quote(str(folder))} || exit {_NO_FOLDER}"
    )

    def ask(host: str) -> str:
        try:
            done = subprocess.run(
                [*SSH, host, look], capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL
            )
        except FileNotFoundError:
            return "ssh is not installed here; use --via slurm or --via no_ssh"
        except subprocess.TimeoutExpired:
            return f"{host}: ssh gives no answer within 30 s"
        if done.returncode == 0:
            return ""
        known = {
            _NO_PYTHON: f"{python} is not there; use one installation that all nodes see",
            _NO_FOLDER: f"{folder} is not there; put run_dir= on a file system that all nodes mount",
        }
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return f"{host}: {known.get(done.returncode, f'ssh without a password fails ({said})')}"

    with ThreadPoolExecutor(max_workers=32) as pool:
        faults = list(dict.fromkeys(filter(None, pool.map(ask, hosts))))
    if faults:
        more = f" (and {len(faults) - 5} hosts more)" if len(faults) > 5 else ""
        raise DistlmError("; ".join(faults[:5]) + more)


def shell_safe(text: str) -> bool:
    """Whether a text passes through the shells and lists of the launchers as it is."""
    return re.fullmatch(r"[\w@%+=:./-]*", text, re.ASCII) is not None


def _free(port: int) -> bool:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # As the rendezvous does it: a port whose last connections are just closing counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            return False
        raise
    return True
