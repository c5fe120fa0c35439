"""Who opens an encrypted repository, by which key; what is refused; and what a store's owner may try."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import blake3
import pytest
import xxhash
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.failing_store import FailingStore
from tests.history_tools import exit_code_of_main
from vmrewind.errors import CorruptionError, RepositoryError, VmrewindError
from vmrewind.repository.chunks import Chunks, public_key
from vmrewind.repository.directory import DirectoryStore
from vmrewind.repository.memory import MemoryStore
from vmrewind.repository.opening import open_store
from vmrewind.repository.repository import Repository
from vmrewind.repository.sealed import seal, unseal
from vmrewind.repository.secret import KEY_FILE, PASSPHRASE, Secret, secret_of_key_file
from vmrewind.repository.slots import add_slot, open_slots, read_slots
from vmrewind.repository.unlocking import add_key, key_slots, remove_key
from vmrewind.start.environment import without_credentials

UUID = "0f0e0d0c-0b0a-0908-0706-050403020100"
HEX = "5e" * 32
WORDS = "correct horse battery staple"
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for /etc/vmrewind, empty; and no variable of the host's."""
    for name in ("VMREWIND_KEY_FILE", "VMREWIND_PASSPHRASE", "VMREWIND_PASSPHRASE_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VMREWIND_ENVIRONMENT", str(tmp_path / "etc" / "environment"))
    (tmp_path / "etc" / "keys").mkdir(parents=True)
    return tmp_path / "etc"


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*arguments: str | Path, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vmrewind", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = exit_code_of_main()
        out, err = capsys.readouterr()
        for text in (out, err):
            assert HEX not in text and WORDS not in text and "another passphrase" not in text, "a secret is shown"
        return code, out, err

    return run


def private(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def of_file(text: str = HEX) -> Secret:
    return Secret(KEY_FILE, bytes.fromhex(text), "the key file")


def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From now on this is another host, which knows nothing yet."""
    monkeypatch.setenv("VMREWIND_STATE_DIR", str(tmp_path / f"state-{os.urandom(4).hex()}"))


def test_each_way_to_give_a_key_opens_what_was_made_with_it(tmp_path: Path, etc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "repo")
    made = Repository.init(url, of_file())
    made.vm("web01").register(UUID)
    monkeypatch.setenv("VMREWIND_KEY_FILE", str(private(tmp_path / "k", HEX + "\n")))
    add_key(url, Secret(PASSPHRASE, WORDS.encode(), "words"))
    monkeypatch.delenv("VMREWIND_KEY_FILE")
    ways: list[tuple[dict[str, str], str | None, str | None]] = [
        ({"VMREWIND_KEY_FILE": str(tmp_path / "k")}, None, None),
        ({"VMREWIND_PASSPHRASE": WORDS}, None, None),
        ({"VMREWIND_PASSPHRASE_FILE": str(private(tmp_path / "p", WORDS + "\nmore"))}, None, None),
        ({}, f"VMREWIND_KEY_FILE={tmp_path / 'k'}\n", None),
        ({}, f"# ours\nexport VMREWIND_PASSPHRASE='{WORDS}'\n", None),
        ({}, None, HEX + "\n"),
        ({"VMREWIND_PASSPHRASE": "of another repository"}, None, HEX),
    ]
    for variables, environment, own in ways:
        with monkeypatch.context() as host:
            elsewhere(host, tmp_path)
            with pytest.raises(RepositoryError, match="encrypted, and no key is given") as caught:
                Repository.open(url)
            for way in ("VMREWIND_KEY_FILE", "VMREWIND_PASSPHRASE", str(etc / "keys" / f"{made.id}.key")):
                assert way in caught.value.hint
            for name, value in variables.items():
                host.setenv(name, value)
            if environment is not None:
                private(etc / "environment", environment)
            if own is not None:
                private(etc / "keys" / f"{made.id}.key", own)
            opened = Repository.open(url)
            assert (opened.id, opened.encrypted, opened.vms(), opened.vm("web01").uuid()) == (made.id, True, ["web01"], UUID)
        for path in (etc / "environment", etc / "keys" / f"{made.id}.key"):
            path.unlink(missing_ok=True)


def test_a_key_that_does_not_fit_is_refused_and_not_shown(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "repo")
    key = private(tmp_path / "k", HEX)
    assert cli("init", url, "--encrypt", "--key-file", key)[0] == 0
    monkeypatch.setenv("VMREWIND_KEY_FILE", str(private(tmp_path / "other", "a1" * 32)))
    monkeypatch.setenv("VMREWIND_PASSPHRASE", "another passphrase")
    with pytest.raises(RepositoryError, match="does not open") as caught:
        Repository.open(url)
    assert str(tmp_path / "other") in str(caught.value)
    assert "a1a1" not in str(caught.value)
    code, _, err = cli("key", "add", url, "--key-file", tmp_path / "more")
    assert (code, "does not open" in err) == (5, True)
    for text, mode, words in [
        ("a1" * 31, 0o600, "not a key file"),
        ("x" * 64, 0o600, "not a key file"),
        (HEX, 0o640, "others than"),
    ]:
        bad = private(tmp_path / "bad", text)
        bad.chmod(mode)
        monkeypatch.setenv("VMREWIND_KEY_FILE", str(bad))
        with pytest.raises(RepositoryError, match=words) as caught:
            Repository.open(url)
        assert text not in str(caught.value)
    monkeypatch.setenv("VMREWIND_KEY_FILE", str(tmp_path / "missing"))
    with pytest.raises(RepositoryError, match=r"VMREWIND_KEY_FILE.*missing: No such file"):
        Repository.open(url)
    monkeypatch.delenv("VMREWIND_KEY_FILE")
    monkeypatch.setenv("VMREWIND_PASSPHRASE", "short")
    with pytest.raises(RepositoryError, match="shorter than 8"):
        Repository.open(url)


def test_a_key_file_is_its_owners_alone_whatever_the_umask_is(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        secret_of_key_file(tmp_path / "keys" / "k")
    finally:
        os.umask(mask)
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "keys", tmp_path / "keys" / "k")] == [0o700, 0o600]
    with pytest.raises(RepositoryError, match="Is a directory"):
        secret_of_key_file(tmp_path)


def test_init_makes_a_key_file_once_and_takes_what_is_given(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "keys" / "site.key"
    code, out, _ = cli("init", tmp_path / "a", "--encrypt", "--key-file", key)
    assert code == 0 and "LOSES ALL" in out and str(key) in out
    made = key.read_bytes()
    assert (key.stat().st_mode & 0o777, len(made)) == (0o600, 65)
    assert made.decode().strip() not in out
    code, out, _ = cli("init", tmp_path / "b", "--encrypt", "--key-file", key, "--json")
    assert json.loads(out)["encrypted"] is True
    assert key.read_bytes() == made
    assert cli("init", tmp_path / "c", "--key-file", key)[0] == 2
    code, _, err = cli("init", tmp_path / "c", "--encrypt")
    assert code == 2 and "VMREWIND_PASSPHRASE" in err
    monkeypatch.setenv("VMREWIND_PASSPHRASE", WORDS)
    assert cli("init", tmp_path / "c", "--encrypt")[0] == 0
    assert [slot.kind for slot in key_slots(str(tmp_path / "c")).intact] == ["passphrase"]
    assert not (tmp_path / "d").exists()


def test_keys_are_added_and_removed_but_never_the_last(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "repo")
    monkeypatch.setenv("VMREWIND_KEY_FILE", str(private(tmp_path / "k", HEX)))
    made = Repository.init(url, of_file())
    (first,) = key_slots(url).intact
    code, _, err = cli("key", "remove", url, first.id)
    assert code == 5 and "last key slot" in err
    code, out, _ = cli("key", "add", url, "--json", stdin=WORDS + "\n")
    second = json.loads(out)["slot"]
    assert code == 0
    shown = json.loads(cli("key", "list", url, "--json")[1])
    assert sorted((slot["slot"], slot["kind"]) for slot in shown["slots"]) == sorted([(first.id, KEY_FILE), (second, PASSPHRASE)])
    assert "passphrase" in cli("key", "list", url)[1]
    code, _, err = cli("key", "remove", url, first.id)
    assert code == 5 and "opens no other" in err, "what is at hand would open nothing any more"
    assert cli("key", "remove", url, "0" * 16)[0] == 5
    assert cli("key", "remove", url, "../vms")[0] == 5
    monkeypatch.delenv("VMREWIND_KEY_FILE")
    monkeypatch.setenv("VMREWIND_PASSPHRASE", WORDS)
    code, out, _ = cli("key", "remove", url, first.id)
    assert code == 0 and "kept" in out
    assert Repository.open(url).id == made.id
    monkeypatch.delenv("VMREWIND_PASSPHRASE")
    monkeypatch.setenv("VMREWIND_KEY_FILE", str(tmp_path / "k"))
    with pytest.raises(RepositoryError, match="does not open"):
        Repository.open(url)
    code, _, err = cli("key", "list", str(tmp_path / "k"))
    assert code == 5


def test_two_that_remove_each_others_slot_leave_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "repo")
    monkeypatch.setenv("VMREWIND_KEY_FILE", str(private(tmp_path / "k", HEX)))
    Repository.init(url, of_file())
    (mine,) = key_slots(url).intact
    other = add_key(url, of_file("77" * 32))
    plain = DirectoryStore.delete

    def both(store: DirectoryStore, key: str) -> None:
        plain(store, key)
        plain(store, f"keys/{mine.id}.json")

    monkeypatch.setattr(DirectoryStore, "delete", both)
    with pytest.raises(RepositoryError, match=f"{other} was put back"):
        remove_key(url, other)
    assert [slot.id for slot in key_slots(url).intact] == [other]


def test_every_flipped_bit_of_a_slot_is_named_and_another_slot_opens(etc: Path) -> None:
    store = MemoryStore()
    made = Repository.init_in(store, of_file())
    private(etc / "keys" / f"{made.id}.key", HEX)
    (key,) = (key for key in store.objects if key.startswith("keys/"))
    whole = store.objects[key]

    def damaged() -> list[bytes]:
        cuts = [whole[:at] for at in range(0, len(whole) - 1, 7)]
        return [whole[:at] + bytes([whole[at] ^ 1 << at % 7]) + whole[at + 1 :] for at in range(len(whole))] + cuts

    for content in damaged():
        store.objects[key] = content
        try:
            assert Repository.open_in(store).id == made.id, "white space, say"
            assert json.loads(content) == json.loads(whole)
        except CorruptionError as error:
            assert key in str(error)
    # Changed on purpose, with a right checksum.
    for field, value in [
        ("wrapped", "AAAA"),
        ("created", "x"),
        ("kdf", {}),
        ("kdf", 3),
        ("wrapped", 7),
        ("check", 3),
        ("kind", "x"),
    ]:
        store.objects[key] = seal(unseal(whole, "") | {field: value})
        with pytest.raises(CorruptionError, match=key):
            Repository.open_in(store)
    store.objects[key] = whole
    repository_key, _ = open_slots(store, read_slots(store, made.id), lambda: [of_file()])
    add_slot(store, made.id, repository_key, of_file())
    for content in damaged()[::5]:
        store.objects[key] = content
        assert Repository.open_in(store).id == made.id
    store.objects[key] = whole
    both = {name: data for name, data in store.objects.items() if name.startswith("keys/")}
    assert len(both) == 2
    for slot, data in both.items():
        store.objects |= both | {slot: seal(unseal(data, "") | {"wrapped": "AAAA"})}
        assert Repository.open_in(store).id == made.id
    for slot in both:
        del store.objects[slot]
    with pytest.raises(CorruptionError, match="no key slot below keys/"):
        Repository.open_in(store)


def test_a_hostile_slot_does_not_eat_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    monkeypatch.setenv("VMREWIND_PASSPHRASE", WORDS)
    Repository.init_in(store, Secret(PASSPHRASE, WORDS.encode(), "words"))
    (key,) = (key for key in store.objects if key.startswith("keys/"))
    content = unseal(store.objects[key], "")
    hostile = [{"n": 1 << 40}, {"n": 1 << 21}, {"n": 3}, {"n": True}, {"r": 1 << 20}, {"p": 1 << 20}, {"name": "x"}]
    for change in hostile:
        store.objects[key] = seal(content | {"kdf": content["kdf"] | change})
        with pytest.raises(CorruptionError, match=key):
            Repository.open_in(store)


def test_keys_are_as_documented(etc: Path) -> None:
    """As docs/repository-format.md says, from a passphrase to an object's bytes, and nothing of vmrewind's."""

    def hkdf(key: bytes, salt: bytes, info: bytes) -> bytes:
        return hmac.digest(hmac.digest(salt, key, "sha256"), info + b"\x01", "sha256")

    store = MemoryStore()
    Repository.init_in(store, Secret(PASSPHRASE, WORDS.encode(), "words")).vm("web01").put_config(1, "toml", b"text")
    repository_id = json.loads(store.objects["repository.json"])["id"].encode()
    slot = json.loads(next(data for name, data in store.objects.items() if name.startswith("keys/")))
    salt, wrapped = base64.b64decode(slot["kdf"]["salt"]), base64.b64decode(slot["wrapped"])
    n = slot["kdf"]["n"]
    master = hashlib.scrypt(WORDS.encode(), salt=salt, n=n, r=slot["kdf"]["r"], p=slot["kdf"]["p"], dklen=32, maxmem=1 << 28)
    assert hkdf(master, salt, b"vmrewind 1: check").hex() == slot["check"]
    rest = {name: value for name, value in slot.items() if name not in ("wrapped", "checksum")}
    associated = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
    key = AESGCM(hkdf(master, salt, b"vmrewind 1: wrapping")).decrypt(bytes(12), wrapped, associated)
    (name,) = (name for name in store.objects if "/config/" in name)
    stored = store.objects[name]
    objects = hkdf(key, repository_id, b"vmrewind 1: objects")
    assert AESGCM(hkdf(objects, stored[16:48], name.encode())).decrypt(bytes(12), stored[64:], None) == b"text"
    digest = blake3.blake3(b"text", key=hkdf(key, repository_id, b"vmrewind 1: names")).hexdigest()[:16]
    assert name.endswith(f"-{digest}.toml")


def test_too_many_slots_are_refused_before_they_are_tried(etc: Path) -> None:
    store = MemoryStore()
    made = Repository.init_in(store, of_file())
    private(etc / "keys" / f"{made.id}.key", HEX)
    for number in range(64):
        store.put(f"keys/{number:016x}.json", b"{}")
    with pytest.raises(RepositoryError, match="more than 64 key slots"):
        Repository.open_in(store)


def test_who_replaces_the_description_gets_no_plain_text_from_a_host_that_knew_it(
    tmp_path: Path, etc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "repo")
    made = Repository.init(url, of_file())
    private(etc / "keys" / f"{made.id}.key", HEX)
    path = tmp_path / "repo" / "repository.json"
    whole = path.read_bytes()
    content = unseal(whole, "")
    path.chmod(0o600)

    def refused(change: dict[str, object], words: str) -> None:
        path.write_bytes(seal(content | change))
        for operation in (lambda: Repository.open(url), lambda: key_slots(url)):
            with pytest.raises(VmrewindError, match=words):
                operation()
        path.write_bytes(whole)

    Repository.open(url)
    refused({"encryption": None}, f"knows the encrypted repository {made.id} there, and now finds one that is not encrypted")
    refused({"encryption": None, "id": "ab" * 16}, "now finds another one")
    refused({"id": "ab" * 16}, "now finds another one")
    refused({"encryption": {"cipher": "rot13"}}, "does not know")
    path.unlink()
    with pytest.raises(RepositoryError, match="knows an encrypted repository there"):
        Repository.init(url)
    path.write_bytes(whole)
    # A host that has not seen it, but whose configuration gives a key.
    elsewhere(monkeypatch, tmp_path)
    path.write_bytes(seal(content | {"encryption": None}))
    Repository.open(url)  # nothing tells that it was ever encrypted
    monkeypatch.setenv("VMREWIND_KEY_FILE", str(private(tmp_path / "k", HEX)))
    with pytest.raises(RepositoryError, match=r"a key is given .*VMREWIND_KEY_FILE.* not encrypted"):
        Repository.open(url)
    with pytest.raises(RepositoryError, match="shall not be encrypted"):
        Repository.init(str(tmp_path / "plain"))
    assert not (tmp_path / "plain").exists()
    # Another id: its slots are not the old one's.
    path.write_bytes(seal(content | {"id": "ab" * 16}))
    with pytest.raises(VmrewindError, match="key slot"):
        Repository.open(url)
    # Nor if the slots say so, too.
    (slot,) = (tmp_path / "repo" / "keys").iterdir()
    slot.chmod(0o600)
    slot.write_bytes(seal(unseal(slot.read_bytes(), "") | {"repository": "ab" * 16}))
    with pytest.raises(CorruptionError, match=f"{slot.name}: the key slot was changed"):
        Repository.open(url)


def test_a_new_repository_in_the_old_ones_place_is_taken_from_who_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "repo")
    monkeypatch.setenv("VMREWIND_KEY_FILE", str(private(tmp_path / "k", HEX)))
    Repository.init(url, of_file())
    (tmp_path / "repo").rename(tmp_path / "old")
    made = Repository.init(url, of_file())
    assert Repository.open(url + "/").id == Repository.open(url).id == made.id
    assert Repository.open(str(tmp_path / "old")).id != made.id
    (pin,) = [p for p in (tmp_path / "state" / "repositories").iterdir() if made.id in p.read_text()]
    pin.write_text("{")
    with pytest.raises(RepositoryError, match=pin.name):
        Repository.open(url)


def test_an_init_that_fails_leaves_no_half_made_repository() -> None:
    for seed in range(60):
        inner = MemoryStore()
        store = FailingStore(inner, seed, chance=0.5)
        with contextlib.suppress(RepositoryError):
            Repository.init_in(store, of_file())
        store.settle()
        if "repository.json" in inner.objects:
            assert any(key.startswith("keys/") for key in inner.objects), seed


def test_equal_content_in_two_repositories_has_no_equal_names_or_bytes(etc: Path) -> None:
    stores = [MemoryStore(), MemoryStore()]
    for store in stores:
        repository = Repository.init_in(store, of_file())
        repository.chunks.put(b"the same" * 5000)
        repository.vm("web01").put_config(1, "toml", b"the same")
    one, other = ({k: v for k, v in s.objects.items() if not k.startswith(("keys/", "repository"))} for s in stores)
    assert len(one) == len(other) == 2
    assert not set(one) & set(other)
    # Behind magic and size; eight equal bytes by chance: 1 in 10^13.
    windows = [{data[at : at + 8] for data in objects.values() for at in range(16, len(data) - 8)} for objects in (one, other)]
    assert windows[0].isdisjoint(windows[1])


def test_names_tell_nothing_of_contents_to_those_who_know_the_repository_id(etc: Path) -> None:
    store = MemoryStore()
    repository = Repository.init_in(store, of_file())
    data = b"a piece that everybody has, of some distribution's image"
    repository.chunks.put(data)
    repository.vm("web01").put_config(1, "toml", data)
    public = Chunks(store, public_key(repository.id), verified=False).id(data)
    assert [key for key in store.objects if public in key or xxhash.xxh3_64_hexdigest(data) in key] == []


def test_a_damaged_chunk_in_an_encrypted_directory_is_made_whole_by_the_next_backup(tmp_path: Path) -> None:
    repository = Repository.init(str(tmp_path / "repo"), of_file())
    chunk_id, sent = repository.chunks.put(b"data" * 1000)
    assert sent > 0
    (path,) = (tmp_path / "repo" / "chunks").glob("*/*")
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptionError, match=chunk_id):
        repository.read_chunk(chunk_id)
    assert repository.chunks.put(b"data" * 1000)[0] == chunk_id
    assert repository.read_chunk(chunk_id) == b"data" * 1000


def test_capture_and_qemu_are_not_given_what_opens_a_repository() -> None:
    given = dict.fromkeys(["VMREWIND_KEY_FILE", "VMREWIND_PASSPHRASE", "VMREWIND_PASSPHRASE_FILE"], "x")
    assert without_credentials(given | {"PATH": "/bin"}) == {"PATH": "/bin"}


def test_a_process_that_has_the_key_leaves_no_core_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMREWIND_KEY_FILE", str(private(tmp_path / "k", HEX)))
    Repository.init(str(tmp_path / "repo"), of_file())
    code = (
        "import ctypes, os, resource, sys\n"
        "from vmrewind.repository.repository import Repository\n"
        "Repository.open(sys.argv[1])\n"
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "repo")], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "0\n"


def test_what_a_plain_repository_needs_has_no_cryptography_in_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from vmrewind.repository.repository import Repository\n"
        "Repository.init(sys.argv[1]); Repository.open(sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "repo")], check=True, timeout=60)


def test_the_passphrase_is_asked_for_at_a_terminal(tmp_path: Path) -> None:
    def at_terminal(words: list[str], *arguments: str) -> tuple[int, str]:
        pid, fd = pty.fork()
        if pid == 0:
            os.execv(
                sys.executable, [sys.executable, *(arguments if arguments[0] == "-c" else ("-m", "vmrewind.cli.main", *arguments))]
            )
        said = b""
        answers = iter(words)
        with contextlib.suppress(OSError):  # the terminal's other side is closed
            while part := os.read(fd, 4096):
                said += part
                if said.endswith(b": "):
                    os.write(fd, next(answers).encode() + b"\n")
        os.close(fd)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode()

    url = str(tmp_path / "repo")
    code, said = at_terminal([WORDS, "something else"], "init", url, "--encrypt")
    assert (code, "differ" in said) == (2, True), said
    code, said = at_terminal([WORDS, WORDS], "init", url, "--encrypt")
    assert code == 0, said
    assert WORDS not in said
    code, said = at_terminal([WORDS + "x"], "key", "add", url, "--key-file", str(tmp_path / "k"))
    assert (code, "does not open" in said) == (5, True), said
    code, said = at_terminal([WORDS], "key", "add", url, "--key-file", str(tmp_path / "k"))
    assert code == 0, said
    assert len(key_slots(url).intact) == 2
    # A start gives the repository only so much time, so it asks nobody.
    start = (
        "import sys, pathlib; from vmrewind.start.supersession import ask; print(ask(sys.argv[1], 'x', pathlib.Path()).unreachable)"
    )
    code, said = at_terminal([], "-c", start, url)
    assert (code, "no key is given" in said) == (0, True), said
    assert open_store(url).size("repository.json")
