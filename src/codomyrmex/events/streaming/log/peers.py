"""The processes that have one log's file open: whose turn it is to write, and a bell at each door.

A turn is a lock on a file, which the operating system hands to those who wait in the order in
which they came, and takes back from a process that was killed. Whoever is alone keeps it, so that
a log which only one process uses pays nothing for it. A bell is a FIFO that its process reads:
whoever has written rings all others, and nobody has to look again and again.
"""

import contextlib
import errno
import mmap
import os
import secrets
import selectors
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any, Final

from ..errors import LogFull, LogUnusable

fcntl: Any
try:
    import fcntl
except ImportError:  # pragma: no cover - on Windows
    fcntl = None

__all__ = ["Peers"]

_PATIENCE: Final = 30.0
"""Seconds after which a process that does not end its turn is not waited for any more."""

_LAST_PATIENCE: Final = 2.0
"""Seconds for which it is waited for after that is unwanted."""

_LULL: Final = 1.0
"""Seconds without a ring after which a process that has others beside it looks for itself: one may
have been killed after it wrote and before it could ring."""

_SIZE: Final = 40
"""Bytes of the file that all share, which is mapped into memory: five numbers of 64 bits."""

_GENERATION, _LAST, _BYTES, _CHANGES, _HOLDER = range(5)
"""What they are: another number whenever one comes or goes; the position of the last record, and
how many bytes there are until then; how often a note was changed; which process had the last turn.
"""


class Peers:
    """This process among those that have the file open. For the thread that writes.

    That thread has SIGPIPE blocked, with which a program that has not ignored it as Python does
    would end when it rings one that was killed.

    Args:
        path: the file. Beside it stand one that is locked (``-lock``) and a directory of bells.
        heard: called in a thread of its own when another process rang, or none did for a while
            (True): one second where there are others.
        attentive: says whether anybody here wants to know when another process has written.
            Otherwise nobody listens while there are others, until `attend`.
        lull: seconds for which none has to ring where there are no others; None: for ever.
    """

    def __init__(
        self,
        path: Path,
        heard: Callable[[bool], object],
        attentive: Callable[[], bool | None] = lambda: True,
        lull: float | None = None,
    ) -> None:
        self._path = path
        self._heard = heard
        self._attentive = attentive
        self._attention = threading.Event()
        self._lull = lull
        self._process = os.getpid()
        self._lock = -1
        self._shared = memoryview(bytearray(_SIZE)).cast("Q")
        self._generation = 0
        self._bell: Path | None = None
        self._reading = self._own = -1  # both ends of this process's bell
        self._others: dict[str, int] = {}  # of other processes' bells the end that is written
        self._has_turn = False
        self._awaited = -1  # what is locked when the turn comes
        self._unwanted: Future[None] = Future()
        self._listener: threading.Thread | None = None
        self._left = False

    @property
    def last(self) -> int:
        """The position of the last record, as whoever wrote it has said."""
        return self._shared[_LAST]

    @property
    def bytes_until(self) -> int:
        """How many bytes all records up to that one had. In a turn: two numbers are not one."""
        return self._shared[_BYTES]

    @property
    def changes(self) -> int:
        """How often a note was changed, modulo 2**64."""
        return self._shared[_CHANGES]

    @property
    def alone(self) -> bool:
        """Whether there was no other process when this one last looked."""
        return not self._others

    @property
    def changed(self) -> bool:
        """Whether one has come or gone since this one last looked."""
        return self._shared[_GENERATION] != self._generation

    # Coming and going.

    def join(self) -> None:
        """Come in, and have this process's bell heard.

        Raises:
            LogFull: there is no room for the files beside the log's.
            LogUnusable: they cannot be made.
        """
        lock = f"{self._path}-lock"
        try:
            with open(lock, "a+b", 0) as file:
                if os.fstat(file.fileno()).st_size < _SIZE:
                    # Written, for what is only mapped ends the process where the disk is full.
                    file.write(bytes(_SIZE))
                self._shared = memoryview(mmap.mmap(file.fileno(), _SIZE)).cast("Q")
            # Opened again: what is mapped has a copy of its descriptor, and would keep the lock.
            self._lock = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            self._check_room(error)
            raise LogUnusable(self._path, f"it cannot be written: {error}") from error
        try:
            self._hang_bell(Path(f"{self._path}-bells"))
        except OSError as error:
            self._check_room(error)
            return  # this file system has no FIFOs: it is one process at a time here
        self._listener = threading.Thread(
            target=self._listen, name="codomyrmex-streaming log bell", daemon=True
        )
        self._listener.start()
        self._shared[_GENERATION] = secrets.randbits(64)
        self._look_around()
        self._ring()  # whoever was alone has to let go of its turn

    def _check_room(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LogFull(self._path) from error

    def _hang_bell(self, directory: Path) -> None:
        if fcntl is None:  # pragma: no cover - on Windows
            raise OSError(errno.ENOSYS, "no FIFOs")
        directory.mkdir(exist_ok=True)
        name = f"{self._process}-{secrets.token_hex(4)}"
        hidden, bell = directory / f".{name}", directory / name
        os.mkfifo(hidden)
        hidden.chmod(0o622)  # another user's process may have to ring it
        self._reading = os.open(hidden, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        # With this end open here too it never seems that the last of the others had gone.
        self._own = os.open(hidden, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        hidden.rename(bell)  # a bell that others can see is heard by somebody
        self._bell = bell

    def leave(self) -> None:
        """Go, and let others write. Again does nothing."""
        self.leave_soon()
        if self._listener is None:
            self._go()
        else:
            self._listener.join()

    def leave_soon(self) -> None:
        """`leave`, but without waiting until it is done."""
        self._left = True
        if self._process == os.getpid():  # pragma: no branch - or in a forked child
            self._wake_listener()

    def _go(self) -> None:
        if self._bell is not None:
            self._bell.unlink(missing_ok=True)
            self._shared[_GENERATION] = secrets.randbits(64)
            self._bell = None
        if self._has_turn and fcntl is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # a child may have a copy of its descriptor
        self._close(self._lock, self._reading, self._own, *self._others.values())
        self._lock = self._reading = self._own = -1  # with the lock goes the turn
        self._shared = memoryview(bytes(self._shared.cast("B"))).cast("Q")  # as it was
        self._others.clear()
        self._has_turn = False

    def abandon(self) -> None:  # pragma: no cover - in a forked child, where nothing is measured
        """In a forked child: let go of what is the parent's, which otherwise seems to live on."""
        self._close(self._lock, self._awaited, self._reading, self._own, *self._others.values())

    def _wake_listener(self) -> None:
        with contextlib.suppress(OSError):  # it has gone
            self._stroke(self._own)
        self._attention.set()

    @staticmethod
    def _stroke(bell: int) -> None:
        if bell >= 0:
            with contextlib.suppress(BlockingIOError):  # it has been rung many times already
                os.write(bell, b"!")

    @staticmethod
    def _close(*descriptors: int) -> None:
        for each in descriptors:
            if each >= 0:
                with contextlib.suppress(OSError):
                    os.close(each)

    # Turns.

    def take_turn(self) -> bool:
        """Wait until no other process is writing.

        Returns:
            Whether others may have written since this one's last turn.

        Raises:
            LogUnusable: another process does not end its turn.
        """
        if self._has_turn:
            return False
        try:
            is_taken = fcntl is None or self._lock_at_once() or self._lock_in_time()
        except OSError as error:
            raise LogUnusable(self._path, f"it cannot be locked: {error}") from error
        if not is_taken:
            raise LogUnusable(
                self._path,
                f"it is in use: process {self._shared[_HOLDER]} has had its turn to write for"
                f" {_PATIENCE:g} s, and may hang",
            )
        self._has_turn = True
        self._shared[_HOLDER] = self._process
        return True

    def _lock_at_once(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _lock_in_time(self) -> bool:
        """Wait for the lock, in a thread: there is no other way to stop waiting for it."""
        # Opened for itself: what comes too late is then not this one's, and is closed.
        lock = os.open(f"{self._path}-lock", os.O_RDWR | os.O_CLOEXEC)
        turn: Future[None] = Future()
        self._awaited = lock

        def wait() -> None:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if turn.set_running_or_notify_cancel():
                turn.set_result(None)
            else:
                os.close(lock)

        threading.Thread(target=wait, name="codomyrmex-streaming log turn", daemon=True).start()
        wait_for([turn, self._unwanted], _PATIENCE, FIRST_COMPLETED)
        if self._unwanted.done():
            wait_for([turn], _LAST_PATIENCE)  # what is left to be written, is, if it can
        self._awaited = -1
        if turn.cancel():
            return False
        turn.result()
        os.close(self._lock)
        self._lock = lock
        return True

    def wait_no_more(self) -> None:
        """Have `take_turn` fail rather than wait for long, from now on. From any thread."""
        if not self._unwanted.done():
            self._unwanted.set_result(None)

    def end_turn(self) -> None:
        """Let others write, if there are any."""
        if self._has_turn and self._bell is not None:
            if self.changed:
                self._look_around()
            if self._others:
                self._has_turn = False
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    # Bells.

    def say_last(self, position: int, bytes_until: int) -> None:
        """Let others know where the last record is. In a turn."""
        self._shared[_LAST], self._shared[_BYTES] = position, bytes_until
        self._ring()

    def say_changed(self) -> None:
        """Let others know that a note was changed. In a turn."""
        self._shared[_CHANGES] = (self._shared[_CHANGES] + 1) % (1 << 64)
        self._ring()

    def _look_around(self) -> None:
        """See who else is there now."""
        self._generation = self._shared[_GENERATION]
        assert self._bell is not None
        try:
            found = os.listdir(self._bell.parent)
        except FileNotFoundError:  # somebody has removed the directory: those known are there
            found = list(self._others)
        names = {name for name in found if not name.startswith(".")}
        for name in names - self._others.keys() - {self._bell.name}:
            bell = self._bell.parent / name
            try:
                self._others[name] = os.open(bell, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError:
                pass  # it has just gone
            except OSError as error:
                if error.errno == errno.ENXIO:  # nobody hears it: its process was killed
                    bell.unlink(missing_ok=True)
                else:
                    self._others[name] = -1  # another user's, perhaps: it is there, and looks
        for name in self._others.keys() - names:
            self._close(self._others.pop(name))
        self._wake_listener()  # for what it waits depends on it

    def _ring(self) -> None:
        for name, bell in tuple(self._others.items()):
            try:
                self._stroke(bell)
            except BrokenPipeError:  # nobody hears it any more: its process was killed
                self._close(self._others.pop(name))
                assert self._bell is not None
                (self._bell.parent / name).unlink(missing_ok=True)
                self._wake_listener()

    def _listen(self) -> None:
        """Hear the bell. In a thread of its own, which closes it."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._reading, selectors.EVENT_READ)
            while not self._left:
                self._attention.clear()
                if self.alone or self._attentive():
                    is_rung = bool(selector.select(self._lull if self.alone else _LULL))
                    if is_rung:
                        os.read(self._reading, 4096)
                else:
                    is_rung = self._attention.wait(_LULL)
                if not self._left:
                    self._heard(not is_rung)
        self._go()

    def attend(self) -> None:
        """Somebody here wants to know now when another process has written. From any thread."""
        self._attention.set()
