"""The pool of rollouts between first and last use, by hand: which are drawn, with which index, and which leave."""

from orchestration.buffer.reuse import ReuseOrder, ReusePool


def pool(
    *, max_uses: int, max_reuse_lag: int | None = None, order: ReuseOrder = "fifo", documents: int = 4
) -> ReusePool:
    return ReusePool(documents_per_step=documents, max_uses=max_uses, max_reuse_lag=max_reuse_lag, order=order, seed=3)


def test_fifo_staggers_the_first_batch_and_then_uses_each_in_consecutive_steps() -> None:
    reuse = pool(max_uses=2)
    assert (reuse.num_fresh, reuse.num_wanted, reuse.draw(0)) == (2, 4, [])
    reuse.enter([("a", 0), ("b", 0), ("c", 0), ("d", 0)], step=0)  # a and b have had their only use
    assert (reuse.num_wanted, reuse.draw(1)) == (2, [("c", 1), ("d", 1)])
    reuse.enter([("e", 1), ("f", 1)], step=1)
    assert (reuse.num_wanted, reuse.draw(2)) == (2, [("e", 1), ("f", 1)])
    reuse.enter([("g", 2), ("h", 2)], step=2)
    assert reuse.draw(3) == [("g", 1), ("h", 1)]
    assert reuse.num_expired == 0


def test_three_uses_are_counted() -> None:
    reuse = pool(max_uses=3, documents=3)
    reuse.enter([("a", 0), ("b", 0), ("c", 0)], step=0)  # allowed 1, 2 and 3 uses
    assert reuse.draw(1) == [("b", 1), ("c", 1)]
    reuse.enter([("d", 1)], step=1)
    assert reuse.draw(2) == [("c", 2), ("d", 1)]
    reuse.enter([("e", 2)], step=2)
    assert reuse.draw(3) == [("d", 2), ("e", 1)]


def test_age_may_reach_its_bound_and_not_exceed_it() -> None:
    reuse = pool(max_uses=2, max_reuse_lag=2)
    reuse.enter([("a", 0), ("b", 0), ("c", 0), ("d", 0)], step=0)
    reuse.enter([("e", 1), ("f", 0)], step=1)
    reuse.expire(2)
    assert (reuse.num_expired, reuse.num_wanted) == (0, 2)
    reuse.expire(3)  # c, d and f are three steps old
    assert (reuse.num_expired, reuse.num_wanted) == (3, 3)
    assert reuse.draw(3) == [("e", 1)]
    reuse.expire(9)
    assert reuse.num_expired == 3, "e has left with its last use"


def test_uniform_draws_each_at_most_once_per_step_and_as_often_as_allowed() -> None:
    reuse, uses = pool(max_uses=4, max_reuse_lag=1000, order="uniform", documents=8), dict.fromkeys("abcdefgh", 1)
    reuse.enter([(name, 0) for name in uses], step=0)
    orders = set()
    for step in range(1, 5):
        drawn = reuse.draw(step)
        assert len(drawn) == 8 - reuse.num_fresh == 6 and len({item for item, _ in drawn}) == 6
        assert all(index == uses[item] for item, index in drawn)
        uses |= {item: uses[item] + 1 for item, _ in drawn}
        orders.add(tuple(item for item, _ in drawn))
    assert max(uses.values()) <= 4 and sum(uses.values()) == 8 + 4 * 6 and len(orders) == 4
