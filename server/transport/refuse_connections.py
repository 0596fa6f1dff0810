"""Lets a socket that listens take no new connection, while those that were begun before can still be made and accepted.

Closing such a socket resets every connection that was made and not accepted, requests and all. So the system is first told not to
hear the first packet of new ones: their clients try again a second later, when the socket is closed, and hear that it is. Linux
can do that; elsewhere a connection of just this moment may be reset.
"""

import contextlib
import ctypes
import socket
import struct
import sys

SO_ATTACH_FILTER = 26
PROGRAM = (
    (0x30, 0, 0, 13),  # load the byte of the TCP header that holds the flags
    (0x45, 0, 1, 0x02),  # is it a SYN?
    (0x06, 0, 0, 0),  # then drop it
    (0x06, 0, 0, 0xFFFFFFFF),  # else take all of it
)
"""Classic BPF, as in Linux's Documentation/networking/filter.rst: code, jump if true, jump if false, operand."""


def refuse_connections(listening: socket.socket) -> None:
    """Takes no new connections; those whose handshake has begun are still made."""
    if sys.platform != "linux":
        return
    code = b"".join(struct.pack("HBBI", *each) for each in PROGRAM)
    buffer = ctypes.create_string_buffer(code, len(code))
    with contextlib.suppress(OSError):  # a kernel without filters: better a rare reset than no end
        listening.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(PROGRAM), ctypes.addressof(buffer)))
