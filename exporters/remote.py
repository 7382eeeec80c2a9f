"""An artifact in a process of its own: this side of worker.py."""

import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from calibration.spec import TensorSpec
from exporters.isolated.environment import command
from targets.errors import DeployError, IntegrityError, MissingRequirementError, ModelError, WrongOutputsError

Arrays = Mapping[str, np.ndarray[Any, Any]]
TIMEOUT_S = 600.0
TAIL = 400


class RemoteSession:
    """A worker that holds one artifact. Use it in a `with`; the process ends with the block.

    Raises WrongOutputsError when the runtime crashes or hangs: an artifact that does that is wrong. A runtime
    with an environment of its own must have it: nothing is installed here.
    """

    def __init__(
        self,
        runtime: str,
        file: Path,
        *,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[str],
        threads: int,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        start = command(runtime, "exporters.worker")
        self._file = file
        self._timeout_s = timeout_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the session
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*start, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        try:
            self._ask("open", runtime, str(file), tuple(inputs), tuple(outputs), threads)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """The artifact's outputs for one batch."""
        outputs: dict[str, np.ndarray[Any, Any]] = self._ask("run", dict(inputs))
        return outputs

    def prepare(self, inputs: Arrays) -> None:
        """The batch that `time` calls with."""
        self._ask("prepare", dict(inputs))

    def time(self, calls: int) -> list[int]:
        """Nanoseconds of each of so many calls."""
        samples: list[int] = self._ask("time", calls)
        return samples

    def set_threads(self, threads: int) -> None:
        """The runtime's threads from now on."""
        self._ask("set_threads", threads)

    def supported_fraction(self) -> float:
        """The share of the graph that the runtime's own kernels take; DeepSparse alone tells it."""
        fraction: float = self._ask("supported_fraction")
        return fraction

    def peak_bytes(self) -> int:
        """What loading and running the artifact added to the process's peak memory."""
        size: int = self._ask("peak_bytes")
        return size

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            self._connection.send((method, arguments))
            if not self._connection.poll(self._timeout_s):
                self._process.kill()
                raise WrongOutputsError(
                    f"{self._file.name} hangs in its runtime",
                    found=f"no answer to {method} in {self._timeout_s:g} s",
                )
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._crashed(method) from error
        if answer[0] == "ok":
            return answer[1]
        raise _translated(answer[1], answer[3])

    def _crashed(self, method: str) -> WrongOutputsError:
        code = self._process.wait()
        ending = signal.Signals(-code).name if code < 0 else f"exit {code}"
        self._log.seek(0)
        tail = self._log.read()[-TAIL:].decode(errors="replace").strip().splitlines()
        return WrongOutputsError(
            f"{self._file.name} crashed its runtime",
            found=f"{ending} in {method}{f': {tail[-1]}' if tail else ''}",
        )


def _translated(exit_code: int, message: str) -> DeployError:
    kinds: dict[int, type[DeployError]] = {3: MissingRequirementError, 4: ModelError, 8: IntegrityError}
    return kinds.get(exit_code, WrongOutputsError)(message)
