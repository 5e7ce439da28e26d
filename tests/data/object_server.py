"""A real S3 server on this machine (moto behind HTTP), with the faults of a network between."""

import random
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hidden-secret", "AWS_DEFAULT_REGION": "us-east-1"}


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *args: Any) -> None:
        pass


class ObjectServer:
    """Serves on ``url`` until :meth:`close`. The fields may change at any time."""

    def __init__(self, port: int = 0):
        self.latency = 0.0
        """Seconds before each response."""
        self.failures = 0.0
        """Share of the requests that end with status 503."""
        self.denied = False
        """Whether all requests end with status 403."""
        self.change: Callable[[str, bytes], bytes] = lambda path, body: body
        """Changes the body of a response."""
        self.requests: list[tuple[str, str, int]] = []
        """Method, path and bytes of each response so far."""
        self._random, self._mutex = random.Random(0), threading.Lock()
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", port, self._answer, threaded=True, request_handler=Quiet)
        self.port = self._server.port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        time.sleep(self.latency)
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._mutex:
            failed = self._random.random() < self.failures
        status = "403 Forbidden" if self.denied else "503 Service Unavailable" if failed else ""
        if status:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(status, [("Content-Length", "0")])
            return [b""]
        head: list[Any] = []
        body = b"".join(self._app(environ, lambda status, headers, *rest: head.extend([status, headers])))
        changed = self.change(path, body) if method == "GET" else body
        with self._mutex:
            self.requests.append((method, path, len(changed)))
        start_response(*head)
        return [changed]

    def fetched(self) -> int:
        """Bytes of shards that were sent so far."""
        return sum(size for method, path, size in self.requests if method == "GET" and "shard-" in path)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def upload(folder: Path, address: str, **options: Any) -> None:
    """Copies a folder to an address; the options are those of its file system."""
    import fsspec

    fs, root = fsspec.core.url_to_fs(address, skip_instance_cache=True, use_listings_cache=False, **options)
    bucket = root.split("/")[0]
    if not fs.exists(bucket):
        fs.mkdir(bucket)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fs.put_file(str(path), f"{root}/{path.relative_to(folder)}")
