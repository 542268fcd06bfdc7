"""What every test may ask for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)  # --hypothesis-profile=search
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tracked(repository: Path) -> list[Path]:
    """Every file and link that git holds, or would hold after `git add`, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True).stdout
    names = sorted(set(listed.rstrip("\0").split("\0")))
    return [Path(name) for name in names if os.path.lexists(repository / name)]


@pytest.fixture(scope="session")
def spir_data() -> Path:
    """The folder of real data, named by the environment variable SPIR_DATA."""
    if not os.environ.get("SPIR_DATA"):
        pytest.skip("needs SPIR_DATA: the folder of real networks and images")
    folder = Path(os.environ["SPIR_DATA"])
    if not folder.is_dir():
        pytest.fail(f"SPIR_DATA names {folder}, which is no folder")
    return folder
