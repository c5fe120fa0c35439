"""A repository, and one VM's part of it: the objects by their meaning. What lies where is layout.py's, how is a backend's."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, TypeVar

import xxhash

from vmrewind.errors import CorruptionError, RepositoryError
from vmrewind.journal.runs import RunInfo
from vmrewind.repository import layout
from vmrewind.repository.chunks import Chunks, public_key
from vmrewind.repository.description import Description, describe, read_description
from vmrewind.repository.directory import DirectoryStore
from vmrewind.repository.layout import ConfigName, SegmentName
from vmrewind.repository.manifest import Manifest
from vmrewind.repository.opening import open_store
from vmrewind.repository.pins import allow_known, allow_new, pin
from vmrewind.repository.sealed import seal, unseal
from vmrewind.repository.store import AlreadyExists, NotFound, Store, get_or_corrupt, put_verified

if TYPE_CHECKING:
    from vmrewind.repository.keys import Keys
    from vmrewind.repository.secret import Secret

_READERS: Final = 8

T = TypeVar("T", SegmentName, ConfigName)


class ReplacedError(RepositoryError):
    """Another repository is where the one that was opened was."""


class Repository:
    """An open repository. Reading needs no more rights than to read; the first write looks whether the store can be trusted."""

    def __init__(self, store: Store, description: Description, keys: Keys | None = None) -> None:
        self.store = store
        self.id = description.id
        self.encrypted = description.encrypted
        self.created_ns = description.created_ns
        self._keys = keys
        self._document = description.document
        self._probed = False
        # The backend is what tells whether chunks are looked at again, encrypted or not.
        verified = isinstance(store, DirectoryStore)
        if keys is not None:
            from vmrewind.repository.encrypted import EncryptedStore

            self.store = EncryptedStore(store, keys.objects)
        self.chunks = Chunks(self.store, public_key(self.id) if keys is None else keys.chunk_ids, verified=verified)

    @classmethod
    def init(cls, url: str, secret: Secret | None = None) -> Repository:
        """Make a repository, and its directory; with ``secret`` one that is encrypted. Raises RepositoryError if there is one."""
        allow_new(url, encrypted=secret is not None)
        repository = cls.init_in(open_store(url, create=True), secret)
        if repository.encrypted:
            pin(url, repository.id)
        return repository

    @classmethod
    def init_in(cls, store: Store, secret: Secret | None = None) -> Repository:
        """Make a repository in an open store."""
        try:
            existing = read_description(store)
        except RepositoryError:
            if store.size(layout.REPOSITORY) is not None:
                raise
        else:
            raise RepositoryError(f"{store.url}: there is a repository already (id {existing.id})", "use it as it is")
        description = describe(secrets.token_hex(16), encrypted=secret is not None)
        keys = slot = None
        if secret is not None:
            from vmrewind.repository.unlocking import new_keys

            # The key comes first: a repository that is described can be opened.
            keys, slot = new_keys(store, description.id, secret)
        try:
            store.put(layout.REPOSITORY, description.document)
        except AlreadyExists:
            # Ours, if the store was asked twice for one put.
            if store.get(layout.REPOSITORY) != description.document:
                raise RepositoryError(f"{store.url}: another process just made a repository here", "use that one") from None
        repository = cls(store, description, keys)
        try:
            repository.probe()
        except RepositoryError:
            store.delete(layout.REPOSITORY)
            if slot is not None:
                store.delete(layout.slot_key(slot))
            raise
        return repository

    @classmethod
    def open(cls, url: str) -> Repository:
        """Open what ``init`` made. Raises RepositoryError if it is not there (it is never made in passing: an unmounted mount
        point must not become a repository), if it is another one than this host knows there, from a newer version, or encrypted
        and no key given that opens it; CorruptionError if its description or its key slots are damaged."""
        store = open_store(url)
        description = read_description(store)
        allow_known(url, description)
        repository = cls._opened(store, description)
        if repository.encrypted:
            pin(url, repository.id)
        return repository

    @classmethod
    def open_in(cls, store: Store) -> Repository:
        """Open the repository in an open store."""
        return cls._opened(store, read_description(store))

    @classmethod
    def _opened(cls, store: Store, description: Description) -> Repository:
        if not description.encrypted:
            return cls(store, description)
        from vmrewind.repository.unlocking import unlock

        return cls(store, description, unlock(store, description.id))

    @property
    def url(self) -> str:
        """How the user named it."""
        return self.store.url

    def probe(self) -> None:
        """Make sure that the store can be written to and refuses to overwrite; raises RepositoryError.

        Some S3 servers accept the condition and ignore it. The object tried is the repository's own description, with the
        content that it has: a store that keeps the promise changes nothing, and so does one that breaks it.
        """
        if self._probed:
            return
        try:
            self.store.put(layout.REPOSITORY, self._document)
        except AlreadyExists:
            self.confirm()
            self._probed = True
            return
        raise RepositoryError(
            f"{self.url}: the store overwrites an object although it was told not to; history would not be safe there",
            "use a store that honours conditional writes (for S3: If-None-Match on PutObject)",
        )

    def confirm(self) -> None:
        """Make sure that what is at the URL now is still this repository; raises ReplacedError, RepositoryError if nothing is."""
        found = read_description(self.store)
        if found.id != self.id:
            raise ReplacedError(
                f"{self.url}: another repository (id {found.id}) is now where the one opened (id {self.id}) was",
                "if it was made anew on purpose there is nothing to do; if not, bring the right one back",
            )

    def put(self, key: str, data: bytes) -> None:
        """Put an object that may be there already with the same content."""
        self.probe()
        put_verified(self.store, key, data)

    def digest(self, data: bytes) -> str:
        """A digest of content for an object's name: 16 hex digits. In an encrypted repository it tells nothing without the key."""
        return xxhash.xxh3_64_hexdigest(data) if self._keys is None else self._keys.digest(data)

    def read_chunk(self, chunk_id: str) -> bytes:
        """A chunk's plain bytes, verified; raises CorruptionError naming the object."""
        return self.chunks.read(chunk_id)

    def vms(self) -> list[str]:
        """The names of the VMs that have anything here, sorted."""
        names = [layout.decode_name(component) for component in self.store.children(layout.VMS)]
        return sorted(name for name in names if self.store.size(layout.vm_key(name)) is not None)

    def vm(self, name: str) -> VmRepository:
        """One VM's part, whether or not there is anything in it."""
        return VmRepository(self, name)


class VmRepository:
    """The objects of one VM."""

    def __init__(self, repository: Repository, name: str) -> None:
        self.repository = repository
        self.name = name
        self._store = repository.store

    def register(self, uuid: str) -> None:
        """Claim the name for the VM with this uuid. Raises RepositoryError if it belongs to another VM."""
        self.repository.probe()
        try:
            self._store.put(layout.vm_key(self.name), seal({"uuid": uuid, "name": self.name}))
        except AlreadyExists:
            owner = self.uuid()
            if owner != uuid:
                raise RepositoryError(
                    f"{self.repository.url}: the name {self.name!r} belongs to another VM (uuid {owner}, this one has {uuid})",
                    f'if it is the same VM, set uuid = "{owner}" in its TOML file; if not, give this VM another name or repository',
                ) from None

    def forget(self, uuid: str) -> None:
        """Remove all that is here of the VM with this uuid, which never ran. Raises RepositoryError."""
        if self.uuid() != uuid:
            return
        own = layout.vm_key(self.name)
        for key in [key for key, _ in self._store.list(layout.vm_prefix(self.name)) if key != own]:
            self._store.delete(key)
        self._store.delete(own)

    def uuid(self) -> str | None:
        """The uuid that the name belongs to, None if nobody claimed it."""
        key = layout.vm_key(self.name)
        try:
            content = unseal(self._store.get(key), self._origin(key))
        except NotFound:
            return None
        if not isinstance(uuid := content.get("uuid"), str):
            raise CorruptionError(f"{self._origin(key)}: not a VM's description")
        return uuid

    def put_run(self, info: RunInfo) -> None:
        """Describe a run. Raises RepositoryError if it is described there in another way."""
        content = json.loads(info.to_json())
        del content["xxh3"]  # its file's own; here all of it is sealed
        self.repository.put(layout.run_key(self.name, info.run), seal(content))

    def has_run(self, run: int) -> bool:
        """Whether a run is described here."""
        return self._store.size(layout.run_key(self.name, run)) is not None

    def runs(self, but: Container[str] = ()) -> list[RunInfo]:
        """Every run described here, oldest first; ``but`` names runs that are not asked for, in the form of ``run_name``."""
        prefix = layout.run_prefix(self.name)
        keys = sorted(key for key, _ in self._store.list(prefix) if key.removeprefix(prefix).removesuffix(".json") not in but)
        if len(keys) < 2:
            return [self.run(key) for key in keys]
        with ThreadPoolExecutor(_READERS, "runs") as pool:
            return list(pool.map(self.run, keys))

    def run(self, key: str) -> RunInfo:
        """The run that an object describes; raises CorruptionError if it is damaged, missing, or another run's."""
        content = unseal(get_or_corrupt(self._store, key), self._origin(key))
        info = RunInfo.from_json(json.dumps(content).encode(), self._origin(key))
        if key != layout.run_key(self.name, info.run):
            raise CorruptionError(f"{self._origin(key)}: describes run {info.run:016x}")
        return info

    def put_config(self, time_ns: int, suffix: str, data: bytes) -> None:
        """Keep a version of the configuration, unless it is the newest one here already."""
        digest = self.repository.digest(data)
        newest = max(self.configs(), default=None)
        if newest is None or (newest.digest, newest.suffix) != (digest, suffix):
            self.repository.put(ConfigName(time_ns, digest, suffix, self.name).key, data)

    def configs(self) -> list[ConfigName]:
        """The versions of the configuration, oldest first."""
        return self._named(layout.config_prefix(self.name), layout.parse_config_key)

    def config(self, name: ConfigName) -> bytes:
        """One version's content, verified."""
        data = get_or_corrupt(self._store, name.key)
        if self.repository.digest(data) != name.digest:
            raise CorruptionError(f"{self._origin(name.key)}: the content does not match the checksum in its name")
        return data

    def put_base(self, manifest: Manifest) -> None:
        """Publish a base; its chunks must be durable."""
        self.repository.put(layout.base_key(self.name, manifest.disk, manifest.id), manifest.to_json())

    def bases(self, disk: str) -> list[str]:
        """The ids of a disk's bases, oldest first."""
        prefix = layout.base_prefix(self.name, disk)
        found = (key for key, _ in self._store.list(prefix) if key.endswith(".json"))
        return sorted(key.removeprefix(prefix).removesuffix(".json") for key in found)

    def base(self, disk: str, base_id: str) -> Manifest:
        """A base's manifest. Raises RepositoryError if there is no such base, CorruptionError if it is damaged."""
        key = layout.base_key(self.name, disk, base_id)
        try:
            data = self._store.get(key)
        except NotFound:
            raise RepositoryError(
                f"{self.repository.url}: there is no base {base_id} of disk {disk} of {self.name}", "is it the right repository?"
            ) from None
        manifest = Manifest.from_json(data, self._origin(key))
        if (manifest.disk, manifest.id) != (disk, base_id):
            raise CorruptionError(f"{self._origin(key)}: the manifest is that of base {manifest.id} of disk {manifest.disk}")
        return manifest

    def read_chunk(self, chunk_id: str) -> bytes:
        """A chunk's plain bytes, verified; raises CorruptionError naming the object."""
        return self.repository.read_chunk(chunk_id)

    def segments(self) -> list[SegmentName]:
        """The shipped segments, in order of run and first seq."""
        return self._named(layout.segment_prefix(self.name), layout.parse_segment_key)

    def sized_segments(self) -> list[tuple[SegmentName, int]]:
        """The same, in any order, each with its bytes."""
        listed = self._store.list(layout.segment_prefix(self.name))
        return [(name, size) for key, size in listed if (name := layout.parse_segment_key(self.name, key)) is not None]

    def drop_cut_segment(self, name: SegmentName) -> None:
        """Remove an object that is too short to hold a record; nothing happens to any other, or if there is none."""
        from vmrewind.repository.segment import HEADER

        size = self._store.size(name.key)
        if size is not None and size < HEADER.size:
            self._store.delete(name.key)

    def put_segment(self, name: SegmentName, data: bytes) -> None:
        """Put a shipped segment; nothing happens if it is there already with the same records."""
        from vmrewind.repository.segment import same_records

        self.repository.probe()
        try:
            self._store.put(name.key, data)
        except AlreadyExists:
            # The bytes may differ, by another version of zstd; the records must not.
            if not same_records(name, data, get_or_corrupt(self._store, name.key)):
                raise RepositoryError(
                    f"{self._origin(name.key)}: the object exists with other records; nothing was overwritten",
                    "find out what else ships this VM to this repository",
                ) from None

    def get_segment(self, name: SegmentName, offset: int = 0, length: int | None = None) -> bytes:
        """A range of a shipped segment's bytes; raises CorruptionError if the object is missing."""
        try:
            return self._store.get(name.key, offset, length)
        except NotFound as error:
            raise CorruptionError(f"{self._origin(name.key)}: the object is missing") from error

    def stored_bytes(self) -> int:
        """Bytes of the VM's own objects; chunks, which VMs share, are not among them."""
        return sum(size for _, size in self._store.list(layout.vm_prefix(self.name)))

    def _named(self, prefix: str, parse: Callable[[str, str], T | None]) -> list[T]:
        parsed = (parse(self.name, key) for key, _ in self._store.list(prefix))
        return sorted(name for name in parsed if name is not None)

    def _origin(self, key: str) -> str:
        return f"{self.repository.url}: {key}"
