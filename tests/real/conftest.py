"""What the tests on real models share: the data's folder, and each project prepared once a session."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is marked `real`."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session")
def preparation() -> ModuleType:
    """prepare.py, which is no package's module."""
    spec = importlib.util.spec_from_file_location("_real_prepare", HERE / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def real_data(preparation: ModuleType) -> Path:
    """The folder of shared data; skips, saying where it looked, when there is none."""
    try:
        return preparation.data_folder()
    except preparation.NotObtainableError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def real_project(preparation: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A project's folder by name, prepared at the first call; skips when data or a download are missing."""
    folder = tmp_path_factory.mktemp("real")
    ready: set[str] = set()
    missing: dict[str, str] = {}

    def prepared(name: str) -> Path:
        if name not in ready | missing.keys():
            try:
                preparation.prepare(name, folder)
                ready.add(name)
            except preparation.NotObtainableError as reason:
                missing[name] = f"{name}: {reason}"
        if name in missing:
            pytest.skip(missing[name])
        return folder / name

    return prepared
