"""Files inside a disk as it was at a moment: listed, fetched, compared, followed through time.

What a guest wrote is not to be trusted, nor is the C code that takes it apart. So that code runs in a process of its own
(``reader``), which can open nothing and sees the disk only through questions to its parent (``client``).
"""
