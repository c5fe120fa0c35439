"""Encrypted objects: the contract of a store, ranges over pages, and that nothing but what was put is ever got."""

from __future__ import annotations

import hmac
import itertools
import struct
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from bench.encryption import measure
from tests.store_contract import StoreContract
from vmrewind.errors import CorruptionError
from vmrewind.repository.directory import DirectoryStore
from vmrewind.repository.encrypted import HEADER_SIZE, PAGE, TAG, EncryptedStore, plain_size, stored_size
from vmrewind.repository.memory import MemoryStore
from vmrewind.repository.store import AlreadyExists, NotFound, Store

KEY = bytes(range(32))


class TestEncryptedMemory(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return EncryptedStore(MemoryStore(), KEY)


class TestEncryptedDirectory(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return EncryptedStore(DirectoryStore(tmp_path / "store", create=True), KEY)


def content(size: int) -> bytes:
    """Bytes that are different at every place."""
    return b"".join(number.to_bytes(4, "little") for number in range(-(-size // 4)))[:size]


class Counting(MemoryStore):
    """Notes what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, int | None]] = []

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        self.asked.append((offset, length))
        return super().get(key, offset, length)


EDGES = [0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE + 1, 3 * PAGE - 1, 3 * PAGE]
near_edges = st.builds(lambda edge, by: max(0, edge + by), st.sampled_from(EDGES), st.integers(-3, 3))


@given(near_edges, st.lists(st.tuples(near_edges, st.none() | near_edges | st.integers(0, 9)), min_size=1), st.booleans())
def test_any_range_over_the_borders_of_pages(size: int, ranges: list[tuple[int, int | None]], fresh: bool) -> None:
    inner = MemoryStore()
    store = EncryptedStore(inner, KEY)
    data = content(size)
    store.put("k", data)
    assert len(inner.objects["k"]) == stored_size(size)
    assert (plain_size(stored_size(size)), store.size("k"), list(store.list(""))) == (size, size, [("k", size)])
    for offset, length in ranges:
        reader = EncryptedStore(inner, KEY) if fresh else store
        assert reader.get("k", offset, length) == (data[offset:] if length is None else data[offset : offset + length])


def test_a_range_costs_its_pages_and_one_request_once_the_header_is_known() -> None:
    inner = Counting()
    EncryptedStore(inner, KEY).put("k", content(10 * PAGE))
    store = EncryptedStore(inner, KEY)
    store.get("k", 100, PAGE - 100)
    assert inner.asked == [(0, HEADER_SIZE + PAGE + TAG)], "header and first page at once"
    store.get("k", 5 * PAGE - 1, 2)
    assert inner.asked[1:] == [(HEADER_SIZE + 4 * (PAGE + TAG), 2 * (PAGE + TAG))]
    del inner.asked[:]
    EncryptedStore(inner, KEY).get("k", 5 * PAGE, 1)
    assert inner.asked == [(0, HEADER_SIZE), (HEADER_SIZE + 5 * (PAGE + TAG), PAGE + TAG)]


@pytest.mark.parametrize(("offset", "length"), [(PAGE, 5), (0, 0), (5 * PAGE, 1), (PAGE, None)])
def test_an_object_deleted_and_made_anew_is_read_anew(offset: int, length: int | None) -> None:
    """Although its header, and so its key, is remembered."""
    inner = MemoryStore()
    one, other = EncryptedStore(inner, KEY), EncryptedStore(inner, KEY)
    one.put("k", data := content(3 * PAGE))
    assert one.get("k", PAGE, 5) == data[PAGE : PAGE + 5]
    other.delete("k")
    with pytest.raises(NotFound):
        one.get("k", offset, length)
    other.put("k", data)
    assert one.get("k", PAGE, 5) == data[PAGE : PAGE + 5]
    other.delete("k")
    other.put("k", data := bytes(2 * PAGE))
    assert one.get("k", offset, length) == (data[offset:] if length is None else data[offset : offset + length])


def independently(stored: bytes, name: str, key: bytes) -> bytes:
    """As docs/repository-format.md says, and nothing of vmrewind's."""
    magic, size, salt, tag = struct.unpack_from("<8sQ32s16s", stored)
    assert magic == b"VMRWENC1"
    prk = hmac.digest(salt, key, "sha256")
    cipher = AESGCM(hmac.digest(prk, name.encode() + b"\x01", "sha256"))
    assert cipher.decrypt(b"\xff" * 12, tag, stored[:48]) == b""
    pages = [stored[at : at + 65552] for at in range(64, len(stored), 65552)]
    plain = b"".join(cipher.decrypt(i.to_bytes(12, "little"), page, None) for i, page in enumerate(pages))
    assert len(plain) == size
    return plain


@pytest.mark.parametrize("size", EDGES)
def test_the_format_is_as_documented(size: int) -> None:
    inner = MemoryStore()
    EncryptedStore(inner, KEY).put("chunks/ab/cd", content(size))
    assert independently(inner.objects["chunks/ab/cd"], "chunks/ab/cd", KEY) == content(size)


def test_no_key_is_ever_used_for_two_contents_and_equal_contents_are_not_to_be_seen() -> None:
    """Not by repetition either: each put draws a salt of its own."""
    inner, seen = MemoryStore(), set()
    store = EncryptedStore(inner, KEY)
    for name in "ab" * 3:
        inner.objects.pop(name, None)
        store.put(name, bytes(PAGE + 100))
        stored = inner.objects[name]
        seen |= {stored[16:48], stored[HEADER_SIZE : HEADER_SIZE + PAGE], stored[-100:-TAG], stored[48:HEADER_SIZE]}
    assert len(seen) == 6 * 4


SIZES = [0, 1, 100, PAGE, PAGE + 7]


@pytest.mark.parametrize("size", SIZES)
def test_every_flipped_bit_every_cut_and_every_byte_more_is_named(size: int) -> None:
    inner = MemoryStore()
    store = EncryptedStore(inner, KEY)
    store.put("vms/a/k", data := content(size))
    whole = inner.objects["vms/a/k"]
    places = [*range(min(len(whole), HEADER_SIZE + 140)), *range(HEADER_SIZE + 140, len(whole), 1 if size < PAGE else 811)]
    damaged = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in places]
    damaged += [whole[:at] for at in places] + [whole + b"x", whole + whole, whole + bytes(PAGE + TAG)]
    for stored in damaged:
        inner.objects["vms/a/k"] = stored
        for reader in (store, EncryptedStore(inner, KEY)):
            with pytest.raises(CorruptionError, match="object vms/a/k cannot be decrypted"):
                reader.get("vms/a/k")
            # A range needs not see what lies behind it; what it gives is right.
            for offset, length in [(0, 50), (PAGE - 2, 4), (PAGE + 1, None)]:
                try:
                    assert reader.get("vms/a/k", offset, length) == data[offset : None if length is None else offset + length]
                except CorruptionError as error:
                    assert "vms/a/k" in str(error)
    inner.objects["vms/a/k"] = whole
    assert store.get("vms/a/k") == data


def test_pages_in_another_order_or_of_another_put_do_not_open() -> None:
    inner = MemoryStore()
    store = EncryptedStore(inner, KEY)
    pages = 4
    store.put("k", content(pages * PAGE))
    first = inner.objects.pop("k")
    store.put("k", content(pages * PAGE))
    second = inner.objects.pop("k")

    def page(stored: bytes, number: int) -> bytes:
        return stored[HEADER_SIZE + number * (PAGE + TAG) :][: PAGE + TAG]

    for order in itertools.product(range(pages), repeat=pages):
        inner.objects["k"] = first[:HEADER_SIZE] + b"".join(page(first, number) for number in order)
        if order == tuple(range(pages)):
            assert EncryptedStore(inner, KEY).get("k") == content(pages * PAGE)
        else:
            with pytest.raises(CorruptionError, match="page"):
                EncryptedStore(inner, KEY).get("k")
    for number in range(pages):
        inner.objects["k"] = (
            first[: HEADER_SIZE + number * (PAGE + TAG)] + page(second, number) + first[HEADER_SIZE + (number + 1) * (PAGE + TAG) :]
        )
        with pytest.raises(CorruptionError, match=f"page {number}"):
            EncryptedStore(inner, KEY).get("k")
    inner.objects["k"] = second[:HEADER_SIZE] + first[HEADER_SIZE:]
    with pytest.raises(CorruptionError, match="page 0"):
        EncryptedStore(inner, KEY).get("k")


def test_another_object_under_a_name_does_not_open_nor_does_plain_text_nor_another_key() -> None:
    inner = MemoryStore()
    store = EncryptedStore(inner, KEY)
    names = ["a", "b", "chunks/ab/c", "vms/x/vm.json"]
    for name in names:
        store.put(name, b"the same")
    stored = dict(inner.objects)
    for one, other in itertools.permutations(names, 2):
        inner.objects[one] = stored[other]
        with pytest.raises(CorruptionError, match=f"object {one} cannot be decrypted.*another object"):
            EncryptedStore(inner, KEY).get(one)
        inner.objects[one] = stored[one]
    inner.objects["a"] = b"plain text, which somebody put there" * 9
    with pytest.raises(CorruptionError, match="object a cannot be decrypted"):
        store.get("a")
    with pytest.raises(CorruptionError, match="object b cannot be decrypted"):
        EncryptedStore(inner, KEY[:31] + b"x").get("b")


def test_what_was_put_twice_is_compared_as_plain_text() -> None:
    inner = MemoryStore()
    store = EncryptedStore(inner, KEY)
    store.put("k", b"v")
    before = dict(inner.objects)
    with pytest.raises(AlreadyExists):
        store.put("k", b"v")
    assert inner.objects == before


def test_what_encryption_costs_can_be_measured() -> None:
    assert all(seconds >= 0 for seconds in measure(rounds=1).values())
