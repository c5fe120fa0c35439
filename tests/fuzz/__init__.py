"""Fuzzing the NBD server: inputs made into what a client could say, and a model that says whether the answers are lawful.

``script/fuzz`` runs it guided by coverage; ``tests/faults/test_nbd_corpus.py`` replays the inputs of ``corpus.txt``.
"""
