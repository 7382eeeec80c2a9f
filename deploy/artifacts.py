"""From a variant to an artifact on disk: quantized in a rung's precision, exported, opened."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from deploy import foreign
from deploy.builds import MIN_SNR_DB
from deploy.manifest import LayerSensitivity
from deploy.planner import RungPlan
from deploy.variants import Variants
from deploy.workbench import Workbench, read_json, write_json
from exporters import external_data
from exporters.base import (
    CONTROLLED,
    EXPORTERS,
    GAIN_DB,
    Delegated,
    Form,
    Quantization,
    dense_twin,
    find_exporter,
)
from exporters.isolated.environment import prepare
from targets.errors import IntegrityError, WrongOutputsError

if TYPE_CHECKING:
    from exporters.capture import Captured
    from exporters.onnx import OnnxModel
    from exporters.remote import RemoteSession

ONNX = "model.onnx"
SENSITIVITY_SAMPLES = 32
SENSITIVITY_LAYERS = 50
SENSITIVITY_MACS = 1e11
HIGHEST_SNR_DB = 200.0


class OutputInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An output as export found it."""

    name: str
    shape: list[int | str]
    dtype: str


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """export.json: what the export stage knows beside the artifact."""

    file: str
    companions: list[str] = []
    size_bytes: int
    input_order: list[str]
    outputs: list[OutputInfo]
    delegated: Delegated | None


class Interface(msgspec.Struct, frozen=True, kw_only=True):
    """Inputs by name, in the graph's order, and outputs."""

    inputs: list[str]
    outputs: list[OutputInfo]


class Converted(msgspec.Struct, frozen=True, kw_only=True):
    """onnx.json: what the stage that writes ONNX knows beside the model."""

    interface: Interface
    modules: dict[str, str]
    companions: list[str] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltArtifact:
    """An artifact in the cache; `key` is what it hashes to."""

    rung: RungPlan
    key: str
    file: Path
    info: Exported

    @property
    def files(self) -> list[Path]:
        """The program, then what it needs beside it."""
        return [self.file, *(self.file.with_name(name) for name in self.info.companions)]

    @property
    def output_names(self) -> list[str]:
        """The outputs, in the artifact's order."""
        return [output.name for output in self.info.outputs]


class Artifacts:
    """Makes and opens the artifacts of one run."""

    def __init__(self, bench: Workbench, variants: Variants) -> None:
        self._bench = bench
        self._variants = variants
        self._sessions: dict[str, RemoteSession] = {}

    def make(self, rung: RungPlan) -> BuiltArtifact:
        """The rung's artifact. Raises ModelError when the runtime cannot hold it."""
        tables = self._bench.tables
        ingredients = {
            "module": self._variants.key(rung.pattern),
            "runtime": rung.runtime,
            "precision": rung.precision,
            "variant": rung.variant,
            "kernels": [self._bench.plan.saturates, self._bench.plan.signed_activations],
            "outputs": list(tables.outputs),
            "quantize": msgspec.to_builtins(tables.quantize) if rung.quantized else None,
            "calibration": self._bench.data_key("calibration") if rung.quantized else None,
            "kept_float": sorted(self._float_layers(rung)),
            "least_snr_db": self._least_snr_db(rung),
        }
        entry = self._bench.stage(
            f"export {rung.name}", ingredients, lambda folder: self._export(rung, folder)
        )
        info: Exported = read_json(entry.folder / "export.json", Exported)
        return BuiltArtifact(rung=rung, key=entry.folder.name, file=entry.folder / info.file, info=info)

    @contextmanager
    def session(self, artifact: BuiltArtifact) -> "Iterator[RemoteSession]":
        """The artifact in a process of its own, which stays for later stages unless something fails in it.

        Raises WrongOutputsError when the artifact's runtime refuses it.
        """
        if artifact.key not in self._sessions:
            self._sessions[artifact.key] = self._open(artifact)
        try:
            yield self._sessions[artifact.key]
        except BaseException:
            self.end(artifact)
            raise

    @contextmanager
    def dense_twin(self, artifact: BuiltArtifact) -> "Iterator[RemoteSession]":
        """The artifact with its masked weights filled, open for as long as the block lasts."""
        with tempfile.TemporaryDirectory() as folder:
            twin = Path(folder) / artifact.file.name
            dense_twin(artifact.rung.runtime, artifact.file, twin)
            with self._open(replace(artifact, file=twin)) as session:
                yield session

    def end(self, artifact: BuiltArtifact) -> None:
        """Ends the artifact's process, if it has one."""
        if session := self._sessions.pop(artifact.key, None):
            session.close()

    def close(self) -> None:
        """Ends all processes."""
        while self._sessions:
            self._sessions.popitem()[1].close()

    def quantization(self, rung: RungPlan) -> Quantization:
        """How the rung is quantized."""
        plan = self._bench.plan
        return Quantization(
            observer=self._bench.tables.quantize.observer,
            keep_float=tuple(sorted(self._float_layers(rung))),
            variant=rung.variant,
            reduce_range=plan.saturates,
            signed_activations=plan.signed_activations,
            transformer=any(spec.dtype.startswith("int") for spec in self._bench.specs),
            least_snr_db=self._least_snr_db(rung),
        )

    def calibration(self, rung: RungPlan) -> list[dict[str, Any]]:
        """The batches that ranges are learned from; none for a rung without integers, but checked alike."""
        data = self._bench.data.calibration
        return list(data.batches(self._bench.batch())) if rung.quantized else []

    def sensitivity(self, rung: RungPlan) -> list[LayerSensitivity]:
        """Each layer's own quantization noise, on calibration data; empty for rungs without static int8."""
        if rung.precision != "int8" or self._bench.foreign:
            return []
        kept = self._float_layers(rung)
        return [msgspec.structs.replace(each, kept_float=each.layer in kept) for each in self._measured(rung)]

    def onnx(self, rung: RungPlan) -> "OnnxModel | None":
        """The ONNX model that the rung's exporter starts from; None where it starts from a graph."""
        if EXPORTERS[rung.runtime].accepts is not Form.ONNX:
            return None
        source, _ = self._source(rung)
        return cast("OnnxModel", source)

    def _open(self, artifact: BuiltArtifact) -> "RemoteSession":
        from exporters.remote import RemoteSession

        self._prepare(artifact.rung)
        by_name = {spec.name: spec for spec in self._bench.specs}
        try:
            return RemoteSession(
                artifact.rung.runtime,
                artifact.file,
                inputs=[by_name[name] for name in artifact.info.input_order],
                outputs=artifact.output_names,
                threads=self._bench.threads,
            )
        except IntegrityError as error:
            raise WrongOutputsError(
                f"the runtime refuses what was just made for {artifact.rung.name}",
                found=error.message.rstrip("."),
            ) from error

    def _prepare(self, rung: RungPlan) -> None:
        """Makes the environment that the runtime needs, where it needs one: its licence was accepted."""
        if EXPORTERS[rung.runtime].isolated:
            prepare(rung.runtime, self._bench.announce)

    def _export(self, rung: RungPlan, folder: Path) -> None:
        exporter = find_exporter(rung.runtime)
        self._prepare(rung)
        source, form = self._source(rung)
        file = folder / f"model{exporter.suffix}"
        artifact = exporter.export(
            source,
            precision=rung.precision,
            calibration=self.calibration(rung),
            quantization=self.quantization(rung),
            file=file,
        )
        files = [file, *artifact.companions]
        info = Exported(
            file=file.name,
            companions=[each.name for each in artifact.companions],
            size_bytes=sum(each.stat().st_size for each in files),
            input_order=form.inputs,
            outputs=form.outputs,
            delegated=artifact.delegated,
        )
        write_json(folder / "export.json", info)

    def _source(self, rung: RungPlan) -> "tuple[Captured | OnnxModel, Interface]":
        """What the rung's exporter starts from, and its inputs and outputs."""
        if EXPORTERS[rung.runtime].accepts is Form.GRAPH:
            captured = self._capture(rung.pattern)
            return captured, _interface(captured)
        from exporters.onnx import OnnxModel

        ingredients = {
            "module": self._variants.key(rung.pattern),
            "outputs": list(self._bench.tables.outputs),
        }
        name = f"onnx {rung.pattern}"
        entry = self._bench.stage(name, ingredients, lambda folder: self._convert(rung.pattern, folder))
        found: Converted = read_json(entry.folder / "onnx.json", Converted)
        by_name = {spec.name: spec for spec in self._bench.specs}
        inputs = tuple(by_name[name] for name in found.interface.inputs)
        companions = tuple(entry.folder / name for name in found.companions)
        model = OnnxModel(
            file=entry.folder / ONNX, inputs=inputs, modules=found.modules, companions=companions
        )
        return model, found.interface

    def _convert(self, pattern: str, folder: Path) -> None:
        from exporters.onnx import to_onnx

        if self._bench.foreign:
            self._convert_foreign(pattern, folder)
            return
        captured = self._capture(pattern)
        model = to_onnx(captured, folder / ONNX)
        converted = Converted(
            interface=_interface(captured),
            modules=dict(model.modules),
            companions=[each.name for each in model.companions],
        )
        write_json(folder / "onnx.json", converted)

    def _convert_foreign(self, pattern: str, folder: Path) -> None:
        """The user's own ONNX model; its nodes stand for modules, so that [quantize] exclude names them."""
        bench = self._bench
        file = self._variants.onnx_file(pattern)
        model = foreign.prepared(file, bench.specs)
        companions = external_data.save(model, folder / ONNX, folder=file.parent)
        outputs = [
            OutputInfo(name=name, shape=shape, dtype=dtype)
            for name, shape, dtype in foreign.outputs_of(model, list(bench.tables.outputs), file)
        ]
        interface = Interface(inputs=[spec.name for spec in bench.specs], outputs=outputs)
        modules = {node.name: node.name for node in model.graph.node}
        converted = Converted(
            interface=interface, modules=modules, companions=[each.name for each in companions]
        )
        write_json(folder / "onnx.json", converted)

    def _capture(self, pattern: str) -> "Captured":
        from exporters.capture import capture

        bench = self._bench
        return capture(self._variants.module(pattern), bench.specs, output_names=list(bench.tables.outputs))

    def _float_layers(self, rung: RungPlan) -> set[str]:
        """The layers that stay float; in a mixed rung the fewest that halve the noise's amplitude, too."""
        excluded = set(self._bench.tables.quantize.exclude)
        if not rung.mixed:
            return excluded
        from deploy.quantization.sensitivity import choose_float_layers, combined_snr_db

        pairs = [(layer.layer, layer.snr_db) for layer in self._measured(replace(rung, mixed=False))]
        wanted = combined_snr_db([snr_db for _, snr_db in pairs]) + GAIN_DB
        return {*choose_float_layers(pairs, wanted_snr_db=wanted).layers, *excluded}

    def _least_snr_db(self, rung: RungPlan) -> float:
        """What a controlled rung must reach; others do not look at their outputs."""
        asked = self._bench.tables.parity.min_snr_db
        return asked.get(rung.precision, MIN_SNR_DB[rung.precision]) if rung.variant == CONTROLLED else 0.0

    def _measured(self, rung: RungPlan) -> list[LayerSensitivity]:
        ingredients = {
            "module": self._variants.key(rung.pattern),
            "calibration": self._bench.data_key("calibration"),
        }
        name = f"sensitivity {rung.pattern}"
        entry = self._bench.stage(name, ingredients, lambda folder: self._measure(rung, folder))
        layers: list[LayerSensitivity] = read_json(entry.folder / "sensitivity.json", list[LayerSensitivity])
        return layers

    def _measure(self, rung: RungPlan, folder: Path) -> None:
        from deploy.quantization.sensitivity import layer_sensitivity
        from exporters.capture import positional

        module = self._variants.module(rung.pattern)
        size = min(len(self._bench.data.calibration), self._samples(rung))
        inputs = self._bench.calibration_inputs(module, max(size, self._bench.batch(1)))
        called = positional(module, self._bench.specs)
        prefix = "" if called is module else "inner."
        found = layer_sensitivity(called, [inputs])
        layers = [_bounded(name.removeprefix(prefix), snr_db) for name, snr_db in found]
        write_json(folder / "sensitivity.json", layers)

    def _samples(self, rung: RungPlan) -> int:
        """As many samples as seconds of arithmetic allow: one pass a layer."""
        passes = self._variants.cost(rung.pattern).macs * SENSITIVITY_LAYERS
        return max(1, min(SENSITIVITY_SAMPLES, int(SENSITIVITY_MACS / max(passes, 1))))


def _interface(captured: "Captured") -> Interface:
    return Interface(
        inputs=[spec.name for spec in captured.inputs],
        outputs=[OutputInfo(name=o.name, shape=list(o.shape), dtype=o.dtype) for o in captured.outputs],
    )


def _bounded(layer: str, snr_db: float) -> LayerSensitivity:
    return LayerSensitivity(layer=layer, snr_db=min(round(snr_db, 2), HIGHEST_SNR_DB), kept_float=False)
