"""The models that go through one base at once."""

import pytest

from lightning_peft.adapters.segments import PASS_TOKENS, in_passes


@pytest.mark.parametrize(
    ("tokens", "runs"),
    [
        ([], []),
        ([5000], [1]),
        ([256, 256], [2]),
        ([256, 257], [1, 1]),
        ([128] * 8, [4, 4]),
        ([128] * 9, [4, 4, 1]),
        ([100, 2000, 100, 400, 100], [1, 1, 2, 1]),
    ],
)
def test_a_pass_takes_as_many_as_fill_it_and_parts_none(tokens: list[int], runs: list[int]) -> None:
    assert PASS_TOKENS["cpu"] == 512
    found = in_passes(tokens, "cpu")
    assert [run.stop - run.start for run in found] == runs
    assert [own for run in found for own in tokens[run]] == tokens
