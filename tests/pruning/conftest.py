import pytest

from tests.conftest import shallow_llama


@pytest.fixture
def llama():
    """Two blocks: most tests here train."""
    return shallow_llama()
