"""What needs the compiled step is skipped where nothing can be compiled."""

import pytest

from models.kernels.build import library


@pytest.fixture
def compiled() -> None:
    """The test runs compiled code."""
    if library() is None:
        pytest.skip("needs a C compiler")
