import contextlib
import functools
import multiprocessing
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

REPOSITORY_ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--container-base", metavar="IMAGE", help="base image for the tests that build a container")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seed random numbers, so that no test depends on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    # Tests without torch must not wait for its import.
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def repository_root() -> Path:
    return REPOSITORY_ROOT


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Function that returns a folder by name. Its content is made once for all processes of pytest-xdist.

    The folder is read-only: tests that change something copy it first.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def shared(name: str, make: Callable[[Path], None]) -> Path:
        folder, unfinished = base / name, base / f"{name}.unfinished"
        with FileLock(base / f"{name}.lock"):
            if not folder.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                make(unfinished)
                unfinished.rename(folder)
        return folder

    return shared


@pytest.fixture
def limited_files() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """Function whose context limits the size of files in bytes, as `ulimit -f` does."""
    resource = pytest.importorskip("resource")

    @contextlib.contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


class _ThreadPools:
    """A multiprocessing context whose pools use threads."""

    def __init__(self, method: str | None = None) -> None:
        self._context = _get_context(method)

    def __getattr__(self, name: str) -> Any:
        return ThreadPool if name == "Pool" else getattr(self._context, name)


_get_context = multiprocessing.get_context


@pytest.fixture(scope="session")
def keep_nnunet_small() -> Callable[[pytest.MonkeyPatch], None]:
    """Function that adapts nnU-Net to tiny data: threads instead of processes, few intensities for a fingerprint.

    Each process would import torch first, and nnU-Net draws 100,000,000 intensities, however few voxels there are.
    """

    def keep(patch: pytest.MonkeyPatch) -> None:
        from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor

        def of_few_voxels(self: Any, *args: Any, **kwargs: Any) -> None:
            initialise(self, *args, **kwargs)
            self.num_foreground_voxels_for_intensitystats = 10e3

        patch.setattr(multiprocessing, "get_context", _ThreadPools)
        initialise = _initialise_extractor()
        patch.setattr(fingerprint_extractor.DatasetFingerprintExtractor, "__init__", of_few_voxels)

    return keep


@functools.cache
def _initialise_extractor() -> Callable[..., None]:
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    return DatasetFingerprintExtractor.__init__


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
