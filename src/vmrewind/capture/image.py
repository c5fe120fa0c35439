"""A protected disk's image: a raw file, a block device, or the bytes of a qcow2 file, opened, locked, and written.

For qcow2 the guest's QEMU keeps its format driver above the capture; here the file is bytes like any other. Since an NBD export
cannot grow, the file is extended sparsely, once, to hold every cluster and all metadata that the virtual size can need. From then
on it keeps that size, which its base and its records are of.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from typing import Final

from vmrewind.capture.locks import lock_image
from vmrewind.errors import ImageError
from vmrewind.journal.copy_before_write import CopyBeforeWrite, State
from vmrewind.journal.holes import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate
from vmrewind.journal.identity import image_identity
from vmrewind.journal.runs import DiskInfo, ImageIdentity

_BLKGETSIZE64: Final = 0x80081272

_QCOW2: Final = struct.Struct(">4sIQIIQ28xI")
"""magic, version, backing file's offset, backing file's name length, cluster bits, virtual size, number of snapshots."""
_QCOW2_FEATURES_AT: Final = 72
"""Version 3 only: incompatible features, big-endian u64."""
_QCOW2_EXTERNAL_DATA: Final = 1 << 2
_QCOW2_EXTENDED_L2: Final = 1 << 4
_QCOW2_SLACK: Final = 64 << 20
"""Room beyond the computed need, bytes: snapshot tables, bitmaps, relocated refcount tables."""

_ZEROES: Final = bytes(1 << 20)


def _supports(fd: int, mode: int) -> bool:
    try:
        fallocate(fd, mode | KEEP_SIZE, 0, 4096)
    except OSError:
        return False
    return True


def device_size(fd: int) -> int:
    """Bytes of a file or block device."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        buffer = bytearray(8)
        fcntl.ioctl(fd, _BLKGETSIZE64, buffer)
        return int.from_bytes(buffer, "little")
    return os.fstat(fd).st_size


def qcow2_export_size(virtual_size: int, cluster_size: int, file_size: int, *, snapshots: int = 0, entry_size: int = 8) -> int:
    """Bytes that the export of a qcow2 file needs so that it never has to grow.

    Every guest cluster, once more for each internal snapshot that may hold on to it; ``entry_size`` bytes of L2 and at most 8 bytes
    of refcount for each; tables rounded to clusters; some slack.
    """
    clusters = -(-virtual_size // cluster_size) * (1 + snapshots)
    tables = clusters * entry_size + clusters * entry_size * 8 // cluster_size
    refcounts = (clusters + tables // cluster_size) * 8 + cluster_size
    metadata = -(-(tables + refcounts) // cluster_size) * cluster_size
    need = clusters * cluster_size + metadata + _QCOW2_SLACK
    return -(-max(need, file_size) // (1 << 20)) * (1 << 20)


class Image:
    """An open, exclusively locked image. ``size`` is the export's, bytes.

    ``known_size`` is what an earlier run exported. A qcow2 file that its disk still fits into keeps it, whatever internal
    snapshots were made since, and nothing touches the file before ``extend``. Without one, a qcow2 file is extended at once.
    """

    def __init__(self, index: int, target: str, path: str, image_format: str, known_size: int | None = None) -> None:
        self.index = index
        self.target = target
        self.path = path
        self.format = image_format
        self.backing: str | None = None
        self.base: CopyBeforeWrite | None = None
        """The base that is being made of it: what it does not have yet is kept before it is written to."""
        self.fd = _open_locked(path)
        try:
            self.block_device = stat.S_ISBLK(os.fstat(self.fd).st_mode)
            self.size = self._check_format(known_size)
            if known_size is None:
                self.extend()
            self.fast_zero, self.fast_zero_kept = (False, False) if self.block_device else self._fast_zeroes()
        except BaseException:
            os.close(self.fd)
            raise

    def _check_format(self, known_size: int | None) -> int:
        size = device_size(self.fd)
        head = os.pread(self.fd, 104, 0)
        is_qcow2 = head[:4] == b"QFI\xfb"
        if self.format == "raw":
            if size == 0:
                raise ImageError(f"{self.path}: the image is empty", "create it with its size first, e.g. truncate -s 20G")
            if size % 512:
                raise ImageError(f"{self.path}: {size} bytes is not a whole number of 512-byte sectors", "extend the image")
            return size
        if not is_qcow2:
            raise ImageError(f"{self.path}: not a qcow2 image", 'set format = "raw" for this disk')
        _, version, backing_at, backing_length, cluster_bits, virtual_size, snapshots = _QCOW2.unpack_from(head.ljust(104, b"\0"))
        if version not in (2, 3) or not 9 <= cluster_bits <= 21:
            raise ImageError(f"{self.path}: qcow2 version {version} with {cluster_bits} cluster bits is not known")
        if backing_at and backing_length <= 1023:
            self.backing = os.pread(self.fd, backing_length, backing_at).decode(errors="surrogateescape")
        features = int.from_bytes(head[_QCOW2_FEATURES_AT : _QCOW2_FEATURES_AT + 8], "big") if version == 3 else 0
        if features & _QCOW2_EXTERNAL_DATA:
            raise ImageError(
                f"{self.path}: its data is in another file, which would go unprotected", "convert it: qemu-img convert"
            )
        if self.block_device:
            return size
        entry_size = 16 if features & _QCOW2_EXTENDED_L2 else 8
        if known_size is not None:
            least = qcow2_export_size(virtual_size, 1 << cluster_bits, size, entry_size=entry_size)
            if size <= known_size and least <= known_size:
                return known_size
        needed = qcow2_export_size(virtual_size, 1 << cluster_bits, size, snapshots=snapshots, entry_size=entry_size)
        return max(size, needed)

    def extend(self) -> None:
        """Make a qcow2 file as long as its export, which costs no space; raises ImageError."""
        if self.block_device or os.fstat(self.fd).st_size >= self.size:
            return
        try:
            os.ftruncate(self.fd, self.size)
        except OSError as error:
            raise ImageError(
                f"{self.path}: cannot be extended to {self.size} bytes: {error.strerror}",
                "its file system must allow files of that size; they take no more space than before",
            ) from error

    def _fast_zeroes(self) -> tuple[bool, bool]:
        """Whether the image's file system zeroes a range without writing it: (as a hole, allocated).

        Asked of a nameless file beside it: the image's own mtime tells whether somebody touched it, and even an operation that
        changes nothing would change that.
        """
        try:
            fd = os.open(os.path.dirname(os.path.realpath(self.path)), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:
            return False, False
        try:
            return _supports(fd, PUNCH_HOLE), _supports(fd, ZERO_RANGE)
        finally:
            os.close(fd)

    @property
    def info(self) -> DiskInfo:
        """How a run describes this disk."""
        return DiskInfo(self.index, self.target, self.size, self.format, self.path, self.backing)

    def identity(self) -> ImageIdentity:
        """The image's identity now; raises ImageError if the device cannot be synced."""
        try:
            return image_identity(self.fd, self.path)
        except OSError as error:
            raise ImageError(f"{self.path}: cannot be synced: {error.strerror}", "repair what it lies on") from error

    def length(self) -> int:
        """Bytes that the file or device has now: less than ``size`` if somebody cut it short."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    def replaced(self) -> bool:
        """Whether the path leads to another file by now, or to none: what is written here then ends with this process."""
        try:
            there, here = os.stat(self.path), os.fstat(self.fd)
        except OSError:
            return True
        return (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino)

    @property
    def keeps(self) -> bool:
        """Whether old content is kept before it is written over, for a base that is being made."""
        return self.base is not None and self.base.state is State.MAKING

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of ``data``; raises OSError."""
        if self.base is not None:
            self.base.keep(self.fd, ((offset, len(data)),))
        written = os.pwrite(self.fd, data, offset)
        if written != len(data):
            view = memoryview(data)
            while written < len(view):
                written += os.pwrite(self.fd, view[written:], offset + written)

    def read(self, length: int, offset: int) -> bytes:
        """``length`` bytes; raises OSError, EIO where the image was cut short."""
        parts = []
        while length:
            part = os.pread(self.fd, length, offset)
            if not part:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)

    def zero(self, offset: int, length: int, *, keep_allocated: bool) -> None:
        """Make a range read as zeroes, as a hole unless ``keep_allocated``; raises OSError."""
        if self.base is not None:
            self.base.keep(self.fd, ((offset, length),))
        modes = [ZERO_RANGE | KEEP_SIZE]
        if not keep_allocated:
            modes.insert(0, PUNCH_HOLE | KEEP_SIZE)
        for mode in modes:
            try:
                fallocate(self.fd, mode, offset, length)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV, errno.ENOSYS):
                    raise
            else:
                return
        end = offset + length
        while offset < end:
            step = min(len(_ZEROES), end - offset)
            self.write(memoryview(_ZEROES)[:step], offset)
            offset += step

    def allocation(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """(length, is data) of consecutive extents covering the range; a hole reads as zeroes."""
        end = min(offset + length, self.size)
        while offset < end:
            try:
                data = os.lseek(self.fd, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    yield end - offset, True
                    return
                data = end
            if data > offset:
                hole_end = min(data, end)
                yield hole_end - offset, False
                offset = hole_end
                continue
            try:
                data_end = min(os.lseek(self.fd, offset, os.SEEK_HOLE), end)
            except OSError:
                data_end = end
            yield data_end - offset, True
            offset = data_end

    def sync(self) -> None:
        """Bring every write to stable storage; raises OSError."""
        os.fdatasync(self.fd)

    def sync_identity(self) -> None:
        """Bring the modification time to stable storage too, so that ``identity`` stays true; raises OSError."""
        os.fsync(self.fd)

    def renew_identity(self) -> None:
        """Give the image, durably, another modification time: whoever knows it by an earlier one must not recognise it."""
        if not self.block_device:
            os.utime(self.fd)
            os.fsync(self.fd)

    def close(self) -> None:
        """Close, which gives the lock up."""
        if self.base is not None:
            self.base.close()
        os.close(self.fd)


def _open_locked(path: str) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        if stat.S_ISBLK(os.stat(path).st_mode):
            # For block devices O_EXCL asks the kernel whether a mounted file system or a volume group has it.
            flags |= os.O_EXCL
        fd = os.open(path, flags)
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such image", "check the path in the VM's configuration") from error
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise ImageError(f"{path}: the device is in use (mounted, or part of a volume)", "unmount it first") from error
        raise ImageError(f"{path}: cannot be opened: {error.strerror}") from error
    try:
        if not (stat.S_ISREG(os.fstat(fd).st_mode) or stat.S_ISBLK(os.fstat(fd).st_mode)):
            raise ImageError(f"{path}: neither a file nor a block device")
        lock_image(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd
