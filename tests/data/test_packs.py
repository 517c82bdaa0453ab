from __future__ import annotations

import bisect

import numpy as np
import pytest

from hypershard.data.packs import best_fit, one_each


def plan_of(lengths, context_tokens, long_documents="split", first=0):
    lengths = np.asarray(lengths, dtype=np.int64)
    starts = first + np.cumsum(lengths) - lengths
    num_tokens = first + int(lengths.sum())
    return best_fit(starts, num_tokens=num_tokens, context_tokens=context_tokens, long_documents=long_documents)


def skewed(num_documents, seed=0):
    """Lengths as web text has them: most short, some very long."""
    return np.maximum(1, np.random.default_rng(seed).lognormal(5, 1.3, num_documents)).astype(np.int64)


def one_by_one(lengths, size):
    """Best-fit decreasing as a textbook writes it: tokens in each pack."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(free, length)
        left = free.pop(place) - length if place < len(free) else size - length
        bisect.insort(free, left)
    return sorted(size - left for left in free)


def first_fit(lengths, size):
    """Packs of documents in the order in which they come, each into the first with room."""
    free: list[int] = []
    for length in lengths:
        place = next((place for place, left in enumerate(free) if left >= length), None)
        if place is None:
            free.append(size - length)
        else:
            free[place] -= length
    return len(free)


def fills(plan):
    return sorted(int(plan.pieces_of(pack)[1].sum()) for pack in range(plan.num_packs))


@pytest.mark.parametrize("long_documents", ["split", "truncate", "drop"])
@pytest.mark.parametrize("context_tokens", [1, 2, 7, 64, 300])
def test_packs_are_those_of_best_fit_decreasing_one_by_one(long_documents, context_tokens):
    lengths = np.minimum(skewed(400), 900)
    plan = plan_of(lengths, context_tokens, long_documents)
    assert fills(plan) == one_by_one(plan.piece_lengths.tolist(), context_tokens + 1)
    assert plan.piece_lengths.min() >= 2 and max(fills(plan)) <= context_tokens + 1


def test_every_token_but_the_first_of_a_document_is_predicted_once():
    lengths = np.array([1, 0, 2, 9, 10, 11, 12, 13, 57, 3, 1])
    plan = plan_of(lengths, context_tokens=5, first=100)
    predicted = np.zeros(lengths.sum() + 100, dtype=int)
    for start, length in zip(plan.piece_starts, plan.piece_lengths, strict=True):
        predicted[start + 1 : start + length] += 1
    expected = np.ones_like(predicted)
    expected[:100] = 0
    starts = 100 + np.cumsum(lengths) - lengths
    expected[starts[lengths > 0]] = 0
    assert predicted.tolist() == expected.tolist()
    assert plan.num_split_documents == 6 and plan.num_short_documents == 3
    assert plan.num_cut_tokens == 2  # the two documents of one token


def test_a_document_that_just_fits_is_whole():
    plan = plan_of([6, 7], context_tokens=5)
    assert plan.piece_lengths.tolist() == [6, 6, 2] and plan.piece_starts.tolist() == [0, 6, 11]
    assert plan.num_split_documents == 1


def test_long_documents_are_truncated_or_dropped():
    truncated = plan_of([3, 20, 6], context_tokens=5, long_documents="truncate")
    assert truncated.piece_starts.tolist() == [0, 3, 23] and truncated.piece_lengths.tolist() == [3, 6, 6]
    assert (truncated.num_truncated_documents, truncated.num_cut_tokens) == (1, 14)
    dropped = plan_of([3, 20, 6], context_tokens=5, long_documents="drop")
    assert dropped.piece_starts.tolist() == [0, 23] and dropped.piece_lengths.tolist() == [3, 6]
    assert (dropped.num_dropped_documents, dropped.num_cut_tokens) == (1, 20)
    assert truncated.num_split_documents == dropped.num_split_documents == dropped.num_truncated_documents == 0


def test_pieces_of_a_pack_are_in_the_order_of_the_tokens_and_so_are_the_packs():
    plan = plan_of(np.minimum(skewed(2000), 100), context_tokens=100)
    firsts = []
    for pack in range(plan.num_packs):
        starts, lengths = plan.pieces_of(pack)
        assert (np.diff(starts) >= lengths[:-1]).all()
        firsts.append(starts[0])
    assert (np.diff(firsts) > 0).all()
    assert plan.first_piece[0] == 0 and plan.first_piece[-1] == len(plan.piece_starts)


def test_the_same_documents_give_the_same_plan():
    one, other = (plan_of(skewed(3000), 128) for _ in range(2))
    assert one.piece_starts.tobytes() == other.piece_starts.tobytes()
    assert one.first_piece.tobytes() == other.first_piece.tobytes()


@pytest.mark.parametrize("long_documents", ["split", "truncate", "drop"])
def test_one_each_packs_the_same_pieces_alone_and_in_order(long_documents):
    lengths = np.concatenate(([0, 1], skewed(300), [1]))
    starts = np.cumsum(lengths) - lengths
    settings = {"num_tokens": int(lengths.sum()), "context_tokens": 200, "long_documents": long_documents}
    alone, packed = one_each(starts, **settings), best_fit(starts, **settings)
    assert [len(alone.pieces_of(pack)[0]) for pack in range(alone.num_packs)] == [1] * len(packed.piece_starts)
    assert (np.diff(alone.piece_starts) > 0).all()
    assert alone.piece_starts.tolist() == np.sort(packed.piece_starts).tolist()
    assert alone.piece_lengths.tolist() == packed.piece_lengths[np.argsort(packed.piece_starts)].tolist()
    counted = ("split_documents", "truncated_documents", "dropped_documents", "short_documents", "cut_tokens")
    assert all(getattr(alone, f"num_{name}") == getattr(packed, f"num_{name}") for name in counted)
    assert alone.padding_share > 0.2 > packed.padding_share


def test_padding_is_counted_in_label_places():
    plan = plan_of([6, 4], context_tokens=5)  # 5 of 5 places and 3 of 5
    assert plan.num_packs == 2 and plan.padding_share == pytest.approx(0.2)


@pytest.mark.parametrize("lengths", [[], [1], [0, 1, 0]])
def test_nothing_to_predict_gives_no_packs(lengths):
    plan = plan_of(lengths, context_tokens=8)
    assert plan.num_packs == 0 and plan.padding_share == 0 and plan.first_piece.tolist() == [0]
    assert plan.num_short_documents == len(lengths)


def test_padding_is_near_the_least_there_can_be_and_below_that_of_first_fit():
    lengths, context_tokens = skewed(6000), 512
    plan = plan_of(lengths, context_tokens)
    least = -(-int(plan.piece_lengths.sum()) // (context_tokens + 1))
    pieces = plan.piece_lengths[np.argsort(plan.piece_starts)].tolist()
    assert least <= plan.num_packs <= least * 1.005
    assert plan.num_packs < first_fit(pieces, context_tokens + 1)
    assert plan.padding_share < 0.005


def test_many_documents_share_few_lengths_and_each_is_packed_once():
    lengths = np.tile([3, 5, 7, 2, 900], 50_000)
    plan = plan_of(lengths, context_tokens=1023)
    assert np.array_equal(np.sort(plan.piece_starts), np.cumsum(lengths) - lengths)
    # No two documents of 900 tokens share a pack, and the others fit in beside them.
    assert plan.num_packs == 50_000 and max(fills(plan)) <= 1024
