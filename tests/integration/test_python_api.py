"""The verbs as functions, and the shapes of models that they take: each built, run and compared."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deploy
from targets.errors import ModelError, UsageError, WrongOutputsError

HEAD = "from dataclasses import dataclass\nimport torch\nfrom torch import nn, Tensor\n"
ROOT = Path(__file__).parents[2]
Build = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_DEPLOY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Builds a float32 program of a class Model, alone; answers with its manifest."""

    def made(text: str, inputs: str, *, source: str = "model.py:Model", more: str = "") -> Any:
        (tmp_path / source.partition(":")[0]).write_text(HEAD + text, encoding="utf-8")
        (tmp_path / "deploy.toml").write_text(f'[model]\nname = "m"\nsource = "{source}"\n{inputs}{more}')
        finished = deploy.build(tmp_path, target="galaxy-s22", precision="float32", ladder=False)
        (rung,) = finished.manifest.rungs
        assert rung.parity is not None
        assert rung.parity.snr_db >= 80
        assert rung.parity.input_sensitive
        return finished.manifest

    return made


def table(name: str, shape: str, dtype: str = "float32", more: str = "") -> str:
    return f'[inputs.{name}]\nshape = {shape}\ndtype = "{dtype}"\n{more}\n'


def test_importing_deploy_loads_nothing_heavy_and_lists_its_verbs() -> None:
    code = (
        "import sys, deploy\n"
        "heavy = {'torch', 'numpy', 'click', 'rich', 'msgspec', 'executorch', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)), set(deploy.__all__) <= set(dir(deploy)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert ended.stdout.strip() == "[] True"


def test_planning_from_python_loads_no_torch() -> None:
    code = (
        f"import sys, deploy\nproject = {str(ROOT / 'examples' / 'digits')!r}\n"
        "plan = deploy.plan(project, target='galaxy-s22')\n"
        "print('torch' in sys.modules, plan.pattern, 'rungs:' in repr(plan))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert ended.stdout.strip() == "False structured True"


def test_every_public_name_resolves_and_an_unknown_one_is_told() -> None:
    assert all(callable(getattr(deploy, name)) for name in deploy.__all__)
    with pytest.raises(AttributeError, match="no attribute 'bild'"):
        deploy.bild  # noqa: B018


def test_a_build_prints_its_rungs_in_a_console_and_a_notebook(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(HEAD + "def build():\n    return nn.Linear(4, 3)\n")
    (tmp_path / "deploy.toml").write_text('[model]\nsource = "model.py:build"\n' + table("x", '["batch", 4]'))
    made = deploy.build(tmp_path, target="galaxy-s22", precision="float32", ladder=False)
    assert "dense-float" in repr(made)
    assert "<table>" in made._repr_html_()
    assert deploy.compare(made, made.folder).size.verdict == "same"


def test_several_inputs_and_outputs_keep_their_names_and_order(build: Build) -> None:
    text = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(7, 4)
    def forward(self, left: Tensor, right: Tensor):
        both = self.a(left) * self.b(right)
        return both, both.sum(1)
"""
    # deploy.toml names them in another order than forward does.
    inputs = table("right", '["batch", 7]') + table("left", '["batch", 5]')
    manifest = build(text, inputs, more="[outputs.product]\n[outputs.total]\n")
    assert [i.name for i in manifest.inputs] == ["left", "right"]
    assert [(o.name, o.shape) for o in manifest.outputs] == [("product", ["batch", 4]), ("total", ["batch"])]


def test_a_dictionary_gives_its_keys_as_outputs(build: Build) -> None:
    text = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 2)
    def forward(self, x: Tensor):
        features = torch.relu(self.body(x))
        return {"logits": self.head(features), "features": features}
"""
    manifest = build(text, table("x", '["batch", 5]'))
    assert [(o.name, o.shape) for o in manifest.outputs] == [
        ("logits", ["batch", 2]),
        ("features", ["batch", 4]),
    ]


def test_a_dataclass_gives_its_fields_as_outputs(build: Build) -> None:
    text = """
@dataclass
class Answer:
    boxes: Tensor
    scores: Tensor

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.boxes, self.scores = nn.Linear(5, 4), nn.Linear(5, 1)
    def forward(self, x: Tensor) -> Answer:
        return Answer(boxes=self.boxes(x), scores=self.scores(x).sigmoid())
"""
    manifest = build(text, table("x", '["batch", 5]'))
    assert [o.name for o in manifest.outputs] == ["boxes", "scores"]


def test_a_dynamic_batch_is_proven_at_its_bounds(build: Build) -> None:
    text = "class Model(nn.Conv2d):\n    def __init__(self):\n        super().__init__(3, 8, 3)\n"
    inputs = table("input", '["batch", 3, 9, 9]', more="dynamic.batch = { min = 3, max = 17 }\n")
    manifest = build(text, inputs)
    assert manifest.inputs[0].dynamic == {"batch": [3, 17]}
    sizes = manifest.rungs[0].parity.batches
    assert (min(sizes), max(sizes)) == (3, 17)


def test_integer_inputs_stay_integers(build: Build) -> None:
    text = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.kinds, self.head = nn.Embedding(30, 8), nn.Embedding(2, 8), nn.Linear(8, 3)
    def forward(self, ids: Tensor, kind: Tensor):
        return self.head((self.words(ids) + self.kinds(kind)).mean(1))
"""
    manifest = build(text, table("ids", '["batch", 6]', "int64") + table("kind", '["batch", 6]', "int64"))
    assert [i.dtype for i in manifest.inputs] == ["int64", "int64"]


def test_user_files_may_be_called_deploy_and_calibration_and_import_siblings(
    build: Build, tmp_path: Path
) -> None:
    (tmp_path / "calibration.py").write_text(
        "import numpy as np\nfrom widths import WIDTH\n"
        "def batches():\n    noise = np.random.default_rng(1).normal(size=(16, WIDTH))\n"
        "    return {'x': noise.astype('float32')}\n"
    )
    (tmp_path / "widths.py").write_text("WIDTH = 5\n")
    text = "import calibration\nfrom widths import WIDTH\ndef make() -> nn.Module:\n"
    text += "    assert calibration.batches\n    return nn.Linear(WIDTH, 3)\n"
    more = '[calibration]\nsource = "calibration.py:batches"\n'
    manifest = build(text, table("x", '["batch", 5]'), source="deploy.py:make", more=more)
    assert manifest.provenance.calibration_sha256


CONTROL_FLOW = {
    "cond": "torch.cond(x.sum() > 0, lambda v: v.sin(), lambda v: v.cos(), (x,))",
    "map": "map_rows(lambda row: row * 2 + 1, x)",
    "scan": "scan(lambda c, row: (c + row, c * 2 + row), torch.zeros(4), x, dim=0)[1]",
}
IMPORTS = """
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch._higher_order_ops.map import map as map_rows
"""


@pytest.mark.parametrize("name", CONTROL_FLOW)
def test_control_flow_exports_and_runs(build: Build, name: str) -> None:
    text = f"{IMPORTS}class Model(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    text += "        self.head = nn.Linear(4, 4)\n"
    text += f"    def forward(self, x: Tensor):\n        return self.head({CONTROL_FLOW[name]})\n"
    build(text, table("x", "[6, 4]"))


def test_while_loop_is_refused_by_name_with_the_modules_path(build: Build) -> None:
    text = f"""{IMPORTS}
class Loop(nn.Module):
    def forward(self, x: Tensor):
        return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * 2), (torch.tensor(0), x))[1]

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.inner = nn.Linear(4, 4), Loop()
    def forward(self, x: Tensor):
        return self.inner(self.head(x))
"""
    with pytest.raises(ModelError, match=r"while_loop.*found in inner") as raised:
        build(text, table("x", "[6, 4]"))
    assert raised.value.exit_code == 4


class Wide(nn.Module):
    """Four classes by the signs of two sums of inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(8, 16), nn.Linear(16, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


@pytest.fixture(scope="module")
def samples() -> dict[str, np.ndarray[Any, Any]]:
    x = np.random.default_rng(0).normal(size=(256, 8)).astype("float32")
    return {"x": x, "label": 2 * (x[:, :4].sum(1) > 0) + (x[:, 4:].sum(1) > 0)}


@pytest.fixture(scope="module")
def trained(samples: dict[str, np.ndarray[Any, Any]]) -> nn.Module:
    module, x, label = Wide(), torch.from_numpy(samples["x"]), torch.from_numpy(samples["label"])
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), label).backward()
        optimizer.step()
    return module.eval()


def score(samples: dict[str, np.ndarray[Any, Any]]) -> Callable[[nn.Module], float]:
    x, label = torch.from_numpy(samples["x"]), torch.from_numpy(samples["label"])
    return lambda module: float((module(x).argmax(1) == label).float().mean())


def test_compress_prunes_in_the_steps_of_the_target_and_leaves_the_module(
    trained: nn.Module, samples: dict[str, np.ndarray[Any, Any]]
) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    smaller = deploy.compress(trained, target="galaxy-s22", data={"x": samples["x"]}, sparsity=0.4)
    assert smaller.second.out_features < 64
    assert smaller.second.out_features % 8 == 0
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_compress_takes_one_array_and_recovers_with_training_data(
    trained: nn.Module, samples: dict[str, np.ndarray[Any, Any]]
) -> None:
    evaluate = score(samples)
    data = torch.from_numpy(samples["x"])
    bare = deploy.compress(trained, target="galaxy-s22", data=data, sparsity=0.78, criterion="random")
    learned = deploy.compress(
        trained, target="galaxy-s22", data=data, sparsity=0.78, criterion="random", train=samples, epochs=4
    )
    assert evaluate(learned) > evaluate(bare)
    assert learned.second.out_features == bare.second.out_features < 16


def test_compress_finds_the_largest_sparsity_that_its_score_allows(
    trained: nn.Module, samples: dict[str, np.ndarray[Any, Any]]
) -> None:
    evaluate = score(samples)
    arguments: dict[str, Any] = {"target": "galaxy-s22", "data": {"x": samples["x"]}, "evaluate": evaluate}
    smaller = deploy.compress(trained, **arguments, max_drop=0.05)
    assert evaluate(trained) - evaluate(smaller) <= 0.05
    assert smaller.second.out_features < 64
    with pytest.raises(WrongOutputsError, match="costs more than max_drop"):
        deploy.compress(trained, **{**arguments, "evaluate": lambda m: float(m is trained)}, sparsity=0.4)


def test_compress_refuses_to_guess_and_patterns_that_nothing_executes(
    trained: nn.Module, samples: dict[str, np.ndarray[Any, Any]]
) -> None:
    data = {"x": samples["x"]}
    with pytest.raises(UsageError, match="nothing says how much"):
        deploy.compress(trained, target="galaxy-s22", data=data)
    with pytest.raises(UsageError, match="2:4"):
        deploy.compress(trained, target="galaxy-s22", data=data, sparsity=0.5, pattern="2:4")
    with pytest.raises(UsageError, match="galaxy"):
        deploy.compress(trained, target="galaxy-s23", data=data, sparsity=0.5)
    with pytest.raises(ModelError, match="forward raised"):
        deploy.compress(trained, target="galaxy-s22", data={"x": samples["x"][:, :5]}, sparsity=0.5)
    nan = samples["x"].copy()
    nan[0] = np.nan
    with pytest.raises(UsageError, match="NaN"):
        deploy.compress(trained, target="galaxy-s22", data={"x": nan}, sparsity=0.5)


def test_what_prune_gives_is_saved_and_loaded_into_the_dense_factory(
    trained: nn.Module, samples: dict[str, np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    inputs = (torch.from_numpy(samples["x"][:8]),)
    result = deploy.prune(trained, inputs, sparsity=0.4, channel_multiple=8)
    deploy.save_pruned(result.module, result.delta, tmp_path / "small.safetensors")
    again = deploy.load_pruned(Wide, tmp_path / "small.safetensors").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(*inputs), result.module(*inputs))


def test_inputs_that_are_not_forwards_first_parameters_build_too(build: Build) -> None:
    text = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x, scale=None, y=None):
        return self.a(x) - self.b(y)
"""
    manifest = build(text, table("x", '["batch", 4]') + table("y", '["batch", 4]'))
    assert [entry.name for entry in manifest.inputs] == ["x", "y"]
    assert manifest.rungs[0].macs == 24
