"""`deploy serve --grpc-port` as a process, asked by tritonclient and by bytes of our own."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from google.protobuf import descriptor_pb2
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from calibration.spec import TensorSpec
from deploy.serving.grpc_messages import MESSAGES, message
from deploy.serving.grpc_protocol import CONTENTS, decoded, parse, respond
from deploy.serving.protocol import DATATYPES, RequestError

ROOT = Path(__file__).parents[2]
DEPLOY = [sys.executable, "-P", "-m", "deploy.cli.main"]
FLAGS = ["--target", "host", "--runtime", "onnxruntime", "--no-ladder", "--pattern", "none", "-q"]
INFER = "/inference.GRPCInferenceService/ModelInfer"
REFUSED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
START_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server."""

    process: "subprocess.Popen[str]"
    address: str
    http_port: int
    log: Path


@contextmanager
def serving(build: Path, *options: str, log: Path) -> Iterator[Server]:
    words = [*DEPLOY, "serve", str(build), "--port", "0", "--grpc-port", "0", *options]
    with log.open("w") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT, text=True)
    try:
        until = time.monotonic() + START_S
        while not (found := re.search(r"listening on grpcs?://(127\.0\.0\.1:\d+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        port = re.search(r"listening on https?://127\.0\.0\.1:(\d+)", log.read_text())
        assert port is not None
        yield Server(process=process, address=found[1], http_port=int(port[1]), log=log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/digits for this machine."""
    out = tmp_path_factory.mktemp("build")
    source = str(ROOT / "examples" / "digits")
    words = [*DEPLOY, "build", "-c", source, "-o", str(out), "--precision", "float32", *FLAGS]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / "digits" / "host"


@pytest.fixture(scope="module")
def server(build: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(build, "--log-requests", log=tmp_path_factory.mktemp("log") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.address) as asking:
        yield asking


@pytest.fixture(scope="module")
def golden(build: Path) -> tuple[np.ndarray, np.ndarray]:
    return np.load(build / "inputs.npz")["image"], np.load(build / "expected.npz")["logits"]


def tensor(images: np.ndarray, *, name: str = "image", datatype: str = "FP32") -> triton.InferInput:
    made = triton.InferInput(name, list(images.shape), datatype)
    made.set_data_from_numpy(images)
    return made


def typed(images: np.ndarray) -> Any:
    """A request with its numbers in `contents`, by tritonclient's own messages."""
    request = service_pb2.ModelInferRequest(model_name="digits", id="typed")
    made = request.inputs.add(name="image", datatype="FP32", shape=images.shape)
    made.contents.fp32_contents.extend(images.ravel().tolist())
    return request


@contextmanager
def raw_calls(server: Server) -> Iterator[Any]:
    """ModelInfer from bytes to bytes."""
    with grpc.insecure_channel(server.address) as channel:
        yield channel.unary_unary(INFER)


def fields(descriptor: Any) -> list[Any]:
    """A message's fields, each with all that decides its bytes."""
    copy = descriptor_pb2.DescriptorProto()
    descriptor.CopyToProto(copy)
    return [(f.name, f.number, f.type, f.label, f.type_name, f.HasField("oneof_index")) for f in copy.field]


@pytest.mark.parametrize("name", MESSAGES)
def test_the_table_is_the_protocol_as_tritonclient_generated_it(name: str) -> None:
    theirs = service_pb2.DESCRIPTOR.pool.FindMessageTypeByName(f"inference.{name}")
    ours = message(name).DESCRIPTOR
    assert fields(ours) == fields(theirs)
    assert ours.file.pool is not theirs.file.pool
    for field in ours.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entry = theirs.fields_by_name[field.name].message_type
            assert fields(field.message_type) == fields(entry)


@pytest.mark.parametrize("dtype", DATATYPES)
@pytest.mark.parametrize("raw", [True, False])
def test_every_datatype_goes_in_and_out_unchanged(dtype: str, raw: bool) -> None:
    values = np.array([0, 1, 1, 0, 1], dtype)
    spec = TensorSpec(name="x", shape=(5,), dtype=dtype)
    request = message("ModelInferRequest")(id="a7")
    made = request.inputs.add(name="x", datatype=DATATYPES[dtype], shape=[5])
    if raw:
        request.raw_input_contents.append(values.tobytes())
    elif dtype in CONTENTS:
        getattr(made.contents, CONTENTS[dtype]).extend(values.tolist())
    else:
        with pytest.raises(RequestError, match="raw_input_contents"):
            parse(request, [spec], ["y"])
        return
    parsed = parse(decoded("ModelInferRequest", request.SerializeToString()), [spec], ["y"])
    assert parsed.arrays["x"].dtype == values.dtype
    assert np.array_equal(parsed.arrays["x"], values)
    answer = service_pb2.ModelInferResponse.FromString(
        respond({"y": parsed.arrays["x"]}, parsed, model="m", version="1")
    )
    back = triton.InferResult(answer)
    assert answer.outputs[0].datatype == np_to_triton_dtype(values.dtype)
    assert np.array_equal(back.as_numpy("y"), values)
    assert answer.id == "a7"


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_tritonclient_gets_what_the_build_expects(
    client: triton.InferenceServerClient, golden: tuple[np.ndarray, np.ndarray], rows: int
) -> None:
    wanted = [triton.InferRequestedOutput("logits")]
    answer = client.infer("digits", [tensor(golden[0][:rows])], outputs=wanted, request_id="seven")
    assert answer.get_response().id == "seven"
    np.testing.assert_allclose(answer.as_numpy("logits"), golden[1][:rows], atol=1e-5)


def test_typed_contents_answer_like_raw_ones(
    server: Server, client: triton.InferenceServerClient, golden: tuple[np.ndarray, np.ndarray]
) -> None:
    with raw_calls(server) as call:
        answer = service_pb2.ModelInferResponse.FromString(call(typed(golden[0][:2]).SerializeToString()))
    logits = triton.InferResult(answer).as_numpy("logits")
    raw = client.infer("digits", [tensor(golden[0][:2])]).as_numpy("logits")
    np.testing.assert_array_equal(logits, raw)


def test_metadata_and_health_say_what_the_manifest_says(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    described = client.get_model_metadata("digits", as_json=True)
    assert described["inputs"] == [{"name": "image", "datatype": "FP32", "shape": ["-1", "1", "8", "8"]}]
    assert described["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": ["-1", "10"]}]
    (version,) = described["versions"]
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", version)
    assert client.get_model_repository_index(as_json=True)["models"] == [
        {"name": "digits", "version": version, "state": "READY"}
    ]
    told = client.get_server_metadata()
    assert (told.name, list(told.extensions)) == ("edge-deploy", ["model_repository"])


def changed(images: np.ndarray, change: str) -> Any:
    """A request that is wrong in one way."""
    request = typed(images)
    (made,) = request.inputs
    match change:
        case "model":
            request.model_name = "none"
        case "version":
            request.model_version = "7"
        case "no input":
            del request.inputs[:]
        case "two inputs":
            request.inputs.add().CopyFrom(made)
        case "name":
            made.name = "picture"
        case "datatype":
            made.datatype = "FP64"
        case "shape":
            made.shape[:] = [-1, 1, 8, 8]
        case "rows":
            made.shape[:] = [10**12, 1, 8, 8]
        case "too few":
            del made.contents.fp32_contents[0]
        case "NaN":
            made.contents.fp32_contents[0] = float("nan")
        case "other contents":
            made.contents.int_contents.append(1)
        case "both contents":
            request.raw_input_contents.append(images.tobytes())
        case "raw size":
            made.ClearField("contents")
            request.raw_input_contents.append(images.tobytes()[1:])
        case "raw count":
            made.ClearField("contents")
            request.raw_input_contents.extend([images.tobytes()] * 2)
        case "output":
            request.outputs.add(name="none")
        case "output twice":
            request.outputs.add(name="logits")
            request.outputs.add(name="logits")
    return request


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("model", "there is no model 'none'"),
        ("version", "digits has no version '7'"),
        ("no input", "inputs: found none"),
        ("two inputs", "inputs: found image, image"),
        ("name", "inputs: found picture"),
        ("datatype", r"inputs\[0\]\.datatype"),
        ("shape", r"inputs\[0\]\.shape"),
        ("rows", r"inputs\[0\]\.shape"),
        ("too few", r"inputs\[0\]\.contents\.fp32_contents: has 63"),
        ("NaN", r"inputs\[0\]\.contents\.fp32_contents: holds NaN"),
        ("other contents", r"inputs\[0\]\.contents\.int_contents: is set, expected fp32_contents"),
        ("both contents", r"inputs\[0\]\.contents: stands beside raw_input_contents"),
        ("raw size", r"raw_input_contents\[0\]: has 255 bytes"),
        ("raw count", "raw_input_contents: has 2 entries for 1 inputs"),
        ("output", r"outputs\[0\]\.name"),
        ("output twice", "outputs: names one twice"),
    ],
)
def test_what_is_wrong_is_told_by_its_field_and_code(
    server: Server, golden: tuple[np.ndarray, np.ndarray], change: str, field: str
) -> None:
    with raw_calls(server) as call, pytest.raises(grpc.RpcError) as refused:
        call(changed(golden[0][:1], change).SerializeToString())
    lacking = change in ("model", "version")
    assert refused.value.code() is REFUSED[1 if lacking else 0]
    assert re.search(field, refused.value.details())


def test_bytes_that_are_no_message_and_methods_that_are_none_are_told(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(INFER)(b"\xff\xff\xff")
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.value.details() == "message: is no ModelInferRequest"
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(INFER.replace("ModelInfer", "ModelConfig"))(b"")
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_ids_are_kept_and_each_call_has_its_line_and_its_count(
    server: Server, golden: tuple[np.ndarray, np.ndarray]
) -> None:
    with grpc.insecure_channel(server.address) as channel:
        asked = typed(golden[0][:1]).SerializeToString()
        _, call = channel.unary_unary(INFER).with_call(asked, metadata=[("x-request-id", "abc-7")])
        assert dict(call.trailing_metadata())["x-request-id"] == "abc-7"
        _, call = channel.unary_unary(INFER).with_call(asked, metadata=[("x-request-id", "x" * 500)])
        assert len(dict(call.trailing_metadata())["x-request-id"]) == 32
    line = next(json.loads(x) for x in server.log.read_text().splitlines() if '"abc-7"' in x)
    assert (line["method"], line["path"], line["status"]) == ("gRPC", INFER, 200)
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    found = re.search(r'requests_total\{model="digits",status="200"\} (\S+)', text)
    assert found is not None
    assert float(found[1]) >= 2


def mutated(data: bytes, generator: random.Random) -> bytes:
    """A message with a few bytes changed, cut, repeated or moved."""
    changed = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(changed) or 1)
        match generator.randrange(4):
            case 0:
                changed[at : at + 1] = bytes([generator.randrange(256)])
            case 1:
                del changed[at : at + generator.randint(1, 20)]
            case 2:
                changed[at:at] = changed[at : at + generator.randint(1, 20)]
            case 3:
                changed[:] = changed[:at] if at > 20 else changed
    return bytes(changed)


@pytest.mark.parametrize("raw", [True, False])
def test_a_thousand_mutated_requests_of_a_kind_get_right_answers_or_their_code(
    server: Server, client: triton.InferenceServerClient, golden: tuple[np.ndarray, np.ndarray], raw: bool
) -> None:
    generator = random.Random(0)
    request = typed(golden[0][:1])
    if raw:
        request.inputs[0].ClearField("contents")
        request.raw_input_contents.append(golden[0][:1].tobytes())
    whole = request.SerializeToString()
    codes: dict[Any, int] = {}
    with raw_calls(server) as call:
        for _ in range(1000):
            body = mutated(whole, generator)
            try:
                answer = call(body)
                code = grpc.StatusCode.OK
            except grpc.RpcError as refused:
                code = refused.code()
            codes[code] = codes.get(code, 0) + 1
            if code is grpc.StatusCode.OK:
                # What still is a request is answered for the numbers that it now holds.
                again = client.infer("digits", [tensor(values_of(body))]).as_numpy("logits")
                logits = triton.InferResult(service_pb2.ModelInferResponse.FromString(answer))
                np.testing.assert_array_equal(logits.as_numpy("logits"), again)
    assert set(codes) <= {grpc.StatusCode.OK, *REFUSED}, codes
    assert codes[grpc.StatusCode.OK] > 20, codes
    assert codes[grpc.StatusCode.INVALID_ARGUMENT] > 200, codes


def values_of(body: bytes) -> np.ndarray:
    request = service_pb2.ModelInferRequest.FromString(body)
    made = request.inputs[0]
    if request.raw_input_contents:
        return np.frombuffer(request.raw_input_contents[0], np.float32).reshape(made.shape)
    return np.array(made.contents.fp32_contents, np.float32).reshape(made.shape)


def test_calls_at_once_each_get_their_own_answer(
    server: Server, golden: tuple[np.ndarray, np.ndarray]
) -> None:
    images, expected = golden
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(INFER)
        asked = [call.future(typed(images[i % 8 : i % 8 + 1]).SerializeToString()) for i in range(200)]
        for index, future in enumerate(asked):
            answer = triton.InferResult(service_pb2.ModelInferResponse.FromString(future.result()))
            np.testing.assert_allclose(answer.as_numpy("logits")[0], expected[index % 8], atol=1e-5)


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_a_message_over_the_limit_is_refused_packed_or_not(
    build: Path, tmp_path: Path, compression: str | None
) -> None:
    with (
        serving(build, "--largest-body", "0.01", log=tmp_path / "log") as server,
        triton.InferenceServerClient(server.address) as client,
    ):
        large = tensor(np.zeros((64, 1, 8, 8), np.float32))
        with pytest.raises(InferenceServerException) as refused:
            client.infer("digits", [large], compression_algorithm=compression)
        assert refused.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
        assert client.is_server_ready()


def test_a_token_guards_all_but_the_health(
    build: Path, tmp_path: Path, golden: tuple[np.ndarray, np.ndarray]
) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    with (
        serving(build, "--token-file", str(tmp_path / "token"), log=tmp_path / "log") as server,
        triton.InferenceServerClient(server.address) as client,
    ):
        assert client.is_server_live()
        assert client.is_server_ready()
        image = tensor(golden[0][:1])
        for headers in (None, {"authorization": "Bearer wrong"}):
            with pytest.raises(InferenceServerException) as refused:
                client.infer("digits", [image], headers=headers)
            assert refused.value.status() == "StatusCode.UNAUTHENTICATED"
            with pytest.raises(InferenceServerException):
                client.get_model_repository_index(headers=headers)
        right = {"authorization": "Bearer s3cret"}
        assert client.infer("digits", [image], headers=right).as_numpy("logits").shape == (1, 10)


def test_it_encrypts_with_the_same_files(
    build: Path, tmp_path: Path, golden: tuple[np.ndarray, np.ndarray]
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = [
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
        "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate),
    ]  # fmt: skip
    if shutil.which("openssl") is None:
        pytest.skip("no certificate could be made: no openssl on this machine")
    subprocess.run(words, check=True, capture_output=True)
    tls = ("--tls-cert", str(certificate), "--tls-key", str(key))
    with serving(build, *tls, log=tmp_path / "log") as server:
        address = server.address.replace("127.0.0.1", "localhost")
        with triton.InferenceServerClient(address, ssl=True, root_certificates=str(certificate)) as client:
            answer = client.infer("digits", [tensor(golden[0][:1])]).as_numpy("logits")
        np.testing.assert_allclose(answer, golden[1][:1], atol=1e-5)
        with (
            grpc.insecure_channel(server.address) as plain,
            pytest.raises(grpc.RpcError),
        ):
            plain.unary_unary(INFER)(b"", timeout=5)


def test_term_answers_what_has_arrived_and_ends_with_0(
    build: Path, tmp_path: Path, golden: tuple[np.ndarray, np.ndarray]
) -> None:
    body = typed(golden[0][:1]).SerializeToString()
    with serving(build, log=tmp_path / "log") as server:
        codes: list[Any] = []

        def ask_on() -> None:
            with raw_calls(server) as call:
                while True:
                    try:
                        call(body)
                    except grpc.RpcError as refused:
                        codes.append(refused.code())
                        return
                    codes.append(grpc.StatusCode.OK)

        clients = [threading.Thread(target=ask_on) for _ in range(4)]
        for each in clients:
            each.start()
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        for each in clients:
            each.join()
    assert codes.count(grpc.StatusCode.OK) > 20
    assert codes.count(grpc.StatusCode.UNAVAILABLE) == 4  # each caller's last, after the server had stopped
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}


@pytest.fixture
def waiting_build(build: Path, tmp_path: Path) -> Path:
    """A build whose calls are said to be long and worth sharing, so that requests wait for others."""
    copy = tmp_path / "waiting"
    shutil.copytree(build, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["recommended"]["shared_rows"] = 64
    for rung in manifest["rungs"]:
        rung["latency"]["median_ms"] = 5.0
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_what_waits_is_answered_at_the_end_and_a_caller_that_left_is_let_go(
    waiting_build: Path, tmp_path: Path, golden: tuple[np.ndarray, np.ndarray]
) -> None:
    body = typed(golden[0][:1]).SerializeToString()
    options = ("--window-ms", "3000", "--log-requests")
    with serving(waiting_build, *options, log=tmp_path / "log") as server, raw_calls(server) as call:
        with pytest.raises(grpc.RpcError) as late:
            call(body, timeout=0.3)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        left = call.future(body)
        waits = call.future(body)
        time.sleep(0.3)
        left.cancel()
        server.process.send_signal(signal.SIGTERM)
        assert triton.InferResult(service_pb2.ModelInferResponse.FromString(waits.result(20))) is not None
        assert server.process.wait(20) == 0
    lines = [json.loads(x) for x in server.log.read_text().splitlines() if x.startswith("{")]
    assert sorted(line["status"] for line in lines) == [200, 499, 499]


def test_more_than_may_wait_are_refused_and_so_is_what_takes_too_long(
    waiting_build: Path, tmp_path: Path, golden: tuple[np.ndarray, np.ndarray]
) -> None:
    options = ("--window-ms", "60000", "--waiting", "1", "--timeout-s", "1")
    with serving(waiting_build, *options, log=tmp_path / "log") as server, raw_calls(server) as call:
        alone = call.future(typed(golden[0][:1]).SerializeToString())
        assert alone.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert alone.details() == "no answer within 1 s"
        # Each of these fills a shared call, and takes longer than the next one needs to arrive.
        full = typed(np.zeros((64, 1, 8, 8), np.float32)).SerializeToString()
        codes = {each.code() for each in [call.future(full) for _ in range(400)]}
    assert codes == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}


def test_a_taken_port_is_told(build: Path, server: Server) -> None:
    port = server.address.rpartition(":")[2]
    words = [*DEPLOY, "serve", str(build), "--port", "0", "--grpc-port", port]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 3
    assert f"gRPC cannot listen on 127.0.0.1 port {port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_lacking_package_is_told_with_what_to_install(build: Path) -> None:
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'grpc' else find(name, *rest)\n"
        "from deploy.cli.serve import run\n"
        f"sys.exit(run([{str(build)!r}, '--grpc-port', '0']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 3
    assert "no package grpc" in done.stderr
    assert "pip install 'edge-deploy[grpc]'" in done.stderr


def test_grpc_is_loaded_only_where_it_is_asked_for() -> None:
    code = (
        "import sys, deploy.cli.serve, deploy.serving.server, deploy.bundling.server\n"
        "print([name for name in ('grpc', 'google.protobuf') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
