"""The guest that writes: numbered files with fsync on ext4, each acknowledged on the serial console.

After ``ACK <n>`` file n is on stable storage as far as the guest can tell, so a disk taken back to any later moment
holds it, complete. ``ERR ...`` is an error that the guest met; there must never be one. Numbers go on after what the
disk already holds. Parameters are words of the kernel's command line, see :func:`append`.
"""

from __future__ import annotations

import re
from pathlib import Path

from guests.initramfs import initramfs

SCRIPT = """\
count=100 kib=16 pause_ms=0 disks=vda
for word in $(cat /proc/cmdline); do
    case $word in
        writer.count=*) count=${word#*=} ;;
        writer.kib=*) kib=${word#*=} ;;
        writer.pause_ms=*) pause_ms=${word#*=} ;;
        writer.disks=*) disks=$(echo ${word#*=} | tr , ' ') ;;
    esac
done
n=0
for disk in $disks; do
    mkdir -p /mnt/$disk
    mount -t ext4 /dev/$disk /mnt/$disk || { echo "ERR mount $disk"; exit 1; }
    last=$(ls /mnt/$disk | grep '^file-' | tail -n 1)
    last=$(echo ${last#file-} | sed 's/^0*//')
    [ "${last:-0}" -gt $n ] && n=$last
done
trap 'stop=1' TERM
echo "WRITING from $((n + 1))"
end=$((n + count))
stop=
while [ -z "$stop" ]; do
    [ $count -gt 0 ] && [ $n -ge $end ] && break
    n=$((n + 1))
    name=$(printf %08d $n)
    for disk in $disks; do
        yes "$name $disk -----------------------------------------------" 2>/dev/null | head -c $((kib * 1024)) |
            dd of=/mnt/$disk/file-$name bs=64k iflag=fullblock conv=fsync 2>/tmp/dd ||
            { echo "ERR write $n $disk: $(cat /tmp/dd)"; exit 1; }
    done
    echo "ACK $n"
    [ $pause_ms -gt 0 ] && usleep $((pause_ms * 1000))
done
for disk in $disks; do umount /mnt/$disk || echo "ERR umount $disk"; done
echo "DONE $n"
"""


AGENT = """\
for port in /sys/class/virtio-ports/*; do
    [ "$(cat $port/name)" = org.qemu.guest_agent.0 ] || continue
    qemu-ga -m virtio-serial -p /dev/${port##*/} -t /tmp -f /tmp/qemu-ga.pid &
done
"""


def writer_initramfs(cache: Path | None = None, *, agent: bool = False) -> Path:
    """The writer's initramfs; with ``agent`` the guest agent runs beside the writer, on its channel."""
    if agent:
        return initramfs(AGENT + SCRIPT, ("virtio_console",), cache, ("qemu-ga",))
    return initramfs(SCRIPT, cache=cache)


def agent_arguments(socket: Path) -> list[str]:
    """QEMU's words for the agent's channel."""
    device = "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"
    return ["-device", "virtio-serial", "-chardev", f"socket,id=agent,path={socket},server=on,wait=off", "-device", device]


def append(count: int = 100, kib: int = 16, pause_ms: int = 0, disks: tuple[str, ...] = ("vda",)) -> str:
    """Words for the kernel's command line. ``count`` 0 means without end; each number is written to each disk."""
    return f"writer.count={count} writer.kib={kib} writer.pause_ms={pause_ms} writer.disks={','.join(disks)}"


def file_name(number: int) -> str:
    """The name of file ``number`` in the root of each disk's file system."""
    return f"file-{number:08}"


def content(number: int, disk: str = "vda", kib: int = 16) -> bytes:
    """What file ``number`` on ``disk`` holds."""
    line = f"{number:08} {disk} -----------------------------------------------\n".encode()
    size = kib * 1024
    return (line * (size // len(line) + 1))[:size]


def acknowledged(console: str) -> list[int]:
    """The numbers acknowledged on a console so far, in order; a line that is still coming does not count."""
    return [int(number) for number in re.findall(r"^ACK (\d+)\n", console, re.MULTILINE)]


def errors(console: str) -> list[str]:
    """Lines that tell of an error: the writer's, or the kernel's about disk and file system."""
    pattern = r"^.*(?:ERR |I/O error|EXT4-fs error|EXT4-fs \(.*\): (?:error|Remounting)|Kernel panic|Call Trace).*$"
    return [line.strip() for line in re.findall(pattern, console, re.MULTILINE)]
