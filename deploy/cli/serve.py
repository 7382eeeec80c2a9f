"""deploy serve"""

import sys
from pathlib import Path

import click

PACKAGES = {
    "serve": ("starlette", "uvicorn", "prometheus_client"),
    "grpc": ("grpc", "google.protobuf"),
}
"""What each extra must have brought."""

FOR_BUNDLES = {"grpc": ", or make the bundle again with --grpc"}


@click.command("serve")
@click.argument("builds", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="BUILD...")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free one."
)
@click.option("--grpc-port", type=click.IntRange(0, 65535), help="Also speak gRPC, on this port; 0: any.")
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Threads of the runtime [default: the build's]."
)
@click.option("--largest-body", default=64.0, show_default=True, type=click.FloatRange(0.001), help="MB.")
@click.option("--waiting", default=256, show_default=True, type=click.IntRange(1), help="Queued requests.")
@click.option(
    "--window-ms", default=2.0, show_default=True, type=click.FloatRange(0), help="Wait to share calls."
)
@click.option(
    "--timeout-s", default=30.0, show_default=True, type=click.FloatRange(0.001), help="For an answer."
)
@click.option(
    "--token-file", type=click.Path(path_type=Path), help="Holds the bearer token that callers need."
)
@click.option("--tls-cert", type=click.Path(path_type=Path), help="PEM certificate chain.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="PEM private key.")
@click.option("--log-requests", is_flag=True, help="A JSON line for each request.")
def command(
    builds: tuple[Path, ...],
    host: str,
    port: int,
    grpc_port: int | None,
    threads: int | None,
    largest_body: float,
    waiting: int,
    window_ms: float,
    timeout_s: float,
    token_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    log_requests: bool,
) -> None:
    """Serves finished builds by the Open Inference Protocol v2, until SIGTERM or Ctrl-C."""
    _require_packages("serve")
    if grpc_port is not None:
        _require_packages("grpc")
    from deploy.serving.batching import Limits
    from deploy.serving.gate import AppOptions
    from deploy.serving.server import ServeOptions, serve

    _check_tls(tls_cert, tls_key)
    app = AppOptions(
        largest_body=int(largest_body * 1e6), token=_token(token_file), log_requests=log_requests
    )
    serve(
        list(builds),
        ServeOptions(
            host=host,
            port=port,
            grpc_port=grpc_port,
            threads=threads,
            limits=Limits(window_s=window_ms / 1000, waiting=waiting, seconds=timeout_s),
            app=app,
            tls_certificate=tls_cert,
            tls_key=tls_key,
        ),
    )


def run(arguments: list[str]) -> int:
    """The command alone, as a bundle's serve.py runs it; returns the exit code."""
    from targets.errors import DeployError

    try:
        command.main(args=arguments, prog_name="serve.py", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except DeployError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    return 0


def _require_packages(extra: str) -> None:
    from targets.errors import MissingRequirementError

    lacking = [name for name in PACKAGES[extra] if not _installed(name)]
    if lacking:
        raise MissingRequirementError(
            "nothing can be served" if extra == "serve" else f"{extra} cannot be served",
            found=f"no package {', '.join(lacking)}",
            expected=f"the extra {extra!r}",
            fix=f"pip install 'edge-deploy[{extra}]'" + FOR_BUNDLES.get(extra, ""),
        )


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _check_tls(certificate: Path | None, key: Path | None) -> None:
    from targets.errors import UsageError

    if (certificate is None) != (key is None):
        raise UsageError("TLS needs both files", expected="--tls-cert and --tls-key", fix="give both or none")
    for file in (certificate, key):
        if file is not None and not file.is_file():
            raise UsageError("a TLS file is missing", found=f"no file at {file}", expected="a PEM file")


def _token(file: Path | None) -> str | None:
    from targets.errors import UsageError

    if file is None:
        return None
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "the token cannot be read", found=f"{file}: {error}", expected="a text file"
        ) from error
    if not token:
        raise UsageError(f"{file} holds no token", expected="one line with the bearer token")
    return token
