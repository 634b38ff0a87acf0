"""One thread: the tensors of these tests are too small to be worth sharing out."""

from tests.mil.models.conftest import _one_thread

__all__ = ["_one_thread"]
