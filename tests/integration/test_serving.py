"""`deploy serve` as a process, asked over the wire by tritonclient and by hand."""

import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton

ROOT = Path(__file__).parents[2]
DEPLOY = [sys.executable, "-P", "-m", "deploy.cli.main"]
FAST = ["--runtime", "onnxruntime", "--no-ladder", "--pattern", "none"]
START_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server."""

    process: "subprocess.Popen[str]"
    port: int
    log: Path

    def ask(
        self, path: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON (or text) and headers of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method or ("GET" if data is None else "POST"), path, data, headers or {})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        found = {key.lower(): value for key, value in answer.getheaders()}
        is_json = found.get("content-type", "").startswith("application/json")
        return answer.status, json.loads(text) if is_json and text else text.decode(errors="replace"), found


@contextmanager
def serving(*builds: Path, options: tuple[str, ...] = (), log: Path) -> Iterator[Server]:
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*DEPLOY, "serve", *map(str, builds), "--port", "0", *options],
            stdout=stream,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        until = time.monotonic() + START_S
        while not (found := re.search(r"listening on https?://127\.0\.0\.1:(\d+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        server = Server(process=process, port=int(found[1]), log=log)
        while True:
            try:
                if server.ask("/v2/health/ready")[0] == 200:
                    break
            except OSError:
                assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        yield server
    finally:
        process.kill()
        process.wait()


def built(folder: Path, precision: str, name: str = "digits") -> Path:
    """A build of examples/digits for this machine."""
    project = folder / f"project-{name}"
    if not project.exists():
        shutil.copytree(ROOT / "examples" / "digits", project, ignore=shutil.ignore_patterns("build"))
        config = project / "deploy.toml"
        config.write_text(config.read_text().replace('name = "digits"', f'name = "{name}"'))
    command = [*DEPLOY, "build", "-c", str(project), "--target", "host", "--precision", precision, *FAST]
    done = subprocess.run([*command, "-q"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return project / "build" / name / "host"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("serving"), "float32")


@pytest.fixture(scope="module")
def server(build: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(build, log=tmp_path_factory.mktemp("log") / "serve.log") as running:
        yield running


@pytest.fixture(scope="module")
def golden(build: Path) -> tuple[np.ndarray, np.ndarray]:
    return np.load(build / "inputs.npz")["image"], np.load(build / "expected.npz")["logits"]


def request(images: np.ndarray, **changes: Any) -> dict[str, Any]:
    tensor = {
        "name": "image", "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist(),
    }  # fmt: skip
    return {"inputs": [{**tensor, **changes}]}


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_tritonclient_gets_what_the_build_expects(
    server: Server, golden: tuple[np.ndarray, np.ndarray], binary: bool, rows: int
) -> None:
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    tensor = triton.InferInput("image", [rows, 1, 8, 8], "FP32")
    tensor.set_data_from_numpy(golden[0][:rows], binary_data=binary)
    wanted = triton.InferRequestedOutput("logits", binary_data=binary)
    answer = client.infer("digits", [tensor], outputs=[wanted], request_id="seven")
    assert answer.get_response()["id"] == "seven"
    np.testing.assert_allclose(answer.as_numpy("logits"), golden[1][:rows], atol=1e-5)


def test_metadata_says_what_the_manifest_says(server: Server, build: Path) -> None:
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    described = client.get_model_metadata("digits")
    assert described["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]
    assert described["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}]
    (version,) = described["versions"]
    index = client.get_model_repository_index()
    assert index == [{"name": "digits", "version": version, "state": "READY", "reason": ""}]
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert client.is_model_ready("digits", version)
    assert server.ask(f"/v2/models/digits/versions/{version}")[0] == 200


def test_the_example_works_and_the_document_names_every_path(server: Server) -> None:
    status, example, _ = server.ask("/v2/models/digits/example")
    assert status == 200
    assert server.ask("/v2/models/digits/infer", example)[0] == 200
    _, document, _ = server.ask("/openapi.json")
    assert document["openapi"].startswith("3.")
    for path, operations in document["paths"].items():
        for method in operations:
            data = example if path.endswith("/infer") else b"" if method == "post" else None
            assert server.ask(path, data, method=method.upper())[0] == 200, path


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("/v2/models/none/infer", {}, 404, ""),
        ("/v2/models/digits/versions/7/infer", {}, 404, ""),
        ("/v2/models/digits/infer", b"{", 400, "body"),
        ("/v2/models/digits/infer", b"", 400, "body"),
        ("/v2/models/digits/infer", b"[" * 100_000, 400, "body"),
        ("/v2/models/digits/infer", {"inputs": []}, 400, "inputs"),
    ],
)
def test_bad_requests_are_told_by_their_field(
    server: Server, path: str, body: Any, status: int, field: str
) -> None:
    found, answer, headers = server.ask(path, body)
    assert (found, answer["field"]) == (status, field)
    assert headers["x-request-id"]


def test_ids_are_kept_and_foreign_ones_cannot_break_the_log(server: Server) -> None:
    _, _, headers = server.ask("/v2", headers={"X-Request-Id": "abc-7"})
    assert headers["x-request-id"] == "abc-7"
    _, _, headers = server.ask("/v2", headers={"X-Request-Id": "x" * 5000})
    assert len(headers["x-request-id"]) == 32


def test_methods_and_paths_that_are_none_get_4xx(server: Server) -> None:
    assert server.ask("/v2/models/digits/infer")[0] == 405
    assert server.ask("/no/such/path")[0] == 404
    assert server.ask("/v2/models/..%2f..%2fetc/infer", b"{}")[0] == 404


def test_metrics_count_what_was_asked(server: Server, golden: tuple[np.ndarray, np.ndarray]) -> None:
    def count() -> float:
        _, text, _ = server.ask("/metrics")
        found = re.search(r'requests_total\{model="digits",status="200"\} (\S+)', text)
        return float(found[1]) if found else 0.0

    before = count()
    assert server.ask("/v2/models/digits/infer", request(golden[0][:1]))[0] == 200
    assert count() == before + 1


def test_half_requests_and_lost_clients_leave_the_server_well(server: Server) -> None:
    for part in (b"POST /v2/models/digits/infer HTTP/1.1\r\n", b"\x00\xff" * 50, b"GET / HTTP/9.9\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
            raw.sendall(part)
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
        raw.sendall(b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
    assert server.ask("/v2/health/ready")[0] == 200


def mutated(data: bytes, random_: random.Random) -> bytes:
    """A request with a few bytes changed, cut, repeated or moved."""
    changed = bytearray(data)
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(len(changed) or 1)
        match random_.randrange(5):
            case 0:
                changed[at : at + 1] = bytes([random_.randrange(256)])
            case 1:
                del changed[at : at + random_.randint(1, 20)]
            case 2:
                changed[at:at] = changed[at : at + random_.randint(1, 20)]
            case 3:
                changed[at:at] = random_.choice([b"-", b"9" * 20, b"[", b"]", b'"', b"null", b"e400", b"."])
            case 4:
                changed[:] = changed[:at] if at > 20 else changed
    return bytes(changed)


def test_ten_thousand_mutated_requests_get_right_answers_or_4xx_and_memory_stays(
    server: Server, golden: tuple[np.ndarray, np.ndarray]
) -> None:
    generator = random.Random(0)
    whole = json.dumps(request(np.round(golden[0][:1], 2))).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    statuses: dict[int, int] = {}
    memory = resident(server.process.pid)
    for turn in range(10_000):
        body = mutated(whole, generator)
        connection.request("POST", "/v2/models/digits/infer", body)
        answer = connection.getresponse()
        text = answer.read()
        statuses[answer.status] = statuses.get(answer.status, 0) + 1
        assert answer.status == 200 or 400 <= answer.status < 500, (body, text)
        if answer.status == 200 and turn % 10 == 0:
            # What still is a request is answered for the numbers that it now holds.
            again = server.ask("/v2/models/digits/infer", request(values_of(body)))[1]
            assert json.loads(text)["outputs"][0]["data"] == again["outputs"][0]["data"]
        elif answer.status != 200:
            assert json.loads(text)["field"] is not None
    connection.close()
    assert statuses[200] > 100
    assert statuses[400] > 1000
    assert resident(server.process.pid) < memory + 30e6


def values_of(body: bytes) -> np.ndarray:
    tensor = json.loads(body)["inputs"][0]
    return np.array(tensor["data"], np.float32).reshape(tensor["shape"])


def resident(pid: int) -> int:
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def test_a_body_over_the_limit_is_refused_whether_it_says_so_or_not(build: Path, tmp_path: Path) -> None:
    with serving(build, options=("--largest-body", "0.01"), log=tmp_path / "log") as server:
        assert server.ask("/v2/models/digits/infer", b"x" * 20_000)[0] == 413
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request(
            "POST", "/v2/models/digits/infer", iter([b"x" * 8000] * 4), encode_chunked=True,
            headers={"Transfer-Encoding": "chunked"},
        )  # fmt: skip
        assert connection.getresponse().status == 413
        connection.close()
        assert server.ask("/v2/health/ready")[0] == 200


def test_a_token_guards_all_but_the_health(build: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    with serving(build, options=("--token-file", str(tmp_path / "token")), log=tmp_path / "log") as server:
        assert server.ask("/v2/health/live")[0] == 200
        assert server.ask("/v2")[0] == 401
        assert server.ask("/v2", headers={"Authorization": "Bearer wrong"})[0] == 401
        assert server.ask("/v2", headers={"Authorization": "Bearer s3cret"})[0] == 200


def test_term_answers_what_has_arrived_and_ends_with_0(
    build: Path, tmp_path: Path, golden: tuple[np.ndarray, np.ndarray]
) -> None:
    body = request(golden[0][:1])
    with serving(build, log=tmp_path / "log") as server:
        statuses: list[int] = []
        stopping = threading.Event()

        def ask_on() -> None:
            with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as connection:
                while not stopping.is_set():
                    try:
                        connection.request("POST", "/v2/models/digits/infer", json.dumps(body))
                        answer = connection.getresponse()
                    except (OSError, http.client.HTTPException):
                        return  # the connection was closed between two requests
                    answer.read()
                    statuses.append(answer.status)

        clients = [threading.Thread(target=ask_on) for _ in range(4)]
        for client in clients:
            client.start()
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        stopping.set()
        for client in clients:
            client.join()
    assert len(statuses) > 20
    assert set(statuses) == {200}


def test_a_new_build_is_taken_up_without_a_failed_request_and_a_broken_one_is_not(
    tmp_path: Path, golden: tuple[np.ndarray, np.ndarray]
) -> None:
    build = built(tmp_path, "float32")
    body = request(golden[0][:1])
    with serving(build, log=tmp_path / "log") as server:
        statuses: list[int] = []
        versions: list[str] = []
        stopping = threading.Event()

        def ask_on() -> None:
            while not stopping.is_set():
                status, answer, _ = server.ask("/v2/models/digits/infer", body)
                statuses.append(status)
                versions.append(answer["model_version"])

        client = threading.Thread(target=ask_on)
        client.start()
        built(tmp_path, "int8")
        wait_for(lambda: len(set(versions)) == 2)
        (build / "expected.npz").write_bytes(b"broken")
        os.utime(build / "manifest.json")
        wait_for(lambda: "refused" in server.log.read_text())
        stopping.set()
        client.join()
        assert set(statuses) == {200}
        assert len(set(versions)) == 2
        assert server.ask("/v2/health/ready")[0] == 200


def wait_for(true: Any) -> None:
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_several_models_are_served_and_two_of_one_name_are_refused(
    build: Path, tmp_path: Path, golden: tuple[np.ndarray, np.ndarray]
) -> None:
    other = built(tmp_path, "float32", name="other")
    with serving(build, other, log=tmp_path / "log") as server:
        for name in ("digits", "other"):
            assert server.ask(f"/v2/models/{name}/infer", request(golden[0][:2]))[0] == 200
    again = subprocess.run(
        [*DEPLOY, "serve", str(build), str(build)], capture_output=True, text=True, check=False
    )
    assert again.returncode == 2
    assert "two builds are called digits" in again.stderr


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["no-such-folder"], 2, "no build at"),
        (["BUILD", "--port", "70000"], 2, "70000"),
        (["BUILD", "--host", "192.0.2.1", "--port", "0"], 3, "cannot listen on 192.0.2.1"),
        (["BUILD", "--token-file", "none"], 2, "token cannot be read"),
        (["BUILD", "--tls-cert", "none"], 2, "TLS needs both files"),
    ],
)
def test_what_cannot_be_served_is_told(build: Path, words: list[str], code: int, message: str) -> None:
    words = [str(build) if word == "BUILD" else word for word in words]
    done = subprocess.run([*DEPLOY, "serve", *words], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_build_is_not_served(build: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(build, copy)
    program = next(copy.glob("*.onnx"))
    program.write_bytes(program.read_bytes()[:-1] + b"x")
    words = [*DEPLOY, "serve", str(copy)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 8
    assert "is not what the manifest says" in done.stderr
