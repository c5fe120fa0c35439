"""Makes the object store library's clients: which store, with which credentials, under which limits."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from vmrewind.errors import RepositoryError
from vmrewind.repository.credentials import plain_http, settings
from vmrewind.repository.objectstore import ObjectStore, Patience

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Client

    from vmrewind.repository.address import Address

_CLIENTS: Final = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
_CONNECT_SECONDS: Final = 5
_S3: Final = {
    # The store checks what arrives; buckets with object lock take no put without.
    "aws_checksum_algorithm": "SHA256",
    # Not every compatible store has the bulk call.
    "aws_disable_bulk_delete": "true",
}


def open_object_store(address: Address, url: str) -> ObjectStore:
    """The store at an address; nothing is asked of it yet. Raises RepositoryError for settings that cannot be used."""
    given = settings(address.scheme)
    make: Any = _CLIENTS[address.scheme]

    def connect(patience: Patience) -> Client:
        client: Client = make(
            address.bucket,
            config=(_S3 if address.scheme == "s3" else {}) | given,
            client_options={
                "allow_http": plain_http(address.scheme, given),
                "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
                "timeout": timedelta(seconds=patience.request_seconds),
                "user_agent": "vmrewind",
            },
            retry_config=patience.retry_config,
        )
        return client

    try:
        return ObjectStore(connect, url, address.prefix)
    except (BaseError, ValueError) as error:
        what = str(error).partition("\n")[0]
        raise RepositoryError(f"{url}: the store's settings cannot be used: {what}", "see docs/repositories.md") from None
