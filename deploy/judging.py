"""An artifact judged: its outputs, its accuracy on data, its latency beside the other rungs'."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from deploy.artifacts import Artifacts, BuiltArtifact
from deploy.cache import Entry
from deploy.environment import cpu_name
from deploy.manifest import SparseExecution
from deploy.variants import Variants
from deploy.workbench import Workbench, read_json, write_json
from exporters.base import EXPORTERS
from targets.errors import WrongOutputsError

if TYPE_CHECKING:
    from calibration.dataset import Dataset
    from deploy.validation.latency import Timing
    from deploy.validation.metrics import Drop
    from deploy.validation.result import Validated
    from deploy.validation.rung import Judge
    from deploy.validation.sharing import Sharing
    from deploy.validation.throughput import Rate
    from exporters.remote import RemoteSession


class Judging:
    """Validates and times the artifacts of one run."""

    def __init__(self, bench: Workbench, variants: Variants, artifacts: Artifacts) -> None:
        self._bench = bench
        self._variants = variants
        self._artifacts = artifacts

    def validate(self, artifact: BuiltArtifact) -> Entry:
        """validated.json and the golden pair. Raises WrongOutputsError for float32 that is wrong."""
        bench = self._bench
        ingredients = {
            "artifact": artifact.key,
            "module": self._variants.key(artifact.rung.pattern),
            "dense": bench.model_key(),
            "data": bench.data_key("evaluate" if bench.tables.evaluate else "calibration"),
            "metric": bench.metric_key(),
            "parity": bench.tables.parity.min_snr_db,
        }
        name = f"validate {artifact.rung.name}"
        return bench.stage(name, ingredients, lambda folder: self._validate(artifact, folder))

    def report_drop(self, artifact: BuiltArtifact) -> "Drop | None":
        """The metric on data that nothing else has seen; None without such data."""
        bench = self._bench
        if bench.tables.report is None or bench.tables.evaluate is None:
            return None
        from deploy.validation.metrics import Drop

        ingredients = {
            "artifact": artifact.key,
            "dense": bench.model_key(),
            "data": bench.data_key("report"),
            "metric": bench.metric_key(),
        }
        entry = bench.stage("report", ingredients, lambda folder: self._report(artifact, folder))
        drop: Drop = read_json(entry.folder / "report.json", Drop)
        return drop

    def time(self, artifacts: Sequence[BuiltArtifact]) -> "dict[str, Timing]":
        """The latency of each, by rung, measured in turn on this machine."""
        if not artifacts:
            return {}
        from deploy.validation.latency import Timing

        entry = self._bench.stage(
            "latency", self._measured(artifacts), lambda folder: self._time(artifacts, folder)
        )
        timings: dict[str, Timing] = read_json(entry.folder / "latency.json", dict[str, Timing])
        return timings

    def rates(self, artifacts: Sequence[BuiltArtifact]) -> "dict[str, Rate]":
        """The samples a second of each, by rung, where the objective asks for them."""
        if not artifacts or self._bench.plan.objective != "throughput":
            return {}
        from deploy.validation.throughput import Rate

        entry = self._bench.stage(
            "throughput", self._measured(artifacts), lambda folder: self._rate(artifacts, folder)
        )
        rates: dict[str, Rate] = read_json(entry.folder / "throughput.json", dict[str, Rate])
        return rates

    def _rate(self, artifacts: Sequence[BuiltArtifact], folder: Path) -> None:
        from deploy.validation.throughput import measure_rates

        with self._sessions(artifacts) as sessions:
            rates = measure_rates(sessions, self._bench.data.parity, threads=self._bench.threads)
        write_json(folder / "throughput.json", rates)

    def _measured(self, artifacts: Sequence[BuiltArtifact]) -> dict[str, Any]:
        """What a measurement of several rungs depends on."""
        return {
            "artifacts": [[artifact.rung.name, artifact.key] for artifact in artifacts],
            "machine": cpu_name(),
            "threads": self._bench.threads,
        }

    @contextmanager
    def _sessions(self, artifacts: Sequence[BuiltArtifact]) -> "Iterator[dict[str, RemoteSession]]":
        """All of them open, by rung."""
        with ExitStack() as stack:
            yield {each.rung.name: stack.enter_context(self._artifacts.session(each)) for each in artifacts}

    def sharing(self, artifact: BuiltArtifact) -> "Sharing | None":
        """How many rows should share a call; None for targets that serve nobody."""
        if not self._bench.plan.serves:
            return None
        from deploy.validation.sharing import Sharing

        ingredients = {"artifact": artifact.key, "machine": cpu_name(), "threads": self._bench.threads}
        entry = self._bench.stage("sharing", ingredients, lambda folder: self._share(artifact, folder))
        sharing: Sharing = read_json(entry.folder / "sharing.json", Sharing)
        return sharing

    def sparse_execution(self, artifact: BuiltArtifact) -> SparseExecution | None:
        """How much faster the artifact is for its zeros; None without a mask or where no twin is made."""
        masked = artifact.rung.pattern not in ("dense", "structured")
        if not masked or not EXPORTERS[artifact.rung.runtime].dense_twin:
            return None
        ingredients = {"artifact": artifact.key, "machine": cpu_name(), "threads": self._bench.threads}
        name = f"zeros {artifact.rung.name}"
        entry = self._bench.stage(name, ingredients, lambda folder: self._time_zeros(artifact, folder))
        execution: SparseExecution = read_json(entry.folder / "zeros.json", SparseExecution)
        return execution

    def _time_zeros(self, artifact: BuiltArtifact, folder: Path) -> None:
        from deploy.validation.zeros import time_zeros

        inputs = self._bench.data.parity.batch(0, self._bench.batch(1))
        with self._artifacts.session(artifact) as sparse, self._artifacts.dense_twin(artifact) as dense:
            write_json(folder / "zeros.json", time_zeros(sparse, dense, inputs))

    def _share(self, artifact: BuiltArtifact, folder: Path) -> None:
        from deploy.validation.sharing import measure_sharing

        with self._artifacts.session(artifact) as session:
            write_json(folder / "sharing.json", measure_sharing(session, self._bench.data.parity))

    def _validate(self, artifact: BuiltArtifact, folder: Path) -> None:
        from deploy.validation.rung import validate

        with self._artifacts.session(artifact) as session:
            validated = validate(
                session,
                self._variants.module(artifact.rung.pattern),
                self._reference(artifact.output_names),
                self._judge(),
                outputs=artifact.output_names,
                precision=artifact.rung.precision,
                golden_folder=folder,
            )
        if validated.wrong:
            wrong = f"{validated.wrong}; {self._where_wrong(artifact, validated)}"
            validated = msgspec.structs.replace(validated, wrong=wrong)
            if artifact.rung.precision == "float32":
                raise WrongOutputsError(f"{artifact.rung.name}: {wrong}", expected="what the module computes")
        write_json(folder / "validated.json", validated)

    def _where_wrong(self, artifact: BuiltArtifact, validated: "Validated") -> str:
        """The first stage and module whose outputs differ, or why they could not be found."""
        from deploy.validation.bisect import Case, explain

        bench, rung = self._bench, artifact.rung
        bench.announce(f"looking for what is wrong in {rung.name}")
        assert validated.parity.min_snr_db is not None
        case = Case(
            module=self._variants.module(rung.pattern),
            data=bench.data.parity,
            sizes=validated.parity.batches,
            runtime=rung.runtime,
            precision=rung.precision,
            least_snr_db=validated.parity.min_snr_db,
            artifact=artifact.file,
            inputs=artifact.info.input_order,
            outputs=artifact.output_names,
            output_names=list(bench.tables.outputs),
            calibration=self._artifacts.calibration(rung),
            quantization=self._artifacts.quantization(rung),
            threads=bench.threads,
            onnx=self._artifacts.onnx(rung),
            traceable=not bench.foreign,
        )
        return explain(case)

    def _judge(self) -> "Judge":
        from deploy.validation.rung import Judge

        bench = self._bench
        return Judge(
            parity_data=bench.data.parity,
            evaluation=bench.data.evaluation,
            evaluate=bench.tables.evaluate,
            folder=bench.folder,
            min_snr_db=bench.tables.parity.min_snr_db,
            seed=bench.seed,
        )

    def _reference(self, outputs: list[str]) -> dict[str, Any] | None:
        """The dense float model's own outputs on the evaluation data, computed once for all rungs."""
        bench, evaluation = self._bench, self._bench.data.evaluation
        if evaluation is None:
            return None
        import numpy as np

        def make(folder: Path) -> None:
            arrays = self._dense_outputs(evaluation, outputs)
            np.savez(folder / "outputs.npz", **arrays)

        ingredients = {"model": bench.model_key(), "data": bench.data_key("evaluate"), "outputs": outputs}
        entry = bench.stage("reference", ingredients, make)
        with np.load(entry.folder / "outputs.npz") as arrays:
            return {name: arrays[name] for name in outputs}

    def _dense_outputs(self, data: "Dataset", outputs: list[str]) -> dict[str, Any]:
        from deploy.validation.rung import module_predict, predict_all

        predict = module_predict(self._bench.dense(), self._bench.specs, outputs)
        return predict_all(predict, data, batch=self._bench.batch(64))

    def _report(self, artifact: BuiltArtifact, folder: Path) -> None:
        from deploy.validation.rung import measure_drop

        data, outputs = self._bench.data.report, artifact.output_names
        assert data is not None
        dense = self._dense_outputs(data, outputs)
        with self._artifacts.session(artifact) as session:
            drop = measure_drop(session.run, dense, data, self._judge(), outputs)
        write_json(folder / "report.json", drop)

    def _time(self, artifacts: Sequence[BuiltArtifact], folder: Path) -> None:
        from deploy.validation.latency import time_interleaved

        inputs = self._bench.data.parity.batch(0, self._bench.batch(1))
        with self._sessions(artifacts) as sessions:
            for session in sessions.values():
                session.prepare(inputs)
            timings = time_interleaved(sessions)
        write_json(folder / "latency.json", timings)
