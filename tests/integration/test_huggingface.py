"""Hugging Face folders as models: tiny random ones, saved here, loaded and built offline."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deploy
from deploy import huggingface
from deploy.model import load_module
from deploy.project import load
from exporters.capture import call_module, flatten_outputs
from targets.errors import MissingRequirementError, ModelError, UsageError

transformers = pytest.importorskip("transformers", reason="needs the extra 'transformers'")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_DEPLOY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def saved(model: Any, folder: Path) -> Path:
    huggingface_logging = transformers.utils.logging
    huggingface_logging.disable_progress_bar()
    model.save_pretrained(folder / "model")
    huggingface_logging.enable_progress_bar()
    (folder / "deploy.toml").write_text('[model]\nsource = "model"\n')
    return folder


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=40, **SMALL)
    return saved(transformers.BertModel(config), tmp_path)


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=5, **SMALL)
    return saved(transformers.ViTForImageClassification(config), tmp_path)


def build(folder: Path) -> Any:
    return deploy.build(folder, target="galaxy-s22", precision="float32", ladder=False)


def test_an_encoder_is_built_with_the_inputs_that_its_configuration_implies(bert: Path) -> None:
    manifest = build(bert).manifest
    assert [(i.name, i.shape, i.dtype) for i in manifest.inputs] == [
        ("input_ids", ["batch", 20], "int64"),
        ("attention_mask", ["batch", 20], "int64"),
    ]
    assert [output.name for output in manifest.outputs] == ["last_hidden_state", "pooler_output"]
    assert manifest.rungs[0].parity is not None
    assert manifest.rungs[0].parity.snr_db >= 80


def test_a_vision_model_is_built_with_its_pictures_and_its_own_head(vit: Path) -> None:
    manifest = build(vit).manifest
    assert manifest.inputs[0].shape == ["batch", 3, 32, 32]
    assert [(o.name, o.shape) for o in manifest.outputs] == [("logits", ["batch", 5])]


def test_the_loaded_model_answers_as_transformers_own(bert: Path) -> None:
    project = load(bert)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 50, (3, 20)))
    arrays = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    theirs = transformers.BertModel.from_pretrained(bert / "model", local_files_only=True).eval()
    with torch.no_grad():
        mine = flatten_outputs(call_module(load_module(project), project.specs(), arrays))[0]
        torch.testing.assert_close(mine, theirs(**arrays).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_init_writes_a_deploy_toml_for_a_folder(bert: Path) -> None:
    (bert / "deploy.toml").unlink()
    done = deploy.init(bert / "model", output=bert)
    assert done.source == "model"
    assert [spec.name for spec in load(bert).specs()] == ["input_ids", "attention_mask"]
    assert load(bert).name == "model"


def test_the_fingerprint_covers_configuration_and_weights(bert: Path) -> None:
    before = huggingface.fingerprint(bert / "model")
    config = bert / "model" / "config.json"
    config.write_text(config.read_text().replace("gelu", "relu"))
    changed = huggingface.fingerprint(bert / "model")
    weights = bert / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert len({before, changed, huggingface.fingerprint(bert / "model")}) == 3


def test_missing_weights_are_named_and_never_drawn_at_random(bert: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = bert / "model" / "model.safetensors"
    state = load_file(file)
    state.pop("encoder.layer.0.output.dense.weight")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing: encoder.layer.0.output.dense.weight") as raised:
        load_module(load(bert))
    assert raised.value.exit_code == 4


def test_truncated_weights_are_an_error_of_the_model(bert: Path) -> None:
    file = bert / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load model"):
        load_module(load(bert))


def test_pickled_weights_are_not_read(bert: Path) -> None:
    (bert / "model" / "model.safetensors").rename(bert / "model" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds no safetensors"):
        load_module(load(bert))


def test_code_in_the_folder_does_not_run(bert: Path) -> None:
    folder = bert / "model"
    witness = bert / "ran"
    (folder / "evil.py").write_text(f"open({str(witness)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
    unknown = {"model_type": "evil", "architectures": ["EvilModel"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps({**config, **unknown}))
    with pytest.raises(ModelError, match="cannot load model"):
        load_module(load(bert))
    assert not witness.exists()


def test_a_configuration_without_inputs_asks_for_them(bert: Path) -> None:
    (bert / "model" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UsageError, match="does not say what its inputs are"):
        load(bert)


def test_weights_beside_a_folder_are_refused(bert: Path) -> None:
    shutil.copy(bert / "model" / "model.safetensors", bert / "own.safetensors")
    (bert / "deploy.toml").write_text('[model]\nsource = "model"\nweights = "own.safetensors"\n')
    with pytest.raises(UsageError, match="cannot go with a model that holds its own"):
        load_module(load(bert))


def test_without_transformers_the_pip_line_is_told(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(huggingface, "find_spec", lambda name: None)
    with pytest.raises(MissingRequirementError, match=r"pip install 'edge-deploy\[transformers\]'") as raised:
        load_module(load(bert))
    assert raised.value.exit_code == 3


def test_the_environment_of_the_process_is_left_as_it_was(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    load_module(load(bert))
    assert "HF_HUB_OFFLINE" not in os.environ
