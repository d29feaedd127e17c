"""serving/blocks.py: who owns a block, what is found again, what is given away first."""

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.blocks import BlockPool

TOKENS = list(range(100, 140))


def fill(pool: BlockPool, tokens: list[int], salt: str | None = None) -> list[int]:
    """Blocks for tokens, the full ones published, as a scheduler would do it."""
    found, names = pool.match(tokens, salt)
    pool.share(found)
    blocks = found + pool.allocate(-(-len(tokens) // pool.block_size) - len(found))
    for index in range(len(found), len(tokens) // pool.block_size):
        own = tuple(tokens[index * pool.block_size : (index + 1) * pool.block_size])
        names.append(pool.publish(blocks[index], names[-1] if names else salt, own))
    return blocks


def test_every_block_but_the_null_block_is_given_once() -> None:
    pool = BlockPool(11, 4)
    assert sorted(pool.allocate(10)) == list(range(1, 11))
    assert (pool.free, pool.used, pool.cached, pool.total) == (0, 10, 0, 10)


def test_a_prefix_is_found_by_whole_blocks_and_shared() -> None:
    pool = BlockPool(11, 4)
    first = fill(pool, TOKENS[:10])
    assert pool.match(TOKENS[:9], None)[0] == first[:2]
    assert pool.match([*TOKENS[:7], 0, 0], None)[0] == first[:1]
    assert pool.match([0, *TOKENS[1:9]], None)[0] == []
    assert pool.match([], None) == pool.match([1], None) == ([], [])
    second = fill(pool, TOKENS[:9])
    assert second[:2] == first[:2] and second[2] != first[2]
    pool.check([first, second])
    assert pool.used == 4
    pool.release(first)
    pool.check([second])
    assert (pool.free, pool.used, pool.cached) == (7, 3, 0)


def test_the_last_token_is_never_found() -> None:
    pool = BlockPool(11, 4)
    blocks = fill(pool, TOKENS[:8])
    assert pool.match(TOKENS[:8], None)[0] == blocks[:1]
    assert pool.match(TOKENS[:9], None)[0] == blocks


def test_equal_tokens_behind_another_prefix_are_other_content() -> None:
    pool = BlockPool(11, 4)
    fill(pool, [1, 1, 1, 1, 5, 5, 5, 5])
    assert pool.match([2, 2, 2, 2, 5, 5, 5, 5, 0], None)[0] == []
    blocks = fill(pool, [2, 2, 2, 2, 5, 5, 5, 5])
    assert pool.match([2, 2, 2, 2, 5, 5, 5, 5, 0], None)[0] == blocks
    assert pool.match([5, 5, 5, 5, 0], None)[0] == []


def test_salts_keep_prefixes_apart() -> None:
    pool = BlockPool(11, 4)
    blocks = {salt: fill(pool, TOKENS[:8], salt) for salt in (None, "a", "b")}
    assert len({*blocks[None], *blocks["a"], *blocks["b"]}) == 6
    for salt, own in blocks.items():
        assert pool.match(TOKENS[:9], salt)[0] == own
    assert pool.match(TOKENS[:9], "c")[0] == []


def test_what_was_used_least_recently_is_given_away_first_and_chains_from_their_end() -> None:
    pool = BlockPool(6, 4)
    old = fill(pool, TOKENS[:8])
    pool.release(old)
    new = fill(pool, TOKENS[20:28])
    pool.release(new)
    assert (pool.free, pool.cached) == (1, 4)
    pool.release(fill(pool, [*TOKENS[:8], 0]))  # the old one is used again
    taken = pool.allocate(2)
    assert taken[1] == new[1]  # the free one first
    assert pool.match(TOKENS[20:29], None)[0] == new[:1]
    assert pool.match(TOKENS[:9], None)[0] == old
    pool.check([taken])


def test_a_block_given_away_is_not_found_by_its_old_content() -> None:
    pool = BlockPool(3, 4)
    blocks = fill(pool, TOKENS[:8])
    pool.release(blocks)
    (taken,) = pool.allocate(1)
    assert taken == blocks[1]
    assert pool.match(TOKENS[:9], None)[0] == blocks[:1]
    pool.allocate(1)
    assert pool.match(TOKENS[:9], None)[0] == []


def test_a_name_outlives_no_block() -> None:
    pool = BlockPool(4, 2)
    parent, child = fill(pool, [1, 2, 3, 4])
    pool.release([parent])
    taken = pool.allocate(2)
    assert parent in taken
    pool.publish(taken[0], None, (1, 2))
    assert pool.match([1, 2, 3, 4, 5], None)[0] == [taken[0]]  # the child is another parent's
    pool.release([child])
    pool.check([taken])


def test_content_computed_twice_is_published_once() -> None:
    pool = BlockPool(6, 2)
    a, b = pool.allocate(2), pool.allocate(2)
    name = pool.publish(a[0], None, (1, 2))
    assert pool.publish(b[0], None, (1, 2)) == name
    pool.publish(b[1], name, (3, 4))
    pool.release(b)
    assert (pool.free, pool.cached) == (2, 1)
    assert pool.match([1, 2, 3, 4, 5], None)[0] == [a[0], b[1]]


def test_forgetting_frees_what_is_cached_and_unpublishes_what_is_used() -> None:
    pool = BlockPool(6, 2)
    used, cached = fill(pool, [1, 2, 3, 4]), fill(pool, [5, 6])
    pool.release(cached)
    pool.forget()
    pool.check([used])
    assert (pool.free, pool.cached) == (3, 0)
    assert pool.match([1, 2, 3], None)[0] == pool.match([5, 6, 7], None)[0] == []


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(2, 12), st.integers(1, 3))
def test_the_books_are_right_after_any_traffic(data: st.DataObject, n_blocks: int, block_size: int) -> None:
    pool = BlockPool(n_blocks, block_size)
    owners: list[list[int]] = []
    content: dict[int, tuple] = {}  # what each block was last filled with, and all before it
    for _ in range(data.draw(st.integers(1, 25))):
        if owners and data.draw(st.booleans()):
            pool.release(owners.pop(data.draw(st.integers(0, len(owners) - 1))))
        else:
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=3 * block_size))
            salt = data.draw(st.sampled_from([None, "a"]))
            found, _ = pool.match(tokens, salt)
            for index, block in enumerate(found):
                assert content[block] == (salt, tokens[: (index + 1) * block_size])
            idle = sum(pool.refs[block] == 0 for block in found)
            if -(-len(tokens) // block_size) - len(found) + idle > pool.available:
                continue
            blocks = fill(pool, tokens, salt)
            for index, block in enumerate(blocks):
                content[block] = salt, tokens[: (index + 1) * block_size]
            owners.append(blocks)
        pool.check(owners)
        assert pool.free + pool.used + pool.cached == pool.total
    for blocks in owners:
        pool.release(blocks)
    assert pool.used == 0


def test_owning_nothing_is_no_case() -> None:
    pool = BlockPool(2, 4)
    assert pool.allocate(0) == []
    pool.share([])
    pool.release([])
    pool.check([])
