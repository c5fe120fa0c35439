"""Small guests that boot in seconds, for the tests and the demo.

A Debian cloud kernel and busybox in an initramfs (:mod:`guests.initramfs`), disks for them (:mod:`guests.images`,
:mod:`guests.grub`), a guest that writes and says what it wrote (:mod:`guests.writer`), and QEMU around them
(:mod:`guests.machine`). Nothing is installed and nothing needs root; what is fetched or built is kept in
:func:`guests.kernel.cache_directory`.
"""
