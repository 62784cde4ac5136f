"""Bytes over TCP and over UDP, and what became of them; runs in guests and on the host.

    transfer.py serve             until it is ended; says "ready" first
    transfer.py send ADDRESS ...  to each address; prints a line for each transfer:
                                  protocol, address, SHA-256 of what was sent, of what came

The standard library's smallest part only: a guest has Debian's python3-minimal.

UDP here is go-back-N: a window of datagrams, numbered, is handed to the kernel at once
(UDP_SEGMENT), and the receiver says which number it wants next.
"""

import errno
import hashlib
import os
import select
import socket
import struct
import sys
import time

PORT = 5001
TCP_BYTES = 2 << 20
UDP_BYTES = 1 << 20
UDP_SEGMENT = 103  # linux/udp.h
DATAGRAM = 1400
WINDOW = 40  # datagrams; together less than 64 KiB
HEAD = struct.Struct("!QIIB")  # which transfer, number, how many, whether to answer
ANSWER = struct.Struct("!QI32s")  # which transfer, number wanted, digest at the end
PART = DATAGRAM - HEAD.size
PATIENCE_S = 0.5
GIVE_UP_S = 20.0


def serve():
    listener = socket.create_server(
        ("", PORT), family=socket.AF_INET6, dualstack_ipv6=True
    )
    datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    datagrams.bind(("", PORT))
    say("ready")
    transfer, wanted, digest = None, 0, None
    while True:
        ready, _, _ = select.select([listener, datagrams], [], [])
        if listener in ready:
            take_stream(listener.accept()[0])
        if datagrams in ready:
            data, sender = datagrams.recvfrom(1 << 16)
            begun, number, count, answer = HEAD.unpack_from(data)
            if begun != transfer:
                transfer, wanted, digest = begun, 0, hashlib.sha256()
            if number == wanted:
                digest.update(data[HEAD.size :])
                wanted += 1
            if answer:
                end = digest.digest() if wanted == count else b""
                datagrams.sendto(ANSWER.pack(transfer, wanted, end), sender)


def take_stream(connection):
    """Read to the end and answer with the digest."""
    digest = hashlib.sha256()
    with connection:
        connection.settimeout(GIVE_UP_S)
        while data := connection.recv(1 << 16):
            digest.update(data)
        connection.sendall(digest.digest())


def send(addresses):
    for address in addresses:
        for name, size, how in (
            ("tcp", TCP_BYTES, send_stream),
            ("udp", UDP_BYTES, send_datagrams),
        ):
            data = os.urandom(size)
            came = how(address, data)
            say(name, address, hashlib.sha256(data).hexdigest(), came.hex())


def send_stream(address, data):
    with socket.create_connection((address, PORT), timeout=GIVE_UP_S) as stream:
        stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)
        return stream.recv(32, socket.MSG_WAITALL)


def send_datagrams(address, data):
    transfer = int.from_bytes(os.urandom(8), "big")
    parts = [data[at : at + PART] for at in range(0, len(data), PART)]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    deadline = time.monotonic() + GIVE_UP_S
    wanted = 0
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((address, PORT))
        sock.settimeout(PATIENCE_S)
        while time.monotonic() < deadline:
            window = range(wanted, min(wanted + WINDOW, len(parts)))
            hand_over(
                sock,
                [
                    HEAD.pack(transfer, n, len(parts), n == window[-1]) + parts[n]
                    for n in window
                ],
            )
            try:
                begun, number, digest = ANSWER.unpack(sock.recv(1 << 16))
            except TimeoutError:
                continue
            if begun == transfer:
                wanted = number
            if wanted == len(parts):
                return digest
    sys.exit(f"gave up on {address} at {wanted} of {len(parts)} datagrams")


def hand_over(sock, datagrams):
    try:
        sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, DATAGRAM)
        sock.send(b"".join(datagrams))
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        # Linux 6.1 refuses where the interface does no checksums.
        sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 0)
        for datagram in datagrams:
            sock.send(datagram)


def assert_same(said, addresses):
    """What came is what was sent, to each address by each protocol, as `send` says."""
    lines = [line.split() for line in said.splitlines()]
    wanted = [(how, address) for address in addresses for how in ("tcp", "udp")]
    assert [(how, address) for how, address, _, _ in lines] == wanted
    for _, _, sent, came in lines:
        assert sent == came, said


def say(*words):
    sys.stdout.write(" ".join(words) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    {"serve": serve, "send": lambda: send(sys.argv[2:])}[sys.argv[1]]()
