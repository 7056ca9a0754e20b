"""One queue of the kernel, over a netlink socket of our own: many packets with one system call, many verdicts with
another. `messages` says what the bytes mean.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from typing import Final

from portward.base.netlink import NETLINK_NETFILTER
from portward.worker.messages import Refused, Verdicts, bind_request, copy_request, read

_SOL_NETLINK: Final = 270
_NETLINK_NO_ENOBUFS: Final = 5
_SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h
# The receive buffer, in bytes of netlink messages: room for some thousands of packets that wait.
RECEIVE_BYTES: Final = 8 << 20
# Bytes of a packet that the kernel copies: IPv4 and TCP headers with all their options take 120, and IPv6
# extension headers rarely more than 200. The rest of a packet stays in the kernel.
COPY_BYTES: Final = 512
# Bytes for one message: the copied bytes and all attributes that the kernel may put before them. A longer message
# is cut off.
SLOT: Final = 1024
# Nothing was received: none waits, a signal interrupted, or a full socket dropped packets, which the kernel
# counts.
_NOTHING: Final = (errno.EAGAIN, errno.EINTR, errno.ENOBUFS)
_TOO_MANY: Final = (errno.ENOBUFS, errno.ENOMEM, errno.EMSGSIZE)


class _Part(ctypes.Structure):
    """struct iovec"""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Header(ctypes.Structure):
    """struct msghdr"""

    _fields_ = (
        ("name", ctypes.c_void_p), ("name_length", ctypes.c_uint), ("parts", ctypes.POINTER(_Part)),
        ("count", ctypes.c_size_t), ("control", ctypes.c_void_p), ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )  # fmt: skip


class _Message(ctypes.Structure):
    """struct mmsghdr"""

    _fields_ = (("header", _Header), ("length", ctypes.c_uint))


_MESSAGE: Final = ctypes.sizeof(_Message)
_LENGTHS = struct.Struct(f"={_Message.length.offset}xI{_MESSAGE - _Message.length.offset - 4}x")


class Queue:
    """A bound queue. A received packet without a verdict keeps its place until the socket is closed. Then the
    kernel drops all packets that wait."""

    def __init__(self, number: int, length: int, batch: int) -> None:
        """Binds the queue `number`, in which `length` packets may wait. At most `batch` of them are received at
        once. Raises OSError: EPERM if another socket has the queue, or without CAP_NET_ADMIN."""
        # Slot i of the buffer, from byte i * SLOT on, holds datagram i of the last batch.
        self.buffer = bytearray(batch * SLOT)
        self._batch = batch
        self._parts = (_Part * batch)()
        self._messages = (_Message * batch)()
        memory = (ctypes.c_char * len(self.buffer)).from_buffer(self.buffer)
        for place, (part, message) in enumerate(zip(self._parts, self._messages, strict=True)):
            part.base, part.length = ctypes.addressof(memory) + place * SLOT, SLOT
            message.header.parts, message.header.count = ctypes.pointer(part), 1
        self._lengths = memoryview(self._messages).cast("B")
        self._recvmmsg = ctypes.CDLL(None, use_errno=True).recvmmsg
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        try:
            self._open(number, length)
        except BaseException:
            self._socket.close()
            raise

    def _open(self, number: int, length: int) -> None:
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BYTES)
        except PermissionError:  # in a user namespace of its own: up to net.core.rmem_max
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        # A full socket drops packets, and the kernel counts them for the queue. ENOBUFS would only interrupt us.
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
        self._socket.bind((0, 0))
        # Only the kernel can send to a socket that is connected to it.
        self._socket.connect((0, 0))
        self._socket.send(bind_request(number, length))
        # The kernel answers before `send` returns, and no packet comes before the next request.
        for answer in read(self._socket.recv(SLOT, socket.MSG_DONTWAIT)):
            if isinstance(answer, Refused) and answer.errno:
                raise OSError(answer.errno, os.strerror(answer.errno))
        self._socket.send(copy_request(number, COPY_BYTES))

    def fileno(self) -> int:
        """The descriptor that is readable when packets wait."""
        return self._socket.fileno()

    def receive(self) -> list[tuple[int]]:
        """Receives up to a batch of packets without blocking. Returns the lengths of the datagrams that are now in
        the slots, in bytes. Raises OSError."""
        count = self._recvmmsg(self._socket.fileno(), self._messages, self._batch, socket.MSG_DONTWAIT, None)
        if count < 0:
            error = ctypes.get_errno()
            if error in _NOTHING:
                return []
            raise OSError(error, os.strerror(error))
        return list(_LENGTHS.iter_unpack(self._lengths[: count * _MESSAGE]))

    def send(self, verdicts: memoryview) -> None:
        """Sends verdicts. The kernel has acted on them when this returns. Raises OSError if the kernel does not
        even take them one by one, because it is out of memory."""
        if not verdicts:  # netlink refuses an empty message; the batch may have held errors alone
            return
        try:
            self._socket.send(verdicts)
        except OSError as error:
            if error.errno not in _TOO_MANY:
                raise
            for start in range(0, len(verdicts), Verdicts.SIZE):
                self._socket.send(verdicts[start : start + Verdicts.SIZE])

    def close(self) -> None:
        """Unbinds the queue. The kernel drops what waits in it."""
        self._socket.close()
