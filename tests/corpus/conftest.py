"""What the tests of whole runs share: a tiny codec, a folder of as many sounds as a module's ``SOUNDS``, its corpus."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpus_fixtures import make_folder
from corpus_runs import contents, run_here, save_codec


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_codec(tmp_path_factory.mktemp("models") / "codec")


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "sounds"
    make_folder(folder, sounds=request.module.SOUNDS)
    return folder


@pytest.fixture(scope="module")
def expected(codec: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("corpora") / "undisturbed"
    assert run_here(source, codec, out).exit_code == 0
    return contents(out)
