"""DeepSparse on a real network: masks recovered, accuracy kept as far as it is, zeros proven or dropped."""

import platform
from collections.abc import Callable
from pathlib import Path

import pytest

import deploy
from deploy.building import Build

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="the engine is x86 Linux's"
)
NAMES = (
    "deepsparse/dense-float",
    "deepsparse/dense-int8",
    "deepsparse/pruned-float",
    "deepsparse/pruned-int8",
)


@pytest.fixture(scope="module")
def built(real_project: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Build:
    """ResNet-20 for a Xeon, 80% of its inner weights zero."""
    return deploy.build(
        real_project("resnet20"),
        target="xeon",
        licences=["deepsparse"],
        sparsity=0.8,
        output_dir=tmp_path_factory.mktemp("sparse"),
    )


def test_a_masked_network_recovers_most_of_its_accuracy(built: Build) -> None:
    rungs = {rung.name: rung for rung in built.manifest.rungs}
    assert set(NAMES) <= rungs.keys()
    masked = rungs["deepsparse/pruned-float"]
    assert masked.sparsity == pytest.approx(0.8, abs=1e-3)
    assert masked.parity is not None
    assert masked.parity.snr_db >= 80
    assert masked.accuracy.drop is not None
    assert masked.accuracy.drop < 0.04  # without recovery it guesses; CIFAR-10's ten classes
    assert built.report.recovery


def test_every_masked_rung_has_its_zeros_timed(built: Build) -> None:
    for rung in built.manifest.rungs:
        assert (rung.sparse_execution is not None) == (rung.pattern == "unstructured")
        if rung.sparse_execution is not None and rung.sparse_execution.ci95[0] <= 1:
            assert rung.dropped is not None
            assert "zeros are not skipped" in rung.dropped


def test_the_licence_is_in_the_manifest_and_in_the_report(built: Build) -> None:
    assert built.manifest.licences == ["deepsparse"]
    assert "not production" in (built.folder / "report.html").read_text()
