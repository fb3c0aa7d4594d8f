"""Addresses permitted for outgoing connections: public unicast ones, by an explicit list.

`ipaddress.is_global` differs between Python versions and says nothing about addresses that carry
another one, so the blocks are written out here. Sources: IANA's special-purpose registries for IPv4
and IPv6.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from reft_serve.errors import RateLimited

__all__ = ["LOOKUPS", "LOOKUPS_PER_TENANT", "Address", "Resolver", "is_public"]

Address = IPv4Address | IPv6Address
LOOKUPS = 32
LOOKUPS_PER_TENANT = 4
_BLOCKED_4 = tuple(
    IPv4Network(block)
    for block in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "168.63.129.16/32",  # the host of a virtual machine at Azure
    )
)
# Only this block is global unicast; within it, Teredo and the rest of 2001::/23, documentation and
# 6to4 are not.
_UNICAST_6 = IPv6Network("2000::/3")
_BLOCKED_6 = tuple(
    IPv6Network(block) for block in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
)
# A translator of the network leads from here to the IPv4 address in the last 32 bits.
_TRANSLATED = IPv6Network("64:ff9b::/96")


def is_public(address: Address) -> bool:
    """True if an address is a public unicast address. An IPv6 address that carries an IPv4 one is
    public if it is mapped or of the well-known NAT64 prefix, and the IPv4 address is. In any other
    form (6to4, Teredo, compatible) it is not.
    """
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address in _TRANSLATED:
            address = IPv4Address(int(address) & 0xFFFFFFFF)
    if isinstance(address, IPv4Address):
        return not any(address in block for block in _BLOCKED_4)
    return (
        address.scope_id is None
        and address in _UNICAST_6
        and not any(address in block for block in _BLOCKED_6)
    )


class Resolver:
    """Look-ups of names that tenants set, in dedicated threads: the system's resolver blocks, and a
    name server can be silent for a minute.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(LOOKUPS, "reft-resolver")
        self._under_way: Counter[str] = Counter()

    async def addresses(self, tenant_id: str, host: str, port: int) -> list[Address]:
        """The addresses of a name, in the system's order of preference.

        Raises:
            RateLimited: LOOKUPS_PER_TENANT look-ups of this tenant have no answer yet.
            OSError: there is no such name.
        """
        if self._under_way[tenant_id] >= LOOKUPS_PER_TENANT:
            raise RateLimited("too many webhook host names are being resolved; try again", 5.0)
        self._under_way[tenant_id] += 1
        loop = asyncio.get_running_loop()
        looking = loop.run_in_executor(self._threads, _look_up, host, port)
        # Not when the caller gives up: the thread is taken until the resolver answers.
        looking.add_done_callback(lambda _: self._forget(tenant_id))
        return await asyncio.shield(looking)

    def _forget(self, tenant_id: str) -> None:
        self._under_way[tenant_id] -= 1
        if not self._under_way[tenant_id]:
            del self._under_way[tenant_id]

    def close(self) -> None:
        """Start no more look-ups."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _look_up(host: str, port: int) -> list[Address]:
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ip_address(str(entry[4][0])) for entry in entries]
