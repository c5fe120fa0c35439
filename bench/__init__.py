"""The benchmark: capture, journaling every write, beside servers that protect nothing. ``script/bench`` runs it.

``peers`` says what is measured, ``workloads`` how, ``run`` in which order, ``report`` and ``chart`` what is told of it. No figure
is asserted: a machine that others use gives what it gives, and the report says how far the rounds lie apart.
"""
