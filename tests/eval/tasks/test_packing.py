import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dropformer.eval.tasks.packing import Limits, Query, Trunk, common_prefix, pack, plan

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=14).map(tuple)


@st.composite
def queries(draw):
    distinct = sorted(draw(st.sets(tokens, min_size=1, max_size=25)))
    return [Query(t, draw(st.integers(0, len(t) - 1))) for t in distinct]


def rows(trunk: Trunk, start: int = 0):
    """(where rows start, their indices), over a trunk and those in it."""
    for row in trunk.rows:
        yield trunk.stop, row
    for inner in trunk.inner:
        assert inner.start == trunk.stop
        yield from rows(inner)


limits = st.builds(Limits, tokens=st.integers(1, 40), shared=st.integers(1, 8))


@settings(max_examples=200, deadline=None)
@given(queries(), limits)
def test_every_sequence_is_in_exactly_one_row(asked, limit):
    found = sorted(i for _, row in rows(plan(asked, limit)) for i in row)
    assert found == list(range(len(asked)))


@settings(max_examples=200, deadline=None)
@given(queries(), limits)
def test_a_row_keeps_to_its_limit_unless_one_sequence_is_longer(asked, limit):
    for start, row in rows(plan(asked, limit)):
        packed = pack([asked[i] for i in row], start)
        assert len(packed.tokens) <= limit.tokens or len(row) == 1


@settings(max_examples=200, deadline=None)
@given(queries(), limits)
def test_each_token_sees_its_own_sequence_and_nothing_else(asked, limit):
    for start, row in rows(plan(asked, limit)):
        packed = pack([asked[i] for i in row], start)
        for i, places in zip(row, packed.asked, strict=True):
            seen = np.flatnonzero(packed.visible[places[-1]])
            assert tuple(packed.tokens[seen]) == asked[i].tokens[start:]
            assert list(packed.positions[seen]) == list(range(start, len(asked[i].tokens)))
            assert list(packed.positions[places]) == list(range(asked[i].first, len(asked[i].tokens)))


@settings(max_examples=200, deadline=None)
@given(queries(), limits)
def test_a_trunk_is_shared_by_all_below_it_and_asks_nothing_itself(asked, limit):
    def check(trunk: Trunk):
        head = asked[trunk.example].tokens[: trunk.stop]
        for _, row in rows(trunk):
            for i in row:
                assert asked[i].tokens[: trunk.stop] == head
                assert asked[i].first >= trunk.stop
        for inner in trunk.inner:
            check(inner)

    check(plan(asked, limit))


@given(tokens, tokens)
def test_the_common_prefix_is_the_longest_one(one, two):
    length = common_prefix(one, two)
    assert one[:length] == two[:length]
    assert length == min(len(one), len(two)) or one[length] != two[length]


def test_a_few_shot_prefix_is_computed_once():
    prefix = tuple(range(100))
    asked = [Query((*prefix, 200 + q, *range(30)), 120) for q in range(20)]
    trunk = plan(asked, Limits(tokens=64, shared=16))
    assert (trunk.start, trunk.stop) == (0, 100)
    assert sum(len(row) for row in trunk.rows) == 20 and not trunk.inner
    assert sum(len(pack([asked[i] for i in row], 100).tokens) for row in trunk.rows) == 20 * 31


def test_subjects_have_trunks_inside_the_common_one():
    common = tuple(range(40))
    asked = sorted(
        [Query((*common, s, *range(50, 90), q, 7, 8), 82) for s in (100, 101) for q in range(30)],
        key=lambda query: query.tokens,
    )
    trunk = plan(asked, Limits(tokens=32, shared=16))
    assert trunk.stop == 40 and [inner.stop for inner in trunk.inner] == [81, 81]


def test_a_long_chain_of_prefixes_does_not_nest_without_end():
    asked = [Query(tuple(range(n)), n - 1) for n in range(1, 3000)]
    assert sum(len(row) for _, row in rows(plan(asked, Limits(tokens=16, shared=1)))) == 2999
