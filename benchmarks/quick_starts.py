"""What a host build ships against the best of each library's own quick start.

    python -m benchmarks.quick_starts [--models resnet20 ...] [--runs N] [-o FOLDER]

Builds each project for this machine, makes the artifacts of the quick starts from the same module by the
libraries' own calls and defaults, and calls all of them (a batch of one, as many threads as the build
recommends, a process each) in rounds whose order alternates. A recipe does not count whose metric drops by
more than the build may lose or, where there is no evaluation data, whose outputs agree worse than a build
asks of int8. Projects come from tests/real/prepare.py and need EDGE_DEPLOY_DATA.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

import deploy
from benchmarks import render
from benchmarks.eager import EagerSession
from benchmarks.gains import EAGER, prepared, rounds_of
from benchmarks.measuring import deliver, parser, plain, ratios, record, summarise
from calibration.compare import snr_db
from deploy.building import Build
from deploy.builds import MIN_SNR_DB
from deploy.data import ProjectData
from deploy.manifest import Stage
from deploy.model import load_module
from deploy.project import Project, load
from deploy.validation import metrics
from exporters.capture import order_inputs
from exporters.remote import RemoteSession

MODELS = ("digits", "ds_cnn", "resnet20", "resnet56", "mobilenet_v2", "resnet18", "resnet50", "minilm")
OURS = "deploy build"
COMPILED = "torch.compile"
GOAL = 1.2
SEARCH = ("latency", "throughput", "sharing", "zeros")
"""The stages that time rungs, by the first word of their names."""
OPSET = 18
CALIBRATION = 64

Arrays = dict[str, Any]
Quality = tuple[float | None, float | None]
Recipe = Callable[["Source", Path], None]


class Source:
    """What every quick start begins with: a module, an example, calibration batches of one."""

    def __init__(self, project: Project, folder: Path) -> None:
        import torch

        self.module = load_module(project)
        self.names = [spec.name for spec in order_inputs(self.module, project.specs())[0]]
        data = ProjectData(project, 0).calibration
        self.batches: list[Arrays] = [
            data.batch(index, index + 1) for index in range(min(len(data), CALIBRATION))
        ]
        first = self.batches[0]
        self.example = tuple(torch.from_numpy(np.ascontiguousarray(first[name])) for name in self.names)
        self.onnx = folder / "float.onnx"
        torch.onnx.export(
            self.module, self.example, self.onnx, input_names=self.names, dynamo=True, opset_version=OPSET,
            verbose=False, external_data=False,
        )  # fmt: skip


def ort_float(source: Source, file: Path) -> None:
    """torch.onnx.export."""
    file.write_bytes(source.onnx.read_bytes())


def ort_static(source: Source, file: Path) -> None:
    """quant_pre_process and quantize_static, as ONNX Runtime's quantization page has them."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches: Iterator[Arrays] = iter(source.batches)

        def get_next(self) -> Arrays | None:
            return next(self._batches, None)

    quantize_static(_preprocessed(source, file), str(file), Reader())


def ort_dynamic(source: Source, file: Path) -> None:
    """quantize_dynamic with its defaults."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(_preprocessed(source, file), str(file))


def _preprocessed(source: Source, file: Path) -> str:
    """The model as the page has it prepared before either quantization."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    whole = file.with_name("preprocessed.onnx")
    quant_pre_process(str(source.onnx), str(whole), skip_symbolic_shape=True)
    return str(whole)


def openvino_float(source: Source, file: Path) -> None:
    """convert_model and save_model, at the precision that OpenVINO takes by itself."""
    import openvino

    _save(openvino.Core().read_model(str(source.onnx)), file)


def openvino_int8(source: Source, file: Path) -> None:
    """nncf.quantize with its defaults."""
    import nncf
    import openvino

    model = openvino.Core().read_model(str(source.onnx))
    _save(nncf.quantize(model, nncf.Dataset(source.batches)), file)


def _save(model: Any, file: Path) -> None:
    import openvino

    from exporters.openvino import HINT

    default = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
    model.set_rt_info({"bf16": "bf16", "bfloat16": "bf16"}.get(default, "f32"), HINT)
    openvino.save_model(model, str(file))


RECIPES: dict[str, tuple[str, str, Recipe]] = {
    "onnxruntime float32": ("onnxruntime", ".onnx", ort_float),
    "onnxruntime static int8": ("onnxruntime", ".onnx", ort_static),
    "onnxruntime dynamic int8": ("onnxruntime", ".onnx", ort_dynamic),
    "openvino default": ("openvino", ".xml", openvino_float),
    "openvino nncf int8": ("openvino", ".xml", openvino_int8),
}


def entry(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A project: what it ships, each recipe's time and accuracy, and the verdict."""
    project = load(prepared(name, folder / "projects"))
    build = deploy.build(
        project,
        target="host",
        output_dir=folder / "builds",
        announce=lambda text: print(f"{name}: {text}", file=sys.stderr),
    )
    work = folder / "recipes" / name
    work.mkdir(parents=True, exist_ok=True)
    made, failed = recipes(Source(project, work), work)
    times, qualities = timed(project, build, made, arguments.runs)
    return {
        "model": name,
        "ships": build.manifest.shipped_rung,
        "search_share": search_share(build.report.stages),
        "failed": failed,
        **judged(times, qualities, _allowed(project)),
    }


def search_share(stages: Sequence[Stage]) -> float | None:
    """The part of a build's time that goes into timing its rungs; None where stages came from the cache."""
    if any(stage.cached for stage in stages):
        return None
    search = sum(stage.seconds for stage in stages if stage.name.split()[0] in SEARCH)
    return search / sum(stage.seconds for stage in stages)


def recipes(source: Source, folder: Path) -> tuple[dict[str, tuple[str, Path]], dict[str, str]]:
    """The artifacts that the quick starts give, and what the others said."""
    made, failed = {}, {}
    for name, (runtime, suffix, recipe) in RECIPES.items():
        file = folder / f"{name.replace(' ', '-')}{suffix}"
        try:
            recipe(source, file)
        except Exception as error:  # a quick start that fails is a result
            failed[name] = f"{type(error).__name__}: {str(error)[:120]}"
            continue
        made[name] = (runtime, file)
    return made, failed


def timed(
    project: Project, build: Build, made: Mapping[str, tuple[str, Path]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Quality]]:
    """Milliseconds of one call in each round, and how good the answers are."""
    specs = {spec.name: spec for spec in project.specs()}
    program = next(build.folder / file.path for file in build.manifest.files if file.role == "program")
    files = {OURS: (build.manifest.runtime, program), **made}
    outputs = [each.name for each in build.manifest.outputs]
    threads = build.manifest.recommended.threads
    with np.load(build.folder / "inputs.npz") as arrays:
        sample = {name: arrays[name][:1] for name in specs}
    with ExitStack() as stack:
        sessions: dict[str, Any] = {
            EAGER: stack.enter_context(EagerSession(project.folder, threads=threads)),
            COMPILED: stack.enter_context(EagerSession(project.folder, threads=threads, compiled=True)),
        }
        for name, (runtime, file) in files.items():
            names = outputs if name == OURS else _outputs(runtime, file)
            sessions[name] = stack.enter_context(
                RemoteSession(runtime, file, inputs=list(specs.values()), outputs=names, threads=threads)
            )
        qualities = {name: _quality(project, sessions[name]) for name in files}
        for session in sessions.values():
            session.prepare(sample)
        return rounds_of(sessions, rounds), qualities


def _outputs(runtime: str, file: Path) -> list[str]:
    """The outputs by the names that the exporter gave them."""
    if runtime == "onnxruntime":
        import onnx

        return [value.name for value in onnx.load(str(file), load_external_data=False).graph.output]
    import openvino

    return [output.any_name for output in openvino.Core().read_model(str(file)).outputs]


def _quality(project: Project, session: RemoteSession) -> Quality:
    """How much the project's metric falls, sample by sample as the recipes take them, and the SNR."""
    evaluate = project.tables.evaluate
    evaluation = ProjectData(project, 0).evaluation
    data = evaluation or ProjectData(project, 0).calibration
    import torch

    module = load_module(project)
    names = [spec.name for spec in order_inputs(module, project.specs())[0]]
    references, candidates = [], []
    with torch.no_grad():
        for index in range(len(data)):
            batch = data.batch(index, index + 1)
            answer = module(*(torch.from_numpy(np.ascontiguousarray(batch[name])) for name in names))
            leaves = torch.utils._pytree.tree_leaves(answer)
            references.append(leaves[0].numpy())
            candidates.append(next(iter(session.run(batch).values())))
    reference, candidate = np.concatenate(references), np.concatenate(candidates)
    agreement = snr_db(reference, candidate)
    if evaluate is None or evaluation is None:
        return None, agreement
    metric = metrics.find_metric(evaluate.metric)
    values = [
        float(metric.value(metric.rows(outputs, data.labels, reference).mean(axis=0)))
        for outputs in (reference, candidate)
    ]
    return (values[0] - values[1]) * (1 if metric.direction == "max" else -1), agreement


def _allowed(project: Project) -> float:
    evaluate = project.tables.evaluate
    return (evaluate.max_drop if evaluate and evaluate.max_drop is not None else 0.01) + 1e-9


def _keeps(quality: Quality, allowed: float) -> bool:
    """Whether a recipe may count: by the metric, or by the agreement that a build asks of int8."""
    drop, agreement = quality
    return agreement >= MIN_SNR_DB["int8"] if drop is None else drop <= allowed


def judged(
    times: Mapping[str, Sequence[float]], qualities: Mapping[str, Quality], allowed: float
) -> dict[str, Any]:
    """Each recipe's row, the best that keeps accuracy, and how the build stands against it."""
    rows = [
        {
            "name": name,
            "latency_ms": plain(summarise(samples)),
            "drop": qualities.get(name, (None, None))[0],
            "snr_db": qualities.get(name, (None, None))[1],
            "keeps": _keeps(qualities[name], allowed) if name in qualities else True,
            "faster_than_eager": plain(summarise(ratios(times[EAGER], samples))),
        }
        for name, samples in times.items()
    ]
    rivals = [row for row in rows if row["name"] not in (OURS, EAGER) and row["keeps"]]
    best = min(rivals, key=lambda row: row["latency_ms"]["median"])
    against = summarise(ratios(times[best["name"]], times[OURS]))
    return {"rows": rows, "best": best["name"], "against_best": plain(against)}


def options() -> argparse.ArgumentParser:
    """The common options, and which models."""
    made = parser(__doc__, runs=31, least=7)
    made.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    made.add_argument("--work", type=Path, help="keep prepared projects and builds in here")
    return made


def main(words: list[str] | None = None) -> None:
    """Builds, measures and prints."""
    arguments = options().parse_args(words)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.work or Path(scratch)).absolute()
        entries = [entry(name, arguments, folder) for name in arguments.models]
    mean = float(np.exp(np.mean([np.log(each["against_best"]["median"]) for each in entries])))
    result = record("quick_starts", {"entries": entries, "geometric_mean": mean, "goal": GOAL})
    deliver(result, render.quick_starts(result), arguments)


if __name__ == "__main__":
    main()
