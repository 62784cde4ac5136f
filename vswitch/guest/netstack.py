"""A very small network stack on a guest: ARP, ping, and a checked transfer over UDP.

Enough to show that guests reach each other and the host where QEMU is not at hand.

    with NetStack(guest, "10.0.0.1") as stack:
        print(stack.ping("10.0.0.2"))

A transfer numbers its datagrams; the receiver acknowledges the first one it still needs,
the sender goes back to it when nothing is heard (go-back-N). At the end the receiver
sends the hash of what it has. Not here: TCP, IP fragments and options, IPv6, and UDP
checksums, which IPv4 leaves optional.
"""

import hashlib
import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from vswitch.guest.errors import GuestError
from vswitch.guest.guest import Guest

_BROADCAST: Final = b"\xff" * 6
_ETHER: Final = struct.Struct("!6s6sH")
_ARP: Final = struct.Struct("!HHBBH6s4s6s4s")
_IP: Final = struct.Struct("!BBHHHBBH4s4s")
_ICMP: Final = struct.Struct("!BBHHH")  # type, code, checksum, identifier, sequence
_UDP: Final = struct.Struct("!HHHH")  # source, destination, length, checksum
_OURS: Final = struct.Struct("!cIII")  # kind, transfer, number, datagrams in all
_TYPE_IP, _TYPE_ARP = 0x0800, 0x0806
_PROTOCOL_ICMP, _PROTOCOL_UDP = 1, 17
_ECHO_REPLY, _ECHO = 0, 8
_ARP_REQUEST, _ARP_REPLY = 1, 2
_PORT: Final = 5001
_CHUNK: Final = 1400
_WINDOW: Final = 64  # datagrams on the way
_RESEND_S: Final = 0.2
_POLL_S: Final = 0.05


def checksum(data: bytes) -> int:
    """The Internet checksum, RFC 1071."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class NetStack:
    """One address on a guest's device, answered by a thread while in `with`."""

    def __init__(self, guest: Guest, ip: str) -> None:
        self.ip = ip
        self.received: list[bytes] = []  # complete transfers
        self._guest, self._address = guest, socket.inet_aton(ip)
        self._neighbours: dict[bytes, bytes] = {}
        self._echoes: dict[int, float] = {}  # sequence -> when its reply came
        self._acked: dict[int, int] = {}  # transfer -> first number still needed
        self._digests: dict[int, bytes] = {}
        self._arriving: dict[tuple[bytes, int], list[bytes]] = {}
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._send_lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve, name=f"netstack {ip}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def ping(self, ip: str, count: int = 3, timeout: float = 1.0) -> list[float | None]:
        """Round-trip times in milliseconds; None where no answer came."""
        mac = self._resolve(ip, timeout)
        return [self._echo(mac, ip, timeout) for _ in range(count)]

    def _echo(self, mac: bytes, ip: str, timeout: float) -> float | None:
        number = next(self._numbers) & 0xFFFF
        begin = time.perf_counter()
        self._send_icmp(mac, socket.inet_aton(ip), _ECHO, 1, number, bytes(48))
        came = self._wait(lambda: number in self._echoes, timeout)
        return (self._echoes.pop(number) - begin) * 1000 if came else None

    def transfer(self, ip: str, data: bytes, timeout: float = 30.0) -> str:
        """Send `data` to the stack at `ip`; the SHA-256 (hex) of what it received.

        Raises:
            GuestError: It was not complete in time.
        """
        deadline = time.monotonic() + timeout
        mac, peer = self._resolve(ip, timeout), socket.inet_aton(ip)
        transfer = next(self._numbers)
        chunks = [data[at : at + _CHUNK] for at in range(0, len(data), _CHUNK)] or [b""]
        self._acked[transfer] = 0
        sent = 0
        while transfer not in self._digests:
            base = self._acked[transfer]
            for number in range(max(base, sent), min(base + _WINDOW, len(chunks))):
                head = _OURS.pack(b"D", transfer, number, len(chunks))
                self._send_udp(mac, peer, head + chunks[number])
                sent = number + 1
            if not self._progress(transfer, base):
                sent = base
            if time.monotonic() > deadline:
                raise GuestError(
                    f"{ip} has {base} of {len(chunks)} datagrams after {timeout} s"
                )
        return self._digests.pop(transfer).hex()

    def _progress(self, transfer: int, base: int) -> bool:
        """Whether the receiver soon needs something behind `base`."""

        def heard() -> bool:
            return transfer in self._digests or self._acked[transfer] > base

        return self._wait(heard, _RESEND_S)

    def _resolve(self, ip: str, timeout: float) -> bytes:
        address = socket.inet_aton(ip)
        deadline = time.monotonic() + timeout
        while address not in self._neighbours:
            self._send_arp(_ARP_REQUEST, _BROADCAST, address)
            self._wait(lambda: address in self._neighbours, _RESEND_S)
            if time.monotonic() > deadline:
                raise GuestError(f"nobody says they are {ip}")
        return self._neighbours[address]

    def _wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    # --- the thread -------------------------------------------------------------------

    def _serve(self) -> None:
        while not self._stopping.is_set():
            for frame in self._guest.receive(timeout=_POLL_S):
                self._frame(frame)

    def _frame(self, frame: bytes) -> None:
        if len(frame) < _ETHER.size:
            return
        dst, src, kind = _ETHER.unpack_from(frame)
        body = frame[_ETHER.size :]
        if dst not in (self._guest.mac, _BROADCAST):
            return
        if kind == _TYPE_ARP and len(body) >= _ARP.size:
            self._arp(body)
        elif kind == _TYPE_IP and len(body) >= _IP.size:
            head = _IP.unpack_from(body)
            protocol, length, peer = head[6], head[2], head[8]
            if head[9] == self._address and checksum(body[: _IP.size]) == 0:
                self._datagram(src, peer, protocol, body[_IP.size : length])

    def _arp(self, body: bytes) -> None:
        operation, mac, ip, _, wanted = _ARP.unpack_from(body)[4:]
        with self._changed:
            self._neighbours[ip] = mac
            self._changed.notify_all()
        if operation == _ARP_REQUEST and wanted == self._address:
            self._send_arp(_ARP_REPLY, mac, ip)

    def _datagram(self, mac: bytes, peer: bytes, protocol: int, body: bytes) -> None:
        if protocol == _PROTOCOL_ICMP and len(body) >= _ICMP.size:
            kind, _, _, identifier, number = _ICMP.unpack_from(body)
            if checksum(body) != 0:
                return
            if kind == _ECHO:
                payload = body[_ICMP.size :]
                self._send_icmp(mac, peer, _ECHO_REPLY, identifier, number, payload)
            elif kind == _ECHO_REPLY:
                with self._changed:
                    self._echoes[number] = time.perf_counter()
                    self._changed.notify_all()
        elif (
            protocol == _PROTOCOL_UDP
            and len(body) >= _UDP.size + _OURS.size
            and _UDP.unpack_from(body)[1] == _PORT
        ):
            self._transfer_part(mac, peer, body[_UDP.size :])

    def _transfer_part(self, mac: bytes, peer: bytes, body: bytes) -> None:
        kind, transfer, number, total = _OURS.unpack_from(body)
        rest = body[_OURS.size :]
        if kind == b"D":
            chunks = self._arriving.setdefault((peer, transfer), [])
            complete = len(chunks) == total
            if number == len(chunks) and not complete:
                chunks.append(rest)
            head = _OURS.pack(b"A", transfer, len(chunks), total)
            digest = b""
            if len(chunks) == total:
                digest = hashlib.sha256(b"".join(chunks)).digest()
                if not complete:
                    self.received.append(b"".join(chunks))
            self._send_udp(mac, peer, head + digest)
        elif kind == b"A" and transfer in self._acked:
            with self._changed:
                self._acked[transfer] = max(self._acked[transfer], number)
                if number == total:
                    self._digests[transfer] = rest
                self._changed.notify_all()

    # --- sending ----------------------------------------------------------------------

    def _send(self, dst: bytes, kind: int, body: bytes) -> None:
        frame = _ETHER.pack(dst, self._guest.mac, kind) + body
        with self._send_lock:
            self._guest.send_all(frame.ljust(60, b"\0"))

    def _send_arp(self, operation: int, mac: bytes, ip: bytes) -> None:
        target = bytes(6) if operation == _ARP_REQUEST else mac
        ours = (self._guest.mac, self._address)
        body = _ARP.pack(1, _TYPE_IP, 6, 4, operation, *ours, target, ip)
        self._send(mac, _TYPE_ARP, body)

    def _send_ip(self, mac: bytes, peer: bytes, protocol: int, body: bytes) -> None:
        fields = [0x45, 0, _IP.size + len(body), 0, 0, 64, protocol, 0]
        fields[7] = checksum(_IP.pack(*fields, self._address, peer))
        head = _IP.pack(*fields, self._address, peer)
        self._send(mac, _TYPE_IP, head + body)

    def _send_icmp(
        self,
        mac: bytes,
        peer: bytes,
        kind: int,
        identifier: int,
        number: int,
        payload: bytes,
    ) -> None:
        fields = [kind, 0, 0, identifier, number]
        fields[2] = checksum(_ICMP.pack(*fields) + payload)
        self._send_ip(mac, peer, _PROTOCOL_ICMP, _ICMP.pack(*fields) + payload)

    def _send_udp(self, mac: bytes, peer: bytes, payload: bytes) -> None:
        head = _UDP.pack(_PORT, _PORT, _UDP.size + len(payload), 0)
        self._send_ip(mac, peer, _PROTOCOL_UDP, head + payload)
