"""The fuzzing of tests/wire, for minutes."""

import pytest

from tests.wire import test_decode_fuzz as fuzz, test_index as index, test_tree as tree
from tests.wire.twins import native_parts

pytestmark = pytest.mark.soak


def test_trees(cannot_run):
    tree.same_under(native_parts(cannot_run), 3000, 80)


def test_indexes(cannot_run):
    index.same_under(native_parts(cannot_run), 3000, 80)


def test_windows(cannot_run):
    fuzz.run(10_000, fuzz.check_windows, fuzz.WINDOWS, native_parts(cannot_run))


def test_hostile_chunks(cannot_run):
    fuzz.run(20_000, fuzz.check_refused, fuzz.REFUSED, native_parts(cannot_run))


def test_one_rule_for_what_is_malformed():
    fuzz.run(20_000, fuzz.check_agrees_with_records, {"bad": fuzz.hostile})


@pytest.mark.parametrize("block", range(10))
def test_storms(cannot_run, block):
    for seed in range(1000 + 40 * block, 1040 + 40 * block):
        fuzz.storm(native_parts(cannot_run), seed, chunk_count=8, chunk_size=900)
