"""The handshake says what the protocol's document asks for, and nothing that a client sends breaks it."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmrewind.nbd import protocol as nbd
from vmrewind.nbd.negotiation import OPTION_LENGTH_MAX, ExportInfo, Handshake, ProtocolError

FLAGS = nbd.FLAG_HAS_FLAGS | nbd.FLAG_SEND_FLUSH | nbd.FLAG_SEND_DF
VDA = ExportInfo("vda", 1 << 30, FLAGS, 1, 4096, 64 << 20)
VDB = ExportInfo("vdb", 1 << 20, FLAGS, 1, 4096, 64 << 20)
BOTH = {"vda": VDA, "vdb": VDB}


def client_flags(flags: int = nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES) -> bytes:
    return flags.to_bytes(4, "big")


def option(number: int, data: bytes = b"") -> bytes:
    return nbd.OPTION.pack(nbd.IHAVEOPT, number, len(data)) + data


def info_request(name: str, *wanted: int) -> bytes:
    encoded = name.encode()
    return len(encoded).to_bytes(4, "big") + encoded + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)


def meta_request(name: str, *queries: str) -> bytes:
    data = len(name).to_bytes(4, "big") + name.encode() + len(queries).to_bytes(4, "big")
    return data + b"".join(len(query).to_bytes(4, "big") + query.encode() for query in queries)


@dataclass(frozen=True)
class Reply:
    option: int
    kind: int
    data: bytes = b""


def replies(data: bytes) -> list[Reply]:
    """Parse option replies; fails on anything else."""
    found = []
    while data:
        magic, number, kind, length = nbd.OPTION_REPLY.unpack_from(data)
        assert magic == nbd.OPTION_REPLY_MAGIC
        assert len(data) >= 20 + length
        found.append(Reply(number, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


def started(exports: dict[str, ExportInfo] | None = None) -> Handshake:
    handshake = Handshake(BOTH if exports is None else exports)
    assert handshake.feed(client_flags()) == b""
    return handshake


def ask(handshake: Handshake, number: int, data: bytes = b"") -> list[Reply]:
    return replies(handshake.feed(option(number, data)))


def kinds(answers: list[Reply]) -> list[int]:
    return [answer.kind for answer in answers]


def test_greeting_offers_fixed_newstyle_and_no_zeroes() -> None:
    assert Handshake.greeting == b"NBDMAGIC" + b"IHAVEOPT" + b"\x00\x03"


@pytest.mark.parametrize("flags", [4, 1 << 31, 0xFFFFFFFF])
def test_unknown_client_flags_end_the_connection(flags: int) -> None:
    with pytest.raises(ProtocolError):
        Handshake(BOTH).feed(client_flags(flags))


def test_an_option_without_its_magic_ends_the_connection() -> None:
    with pytest.raises(ProtocolError):
        started().feed(b"IHAVEOPX" + bytes(8))


def test_list_names_every_export() -> None:
    answers = ask(started(), nbd.OPT_LIST)
    assert answers == [
        Reply(nbd.OPT_LIST, nbd.REP_SERVER, b"\0\0\0\3vda"),
        Reply(nbd.OPT_LIST, nbd.REP_SERVER, b"\0\0\0\3vdb"),
        Reply(nbd.OPT_LIST, nbd.REP_ACK),
    ]


def test_list_with_data_is_invalid() -> None:
    assert kinds(ask(started(), nbd.OPT_LIST, b"x")) == [nbd.REP_ERR_INVALID]


@pytest.mark.parametrize("number", [nbd.OPT_INFO, nbd.OPT_GO])
def test_info_and_go_tell_size_flags_and_block_sizes(number: int) -> None:
    handshake = started()
    ask(handshake, nbd.OPT_STRUCTURED_REPLY)
    export, sizes, ack = ask(handshake, number, info_request("vdb", nbd.INFO_BLOCK_SIZE))
    assert export == Reply(number, nbd.REP_INFO, struct.pack(">HQH", nbd.INFO_EXPORT, 1 << 20, FLAGS))
    assert sizes == Reply(number, nbd.REP_INFO, struct.pack(">HIII", nbd.INFO_BLOCK_SIZE, 1, 4096, 64 << 20))
    assert ack == Reply(number, nbd.REP_ACK)
    assert handshake.chosen == (VDB if number == nbd.OPT_GO else None)


def test_do_not_fragment_is_offered_with_structured_replies_only() -> None:
    handshake = started()
    simple = ask(handshake, nbd.OPT_INFO, info_request("vda"))[0]
    ask(handshake, nbd.OPT_STRUCTURED_REPLY)
    structured = ask(handshake, nbd.OPT_INFO, info_request("vda"))[0]
    assert not struct.unpack_from(">H", simple.data, 10)[0] & nbd.FLAG_SEND_DF
    assert struct.unpack_from(">H", structured.data, 10)[0] & nbd.FLAG_SEND_DF


@pytest.mark.parametrize("number", [nbd.OPT_INFO, nbd.OPT_GO])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"\0\0\0\3vd",
        b"\0\0\0\3vda",
        b"\0\0\0\3vda\0",
        b"\0\0\0\3vda\0\1",
        b"\0\0\0\3vda\0\1\0",
        b"\0\0\0\3vda\0\0\0",
        b"\xff\xff\xff\xffvda\0\0",
    ],
)
def test_info_and_go_with_lengths_that_do_not_add_up_are_invalid(number: int, data: bytes) -> None:
    handshake = started()
    assert kinds(ask(handshake, number, data)) == [nbd.REP_ERR_INVALID]
    assert handshake.chosen is None
    assert kinds(ask(handshake, nbd.OPT_GO, info_request("vda")))[-1] == nbd.REP_ACK, "the connection is as good as before"


@pytest.mark.parametrize("number", [nbd.OPT_INFO, nbd.OPT_GO])
@pytest.mark.parametrize("name", ["vdc", "", "VDA", "vda\0"])
def test_an_unknown_export_is_named_as_such(number: int, name: str) -> None:
    handshake = started()
    assert kinds(ask(handshake, number, info_request(name))) == [nbd.REP_ERR_UNKNOWN]
    assert handshake.chosen is None


def test_a_name_that_is_not_utf8_is_unknown() -> None:
    assert kinds(ask(started(), nbd.OPT_GO, b"\0\0\0\1\xff\0\0")) == [nbd.REP_ERR_UNKNOWN]


def test_the_empty_name_is_the_only_export_if_there_is_just_one() -> None:
    handshake = started({"vda": VDA})
    ask(handshake, nbd.OPT_GO, info_request(""))
    assert handshake.chosen == VDA


@pytest.mark.parametrize(("flags", "zeroes"), [(nbd.FLAG_FIXED_NEWSTYLE, 124), (nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES, 0)])
def test_export_name_is_answered_without_a_reply_header(flags: int, zeroes: int) -> None:
    handshake = Handshake(BOTH)
    answer = handshake.feed(client_flags(flags) + option(nbd.OPT_EXPORT_NAME, b"vda"))
    assert answer == struct.pack(">QH", 1 << 30, FLAGS & ~nbd.FLAG_SEND_DF) + bytes(zeroes)
    assert handshake.chosen == VDA


@pytest.mark.parametrize("name", [b"vdc", b"", b"\xff"])
def test_export_name_of_an_unknown_export_ends_the_connection(name: bytes) -> None:
    with pytest.raises(ProtocolError):
        started().feed(option(nbd.OPT_EXPORT_NAME, name))


def test_abort_is_acknowledged_and_closes() -> None:
    handshake = started()
    answer = handshake.feed(option(nbd.OPT_ABORT) + option(nbd.OPT_GO, info_request("vda")))
    assert replies(answer) == [Reply(nbd.OPT_ABORT, nbd.REP_ACK)]
    assert handshake.closed
    assert handshake.chosen is None


@pytest.mark.parametrize("number", [0, 4, 5, 11, 99, 0xFFFFFFFF])
def test_an_unknown_option_is_unsupported_whatever_it_carries(number: int) -> None:
    handshake = started()
    assert ask(handshake, number, b"anything") == [Reply(number, nbd.REP_ERR_UNSUP)]
    assert kinds(ask(handshake, nbd.OPT_LIST))[-1] == nbd.REP_ACK


def test_structured_reply_takes_no_data() -> None:
    handshake = started()
    assert kinds(ask(handshake, nbd.OPT_STRUCTURED_REPLY, b"x")) == [nbd.REP_ERR_INVALID]
    assert not handshake.structured
    assert kinds(ask(handshake, nbd.OPT_STRUCTURED_REPLY)) == [nbd.REP_ACK]
    assert handshake.structured


def structured_handshake() -> Handshake:
    handshake = started()
    ask(handshake, nbd.OPT_STRUCTURED_REPLY)
    return handshake


def test_block_status_needs_context_and_export_to_agree() -> None:
    handshake = structured_handshake()
    context, ack = ask(handshake, nbd.OPT_SET_META_CONTEXT, meta_request("vda", "base:allocation"))
    assert context == Reply(nbd.OPT_SET_META_CONTEXT, nbd.REP_META_CONTEXT, b"\0\0\0\1base:allocation")
    assert ack.kind == nbd.REP_ACK
    ask(handshake, nbd.OPT_GO, info_request("vda"))
    assert handshake.block_status


def test_a_context_of_another_export_does_not_count() -> None:
    handshake = structured_handshake()
    ask(handshake, nbd.OPT_SET_META_CONTEXT, meta_request("vda", "base:allocation"))
    ask(handshake, nbd.OPT_GO, info_request("vdb"))
    assert not handshake.block_status


@pytest.mark.parametrize(
    "second", [meta_request("vda"), meta_request("vda", "other:x"), meta_request("vdc", "base:allocation"), b"x"]
)
def test_each_set_replaces_the_one_before(second: bytes) -> None:
    handshake = structured_handshake()
    ask(handshake, nbd.OPT_SET_META_CONTEXT, meta_request("vda", "base:allocation"))
    ask(handshake, nbd.OPT_SET_META_CONTEXT, second)
    ask(handshake, nbd.OPT_GO, info_request("vda"))
    assert not handshake.block_status


@pytest.mark.parametrize(
    ("queries", "listed"),
    [((), True), (("base:",), True), (("base:allocation",), True), (("qemu:", "base:allocation"), True), (("qemu:",), False)],
)
def test_list_meta_context_answers_what_is_asked(queries: tuple[str, ...], listed: bool) -> None:
    handshake = structured_handshake()
    answers = ask(handshake, nbd.OPT_LIST_META_CONTEXT, meta_request("vda", *queries))
    expected = [Reply(nbd.OPT_LIST_META_CONTEXT, nbd.REP_META_CONTEXT, b"\0\0\0\0base:allocation")] if listed else []
    assert answers == [*expected, Reply(nbd.OPT_LIST_META_CONTEXT, nbd.REP_ACK)]
    ask(handshake, nbd.OPT_GO, info_request("vda"))
    assert not handshake.block_status, "listing selects nothing"


@pytest.mark.parametrize("number", [nbd.OPT_LIST_META_CONTEXT, nbd.OPT_SET_META_CONTEXT])
def test_meta_contexts_need_structured_replies(number: int) -> None:
    assert kinds(ask(started(), number, meta_request("vda", "base:allocation"))) == [nbd.REP_ERR_INVALID]


@pytest.mark.parametrize("number", [nbd.OPT_LIST_META_CONTEXT, nbd.OPT_SET_META_CONTEXT])
def test_meta_contexts_of_an_unknown_export_are_refused(number: int) -> None:
    assert kinds(ask(structured_handshake(), number, meta_request("vdc", "base:allocation"))) == [nbd.REP_ERR_UNKNOWN]


GOOD_META = meta_request("vda", "base:allocation")


@pytest.mark.parametrize("number", [nbd.OPT_LIST_META_CONTEXT, nbd.OPT_SET_META_CONTEXT])
@pytest.mark.parametrize(
    "data",
    [GOOD_META[:length] for length in range(len(GOOD_META))]
    + [GOOD_META + b"x", meta_request("vda", "x" * 4097), b"\0\0\0\3vda\xff\xff\xff\xff", b"\xff" * 8],
)
def test_meta_contexts_with_lengths_that_do_not_add_up_are_invalid(number: int, data: bytes) -> None:
    assert kinds(ask(structured_handshake(), number, data)) == [nbd.REP_ERR_INVALID]


@pytest.mark.parametrize("length", [OPTION_LENGTH_MAX, OPTION_LENGTH_MAX + 1, 1 << 20])
@pytest.mark.parametrize("number", [nbd.OPT_LIST, nbd.OPT_GO, nbd.OPT_SET_META_CONTEXT, 4242])
def test_an_oversized_option_is_skipped_and_refused(length: int, number: int) -> None:
    handshake = started()
    answers = ask(handshake, number, bytes(length))
    if length > OPTION_LENGTH_MAX:
        assert answers == [Reply(number, nbd.REP_ERR_TOO_BIG)]
    else:
        assert len(answers) == 1
        assert answers[0].kind & 1 << 31
    assert kinds(ask(handshake, nbd.OPT_GO, info_request("vda")))[-1] == nbd.REP_ACK


def test_an_oversized_option_is_never_held_in_memory() -> None:
    handshake = started()
    handshake.feed(nbd.OPTION.pack(nbd.IHAVEOPT, nbd.OPT_GO, 0xFFFFFFFF))
    for _ in range(256):
        assert handshake.feed(bytes(65536)) == b""
        assert len(handshake.buffer) <= 65536


def test_an_oversized_export_name_ends_the_connection() -> None:
    with pytest.raises(ProtocolError):
        started().feed(nbd.OPTION.pack(nbd.IHAVEOPT, nbd.OPT_EXPORT_NAME, OPTION_LENGTH_MAX + 1))


CONVERSATION = (
    client_flags()
    + option(4242, b"abc")
    + option(nbd.OPT_STRUCTURED_REPLY)
    + option(nbd.OPT_LIST)
    + option(nbd.OPT_LIST_META_CONTEXT, meta_request("vda"))
    + option(nbd.OPT_INFO, info_request("nope"))
    + option(nbd.OPT_LIST, bytes(OPTION_LENGTH_MAX + 7))
    + option(nbd.OPT_SET_META_CONTEXT, meta_request("vda", "base:allocation"))
    + option(nbd.OPT_GO, info_request("vda", nbd.INFO_BLOCK_SIZE))
)


def test_fed_byte_by_byte_it_says_the_same() -> None:
    whole = Handshake(BOTH)
    expected = whole.feed(CONVERSATION + b"requests")
    assert whole.chosen == VDA
    assert whole.block_status
    assert bytes(whole.buffer) == b"requests", "what follows belongs to the next phase"
    piecemeal = Handshake(BOTH)
    answers = b"".join(piecemeal.feed(CONVERSATION[i : i + 1]) for i in range(len(CONVERSATION)))
    assert answers == expected
    assert piecemeal.chosen == VDA
    assert piecemeal.block_status


mangled_options = st.builds(
    lambda number, data, length, magic: nbd.OPTION.pack(magic, number, len(data) if length is None else length) + data,
    st.one_of(st.integers(0, 12), st.integers(0, 0xFFFFFFFF)),
    st.one_of(
        st.binary(max_size=64),
        st.just(info_request("vda")),
        st.just(GOOD_META),
        st.builds(lambda at, byte: GOOD_META[:at] + bytes([byte]) + GOOD_META[at + 1 :], st.integers(0, 20), st.integers(0, 255)),
    ),
    st.one_of(st.none(), st.none(), st.none(), st.integers(0, 100), st.integers(0, 0xFFFFFFFF)),
    st.sampled_from([nbd.IHAVEOPT] * 9 + [nbd.NBDMAGIC]),
)
streams = st.one_of(
    st.binary(max_size=300),
    st.builds(
        lambda flags, options: flags + b"".join(options),
        st.one_of(st.just(client_flags()), st.binary(min_size=4, max_size=4)),
        st.lists(mangled_options, max_size=12),
    ),
)


@settings(max_examples=300)
@given(streams, st.lists(st.integers(1, 80), max_size=20), st.sampled_from([BOTH, {"vda": VDA}, {}]))
def test_arbitrary_bytes_raise_nothing_but_protocol_errors(data: bytes, cuts: list[int], exports: dict[str, ExportInfo]) -> None:
    handshake = Handshake(exports)
    said = bytearray()
    try:
        while data and handshake.chosen is None and not handshake.closed:
            cut = cuts.pop() if cuts else len(data)
            said += handshake.feed(data[:cut])
            data = data[cut:]
            assert len(handshake.buffer) <= OPTION_LENGTH_MAX + nbd.OPTION.size + 300
    except ProtocolError:
        return
    if handshake.chosen is None:
        replies(bytes(said))
