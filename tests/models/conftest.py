"""The family of models that a test goes through, built once for a module's tests of it."""

import pytest
from family_checks import Family


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))
