"""Which network interface the ranks of several machines talk over.

The surprise: gloo offers the others whatever this machine's own name resolves to, and Debian and many containers
resolve it to 127.0.1.1. So the interface is named to gloo, and to NCCL with it: the one that reaches the first machine.
"""

import ipaddress
import os
import socket
from collections.abc import Iterator, MutableMapping
from pathlib import Path

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
"""Where gloo and NCCL read the interface; a value that the user has set wins, gloo's for both."""
_ROUTES = Path("/proc/net/route")


def choose_interface(environment: MutableMapping[str, str] | None = None) -> str:
    """Name the interface to gloo and NCCL by their variables; returns it, "" where there is nothing to choose.

    To be called before the process group forms. On one machine nothing is chosen. Raises ValueError where no interface
    of this machine leads to the first one.
    """
    variables = os.environ if environment is None else environment
    world, here = (int(variables.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world == here or "MASTER_ADDR" not in variables:
        return ""
    found = variables.get(GLOO) or _towards(variables["MASTER_ADDR"])
    variables[GLOO] = found
    variables.setdefault(NCCL, f"={found}")  # = means this very name, not all that begin so
    return found


def _towards(host: str) -> str:
    """The interface that this machine reaches `host` through; on `host` itself, the one that has its address."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: the kernel chooses a route and with it our own address
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise ValueError(
            f"{socket.gethostname()} does not reach the first machine, {host}: {error.strerror or error}; give its "
            f"address, or the name of this machine's interface as {GLOO}"
        ) from error
    if not ipaddress.ip_address(own.partition("%")[0]).is_loopback:
        return next(name for name, of_it in addresses() if of_it == own.partition("%")[0])
    # The first machine's name means loopback on the machine itself. What the others see of it cannot be told from here.
    return _only_way_out(host)


def _only_way_out(host: str) -> str:
    outside = sorted({name for name, address in addresses() if not ipaddress.ip_address(address).is_loopback})
    default = default_route()
    if len(outside) == 1 or default in outside:
        return default if default in outside else outside[0]
    has = f"the interfaces {', '.join(outside)}" if outside else "no other interface"
    raise ValueError(
        f"{host}, the first machine's name, means loopback on {socket.gethostname()}, which has {has}: give the "
        f"address that the other machines reach it by instead of its name, or the interface as {GLOO}"
    )


def addresses() -> Iterator[tuple[str, str]]:
    """(interface, address) of every address of the interfaces that are up."""
    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if name in up and entry.family in (socket.AF_INET, socket.AF_INET6):
                yield name, entry.address.partition("%")[0]


def default_route() -> str:
    """The interface of the default route; "" without one."""
    try:
        lines = _ROUTES.read_text().splitlines()[1:]
    except OSError:
        return ""
    return next((words[0] for words in map(str.split, lines) if words[1] == words[7] == "00000000"), "")
