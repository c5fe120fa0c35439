"""An image that is completed while a VM runs on it: capture is never asked for a place there that was not copied yet."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.capture_tools import Client, first_difference
from vmrewind.capture.dirty import granule_of
from vmrewind.errors import SpaceError
from vmrewind.history.view import Extent
from vmrewind.nbd import protocol as nbd
from vmrewind.recover import filling as filling_module
from vmrewind.recover.export_server import ExportServer
from vmrewind.recover.filling import Filling
from vmrewind.recover.scratch import Overlay
from vmrewind.start.listening import listen

SIZE = (8 << 20) + 512
GRANULE = granule_of(SIZE)


class Moment:
    """A view of data with holes in it."""

    def __init__(self, chance: random.Random) -> None:
        self.size = SIZE
        content = bytearray(SIZE)
        for at in range(0, SIZE, 1 << 20):
            content[at : at + (600 << 10)] = chance.randbytes(min(600 << 10, SIZE - at))
        self.content = bytes(content)

    def read(self, offset: int, length: int) -> bytes:
        return self.content[offset : offset + length]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.content[offset : offset + len(buffer)]

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        end = offset + length if length is not None else SIZE
        while offset < end:
            border = (offset >> 20 << 20) + (600 << 10)
            stop = min(end, border if offset < border else (offset >> 20) + 1 << 20)
            yield Extent(offset, stop - offset, zero=offset >= border)
            offset = stop


class Capture:
    """What capture does to the image, and what it must find there; now and then the image refuses."""

    size = SIZE

    def __init__(self, image: Path, model: bytearray, chance: random.Random) -> None:
        self.image = image
        self.model = model
        self.wrong: list[str] = []
        self.flushes = 0
        self._chance = chance

    def write(self, offset: int, data: memoryview) -> None:
        low, high = offset // GRANULE * GRANULE, min(-(-(offset + len(data)) // GRANULE) * GRANULE, SIZE)
        with self.image.open("r+b", buffering=0) as file:
            if first_difference(os.pread(file.fileno(), high - low, low), bytes(self.model[low:high])) is not None:
                self.wrong.append(f"write {offset}+{len(data)}")
            if self._chance.random() < 0.2:
                os.pwrite(file.fileno(), data[:512], offset)
                self.model[offset : offset + 512] = data[:512]
                raise OSError(errno.ENOSPC, "full")
            os.pwrite(file.fileno(), data, offset)
        self.model[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int) -> None:
        first, last = -(-offset // GRANULE) * GRANULE, (offset + length) // GRANULE * GRANULE
        low, high = offset // GRANULE * GRANULE, min(-(-(offset + length) // GRANULE) * GRANULE, SIZE)
        edges = [(low, high)] if first > last else [(low, first), (last, high)]
        with self.image.open("r+b", buffering=0) as file:
            for start, end in edges:
                if first_difference(os.pread(file.fileno(), end - start, start), bytes(self.model[start:end])) is not None:
                    self.wrong.append(f"zero {offset}+{length}")
            if self._chance.random() < 0.2:
                # Journaled as the image holds it, which is what counts from then on.
                self.model[offset : offset + length] = os.pread(file.fileno(), length, offset)
                raise OSError(errno.ENOSPC, "full")
            os.pwrite(file.fileno(), bytes(length), offset)
        self.model[offset : offset + length] = bytes(length)

    def flush(self) -> None:
        self.flushes += 1


Overlay.register(Capture)


@pytest.mark.parametrize("seed", range(6))
def test_capture_never_finds_what_was_not_copied_yet(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where one piece of a long trim is refused, the next ones are not sent.
    monkeypatch.setattr(filling_module, "_ZEROES_MAX", 4 * GRANULE)
    chance = random.Random(seed)
    moment = Moment(chance)
    model = bytearray(moment.content)
    capture = Capture(tmp_path / "image", model, chance)
    listeners = listen(tmp_path / "c", None), listen(tmp_path / "s", None)
    beneath = ExportServer({"vda": capture}, listeners[0], lambda _: None)  # type: ignore[dict-item]
    beneath.start()
    filling = Filling(moment, tmp_path / "image", "vda", tmp_path / "c", lambda _: None)  # type: ignore[arg-type]
    server = ExportServer({"vda": filling}, listeners[1], lambda _: None)
    server.start()
    stop = threading.Event()
    try:
        with Client(tmp_path / "s") as client:
            copying = threading.Thread(target=filling.fill, args=(stop, lambda _done, _total: stop.wait(0.005)))
            copying.start()
            for _ in range(150):
                length = chance.choice((512, 4096, GRANULE, 3 * GRANULE + 512, 13 * GRANULE))
                offset = chance.randrange(0, SIZE - length + 1, 512)
                what = chance.random()
                if what < 0.4:
                    client.error(nbd.CMD_WRITE, offset, data=chance.randbytes(length))
                elif what < 0.7:
                    client.error(chance.choice((nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES)), offset, length)
                elif what < 0.75:
                    client.flush()
                assert first_difference(client.read(offset, length), bytes(model[offset : offset + length])) is None
            flushes = capture.flushes
            client.flush()
            assert capture.flushes == flushes + 1
            copying.join()
        assert capture.wrong == []
        assert first_difference((tmp_path / "image").read_bytes(), bytes(model)) is None
    finally:
        stop.set()
        filling.abandon()
        server.stop()
        beneath.stop()
        filling.close()
        for listener in listeners:
            listener.close()


def test_an_image_without_room_is_an_error_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = Moment(random.Random(1))
    filling = Filling(moment, tmp_path / "image", "vda", tmp_path / "nobody", lambda _: None)  # type: ignore[arg-type]
    write = os.pwrite
    left = 4 << 20

    def full(fd: int, data: memoryview, offset: int) -> int:
        nonlocal left
        if len(data) > left:
            raise OSError(errno.ENOSPC, "full")
        left -= len(data)
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(SpaceError, match="no space left"):
        filling.fill(threading.Event(), lambda *_: None)
    left = 0
    with pytest.raises(OSError, match="full"):
        # Its surroundings are not there, so capture, which is not even running here, is not asked.
        filling.write(7 << 20, memoryview(bytes(512)))
    left = SIZE
    filling.fill(threading.Event(), lambda *_: None)
    assert first_difference((tmp_path / "image").read_bytes(), moment.content) is None
    filling.close()
