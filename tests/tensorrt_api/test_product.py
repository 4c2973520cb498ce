"""The product's own use of TensorRT."""

from __future__ import annotations

import pytest

from tests.tensorrt_api import child, names, stubs
from tests.tensorrt_api.bindings import VERSIONS


def test_every_name_is_in_every_version() -> None:
    assert names.problems(names.product_files()) == []


def test_tensorrt_is_imported_where_it_is_used() -> None:
    assert names.values(names.product_files()) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_every_call_has_the_right_types(version: str) -> None:
    child.require(version)
    assert stubs.check(version, names.product_files()) == []
