"""Every measure against numbers known by hand, and against the ways in which a broken engine could look right."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compiler.errors import RecipeError
from compiler.metrics import (
    SQNR_CEILING_DB,
    cosine,
    decisions,
    distances,
    max_abs_diff,
    nll,
    perplexity,
    retrieval,
    sqnr_db,
    top1,
    top1_agreement,
    top_k,
)

LOGITS = np.array([[0.1, 0.7, 0.2], [2.0, 1.0, 0.0], [0.0, 0.0, 5.0], [1.0, 3.0, 2.0]], np.float32)
BEST = np.array([1, 0, 2, 1])
GENERIC = (cosine, sqnr_db, max_abs_diff, top1_agreement)


def y(values: Any, dtype: Any = np.float64) -> dict[str, Any]:
    return {"y": np.asarray(values, dtype)}


class TestTop1:
    def test_right_labels_are_all_right(self) -> None:
        assert top1({"logits": LOGITS}, BEST).tolist() == [True] * 4

    def test_other_labels_are_all_wrong(self) -> None:
        assert top1({"logits": LOGITS}, (BEST + 1) % 3).tolist() == [False] * 4

    def test_the_result_is_bool_so_that_a_gate_counts_samples(self) -> None:
        assert top1({"logits": LOGITS}, BEST).dtype == bool

    def test_permuted_labels_follow_their_samples(self) -> None:
        assert top1({"logits": LOGITS}, BEST[::-1]).tolist() == [True, False, False, True]

    def test_of_equal_values_the_first_counts_as_in_argmax(self) -> None:
        tied = np.zeros((3, 3))
        assert top1({"logits": tied}, np.array([0, 1, 2])).tolist() == [True, False, False]

    def test_a_row_with_nan_is_wrong_even_where_the_label_is_the_largest(self) -> None:
        assert top1({"logits": np.array([[5.0, np.nan], [np.nan, np.nan]])}, np.array([0, 0])).tolist() == [
            False,
            False,
        ]

    def test_no_samples_give_no_values(self) -> None:
        assert top1({"logits": np.empty((0, 3))}, np.empty(0, int)).tolist() == []

    def test_the_first_float_output_counts(self) -> None:
        outputs = {"ids": np.zeros(4, int), "logits": LOGITS, "other": -LOGITS}
        assert top1(outputs, BEST).all()

    def test_tokens_give_the_share_of_right_positions_without_the_ignored(self) -> None:
        logits = np.stack([LOGITS, LOGITS])
        labels = np.array([[1, 0, 2, 0], [1, -100, -100, -100]])
        assert top1({"logits": logits}, labels).tolist() == [0.75, 1.0]

    def test_ragged_samples_are_taken_one_by_one(self) -> None:
        assert top1({"logits": [LOGITS[:1], LOGITS[1:]]}, [np.array([0]), BEST[1:]]).tolist() == [0.0, 1.0]

    def test_half_precision_and_bfloat16_count_as_floats(self) -> None:
        for dtype in (np.float16, ml_dtypes.bfloat16):
            assert top1({"logits": LOGITS.astype(dtype)}, BEST).all()

    def test_it_agrees_with_scikit_learn(self) -> None:
        sklearn = pytest.importorskip("sklearn.metrics", exc_type=ImportError)
        rng = np.random.default_rng(0)
        logits, labels = rng.normal(size=(500, 7)), rng.integers(0, 7, 500)
        for k in (1, 2, 5):
            expected = sklearn.top_k_accuracy_score(labels, logits, k=k, labels=range(7))
            assert top_k(k)({"logits": logits}, labels).mean() == pytest.approx(expected, abs=1e-12)


class TestTopK:
    def test_the_label_may_be_the_kth(self) -> None:
        assert top_k(2)({"logits": LOGITS}, np.array([2, 2, 1, 0])).tolist() == [True, False, False, False]

    def test_ties_are_broken_by_index_so_that_a_constant_output_is_no_better_than_chance(self) -> None:
        constant = np.zeros((4, 4))
        assert top_k(2)({"logits": constant}, np.arange(4)).tolist() == [True, True, False, False]

    def test_its_name_says_k(self) -> None:
        assert top_k(5).__name__ == "top5"

    def test_k_below_one_is_refused(self) -> None:
        with pytest.raises(RecipeError) as refused:
            top_k(0)
        assert refused.value.message == "top_k: found k = 0; at least 1 was expected."


class TestNll:
    def test_equal_logits_cost_the_logarithm_of_their_number(self) -> None:
        assert nll({"logits": np.zeros((2, 8))}, np.array([0, 7])) == pytest.approx([np.log(8)] * 2)

    def test_known_probabilities(self) -> None:
        logits = np.log(np.array([[0.5, 0.25, 0.25]]))
        assert nll({"logits": logits}, np.array([1])) == pytest.approx([np.log(4)])

    def test_a_shift_of_all_logits_changes_nothing_and_huge_ones_do_not_overflow(self) -> None:
        assert nll({"logits": LOGITS + np.float32(3e4)}, BEST) == pytest.approx(nll({"logits": LOGITS}, BEST), abs=1e-2)
        assert np.isfinite(nll({"logits": LOGITS.astype(np.float64) * 1e300}, BEST)).all()

    def test_tokens_are_averaged_without_the_ignored(self) -> None:
        logits = np.log(np.array([[[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]]))
        assert nll({"logits": logits}, np.array([[0, 0, -100]])) == pytest.approx([(np.log(2) + np.log(4)) / 2])

    def test_nan_logits_give_nan(self) -> None:
        assert np.isnan(nll({"logits": np.array([[np.nan, 1.0]])}, np.array([1]))).all()

    def test_perplexity_of_a_fair_die_is_six(self) -> None:
        assert perplexity(nll({"logits": np.zeros((3, 6))}, np.array([0, 3, 5]))) == pytest.approx(6.0)

    def test_perplexity_of_nothing_is_nan(self) -> None:
        assert np.isnan(perplexity([]))


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        ({"ids": np.zeros(4, int)}, BEST, "top1: found no float output among 'ids'; logits were expected."),
        ({"y": LOGITS}, None, "top1: found no labels for 4 samples; one per sample was expected."),
        ({"y": LOGITS}, BEST[:3], "top1: found 3 labels for 4 samples; one per sample was expected."),
        (
            {"y": LOGITS},
            np.array([1.0, 0.0, 2.0, 1.0]),
            "top1: sample 0: found labels float64[] for output 'y' [3]; integers [] were expected.",
        ),
        (
            {"y": LOGITS},
            np.zeros((4, 2), np.int64),
            "top1: sample 0: found labels int64[2] for output 'y' [3]; integers [] were expected.",
        ),
        (
            {"y": LOGITS},
            np.array([1, 0, 3, 1]),
            "top1: sample 2: found label 3; output 'y' has classes 0 to 2.",
        ),
        (
            {"y": LOGITS},
            np.array([1, -100, 2, 1]),
            "top1: sample 1: found no label but -100, which is ignored; at least one was expected. Leave the sample out.",
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused(outputs: Any, labels: Any, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        top1(outputs, labels)
    assert refused.value.message == message


class TestAgreementsByHand:
    def test_equal_outputs_agree_as_much_as_there_is(self) -> None:
        same = y(LOGITS)
        assert cosine(same, same) == pytest.approx([1.0] * 4)
        assert sqnr_db(same, same).tolist() == [SQNR_CEILING_DB] * 4
        assert max_abs_diff(same, same).tolist() == [0.0] * 4
        assert top1_agreement(same, same).tolist() == [True] * 4

    def test_an_error_of_a_tenth_of_the_signal_is_20_db(self) -> None:
        assert sqnr_db(y([[3.3, 4.4]]), y([[3.0, 4.0]])) == pytest.approx([20.0])

    def test_cosine_of_a_right_angle_is_0_and_of_the_opposite_is_minus_1(self) -> None:
        assert cosine(y([[0.0, 1.0], [-2.0, 0.0]]), y([[1.0, 0.0], [1.0, 0.0]])) == pytest.approx([0.0, -1.0])

    def test_twice_the_scale_hides_from_cosine_and_top1_but_not_from_sqnr_or_the_difference(self) -> None:
        double = y(2 * LOGITS)
        assert cosine(double, y(LOGITS)) == pytest.approx([1.0] * 4)
        assert top1_agreement(double, y(LOGITS)).all()
        assert sqnr_db(double, y(LOGITS)) == pytest.approx([0.0] * 4)
        assert max_abs_diff(double, y(LOGITS)) == pytest.approx(np.abs(LOGITS).max(axis=1))

    def test_a_constant_output_disagrees(self) -> None:
        constant = y(np.ones_like(LOGITS))
        assert top1_agreement(constant, y(LOGITS)).tolist() == [False, True, False, False]
        assert (sqnr_db(constant, y(LOGITS)) < 10).all()

    def test_zero_outputs_agree_only_with_zero_outputs(self) -> None:
        zero, one = y(np.zeros((1, 3))), y(np.ones((1, 3)))
        assert [*cosine(zero, zero), *sqnr_db(zero, zero)] == [1.0, SQNR_CEILING_DB]
        assert [*cosine(zero, one), *sqnr_db(zero, one)] == [0.0, 0.0]
        assert [*cosine(one, zero), *sqnr_db(one, zero)] == [0.0, -SQNR_CEILING_DB]

    def test_swapped_outputs_are_found_because_outputs_match_by_name(self) -> None:
        original = {"a": np.array([[1.0, 0.0]]), "b": np.array([[0.0, 5.0]])}
        swapped = {"a": original["b"], "b": original["a"]}
        assert cosine(swapped, original) == pytest.approx([0.0])

    def test_the_order_of_names_does_not_matter(self) -> None:
        original = {"a": np.array([[1.0, 0.0]]), "b": np.array([[0.0, 5.0]])}
        assert max_abs_diff({"b": original["b"], "a": original["a"]}, original).tolist() == [0.0]

    def test_the_worst_output_of_a_sample_counts(self) -> None:
        original = {"a": np.ones((2, 2)), "b": np.ones((2, 2))}
        outputs = {"a": np.array([[1.0, 1.0], [1.1, 1.1]]), "b": np.array([[2.0, 2.0], [1.0, 1.0]])}
        assert sqnr_db(outputs, original) == pytest.approx([0.0, 20.0])
        assert max_abs_diff(outputs, original) == pytest.approx([1.0, 0.1])

    def test_integer_outputs_are_compared_by_equality_beside_the_decision(self) -> None:
        original = {"y": LOGITS, "ids": np.array([[1, 2], [3, 4], [5, 6], [7, 8]])}
        outputs = {"y": LOGITS, "ids": np.array([[1, 2], [3, 0], [0, 0], [7, 8]])}
        assert top1_agreement(outputs, original).tolist() == [1.0, 0.5, 0.0, 1.0]
        assert cosine(outputs, original) == pytest.approx([1.0] * 4)

    def test_equal_ids_of_minus_one_agree(self) -> None:
        ids = {"ids": np.array([-1, -1])}
        assert top1_agreement(ids, ids).tolist() == [True, True]

    def test_tokens_give_the_share_of_agreeing_positions(self) -> None:
        original = y(np.eye(4)[None])
        outputs = y(np.eye(4)[[0, 1, 2, 0]][None])
        assert top1_agreement(outputs, original).tolist() == [0.75]

    def test_ragged_samples_equal_the_same_samples_alone(self) -> None:
        rng = np.random.default_rng(3)
        old = [rng.normal(size=(length, 5)) for length in (1, 4, 2)]
        new = [row + rng.normal(size=row.shape) / 10 for row in old]
        for measure in GENERIC:
            together = measure({"y": new}, {"y": old})
            alone = [measure({"y": a[None]}, {"y": b[None]})[0] for a, b in zip(new, old, strict=True)]
            assert together.tolist() == alone

    def test_a_missing_box_counts_as_zeros_and_as_a_wrong_decision(self) -> None:
        original, outputs = {"y": [np.array([[3.0, 0.0], [0.0, 4.0]])]}, {"y": [np.array([[3.0, 0.0]])]}
        assert cosine(outputs, original) == pytest.approx([0.6])
        assert max_abs_diff(outputs, original) == pytest.approx([4.0])
        assert top1_agreement(outputs, original).tolist() == [0.5]

    def test_large_outputs_are_compared_piece_by_piece_with_the_same_result(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rng = np.random.default_rng(5)
        old = rng.normal(size=(3, 1000))
        new = old + rng.normal(size=old.shape) / 50
        whole = distances(y(new), y(old))
        monkeypatch.setattr("compiler.metrics._PIECE", 7)
        pieces = distances(y(new), y(old))
        for a, b in zip(whole, pieces, strict=True):
            assert a == pytest.approx(b, rel=1e-12)

    def test_values_at_the_edge_of_double_precision_neither_overflow_nor_vanish(self) -> None:
        assert cosine(y([[1e308, 1e308]]), y([[1e308, 1e308]])) == pytest.approx([1.0])
        assert cosine(y([[1e-200, 0.0]]), y([[1e-200, 1e-200]])) == pytest.approx([2**-0.5])
        assert sqnr_db(y([[1e308]]), y([[-1e308]])) == pytest.approx([-20 * np.log10(2)])
        assert np.isfinite(max_abs_diff(y([[1.7e308]]), y([[-1.7e308]]))).all()

    def test_a_single_value_along_the_last_axis_is_no_decision(self) -> None:
        assert decisions(y([[0.3], [0.4]])) == ()
        assert decisions({"boxes": [np.ones((1, 4)), np.ones((2, 4))], "ids": np.zeros(2, int)}) == ("boxes", "ids")

    def test_no_samples_give_no_values(self) -> None:
        for measure in GENERIC:
            assert measure(y(np.empty((0, 3))), y(np.empty((0, 3)))).tolist() == []
        assert cosine({"y": []}, {"y": []}).tolist() == []

    def test_a_sample_without_values_agrees(self) -> None:
        nothing = y(np.empty((1, 0, 4)))
        assert cosine(nothing, nothing).tolist() == [1.0]
        assert top1_agreement(nothing, nothing).tolist() == [1.0]


class TestNanNeverLooksLikeAgreement:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_one_bad_value_gives_the_worst_there_is(self, bad: float) -> None:
        outputs = y([[bad, 1.0]])
        original = y([[2.0, 1.0]])
        assert cosine(outputs, original).tolist() == [-1.0]
        assert sqnr_db(outputs, original).tolist() == [-SQNR_CEILING_DB]
        assert max_abs_diff(outputs, original).tolist() == [np.inf]

    def test_nan_on_both_sides_is_no_agreement(self) -> None:
        nan = y([[np.nan, np.nan]])
        assert cosine(nan, nan).tolist() == [-1.0]
        assert top1_agreement(nan, nan).tolist() == [False]

    def test_a_row_with_nan_never_makes_the_same_decision(self) -> None:
        assert top1_agreement(y([[np.nan, 1.0]]), y([[0.0, 1.0]])).tolist() == [False]
        assert top1_agreement(y([[0.0, 1.0]]), y([[np.nan, 1.0]])).tolist() == [False]

    def test_a_mask_of_minus_infinity_on_both_sides_is_left_out(self) -> None:
        masked = y([[-np.inf, 3.0, 4.0]])
        assert cosine(masked, masked) == pytest.approx([1.0])
        assert cosine(y([[-65504.0, 3.0, 4.0]]), masked) == pytest.approx([1.0])
        assert cosine(y([[np.inf, 3.0, 4.0]]), masked).tolist() == [-1.0]

    def test_finite_numbers_do_not_agree_with_nothing_but_infinity(self) -> None:
        assert cosine(y([[1.0, 1.0]]), y([[np.inf, np.inf]])).tolist() == [-1.0]
        assert cosine(y([[np.inf, np.inf]]), y([[np.inf, np.inf]])).tolist() == [1.0]

    def test_bfloat16_infinity_is_seen(self) -> None:
        assert cosine({"y": np.array([[np.inf, 1]], ml_dtypes.bfloat16)}, y([[1.0, 1.0]])).tolist() == [-1.0]


class TestRetrieval:
    def test_the_same_embeddings_keep_every_neighbour(self) -> None:
        embeddings = {"e": np.random.default_rng(0).normal(size=(50, 8))}
        assert retrieval(10)(embeddings, embeddings).tolist() == [1.0] * 50

    def test_scale_and_rotation_keep_every_neighbour(self) -> None:
        rng = np.random.default_rng(1)
        old = rng.normal(size=(40, 4))
        rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
        assert retrieval(5)({"e": 3 * old @ rotation}, {"e": old}).tolist() == [1.0] * 40

    def test_unrelated_embeddings_keep_about_k_of_n(self) -> None:
        rng = np.random.default_rng(2)
        found = retrieval(10)({"e": rng.normal(size=(400, 16))}, {"e": rng.normal(size=(400, 16))})
        assert found.mean() == pytest.approx(10 / 399, abs=0.01)

    def test_a_neighbour_lost_is_counted(self) -> None:
        angles = np.radians([0.0, 10.0, 25.0, 90.0])
        moved = np.radians([0.0, 60.0, 25.0, 90.0])
        old = {"e": np.stack([np.cos(angles), np.sin(angles)], axis=1)}
        new = {"e": np.stack([np.cos(moved), np.sin(moved)], axis=1)}
        assert retrieval(1)(new, old).tolist() == [False, False, False, False]
        assert retrieval(2)(new, old).tolist() == [1.0, 0.5, 1.0, 1.0]

    def test_one_neighbour_is_right_or_wrong_and_more_are_a_share(self) -> None:
        embeddings = {"e": np.eye(5)}
        assert retrieval(1)(embeddings, embeddings).dtype == bool
        assert retrieval(2)(embeddings, embeddings).dtype == np.float64

    def test_duplicates_that_tie_in_the_original_may_change_places(self) -> None:
        old = np.array([[1.0, 0.0], [0.8, 0.6], [0.8, 0.6], [0.0, 1.0]])
        new = old + np.array([[0, 0], [0, 1e-7], [0, -1e-7], [0, 0]])
        assert retrieval(1)({"e": new}, {"e": old}).all()

    def test_one_embedding_for_all_keeps_no_more_than_chance(self) -> None:
        old = {"e": np.random.default_rng(4).normal(size=(300, 16))}
        assert retrieval(3)({"e": np.ones((300, 16))}, old).mean() < 0.05

    def test_nan_embeddings_keep_nothing(self) -> None:
        old = np.random.default_rng(6).normal(size=(20, 4))
        new = old.copy()
        new[3] = np.nan
        found = retrieval(4)({"e": new}, {"e": old})
        assert found[3] == 0.0
        assert retrieval(4)({"e": np.full_like(old, np.nan)}, {"e": old}).tolist() == [0.0] * 20
        assert retrieval(4)({"e": np.full_like(old, np.nan)}, {"e": np.full_like(old, np.nan)}).tolist() == [0.0] * 20

    def test_blocks_of_queries_make_no_difference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rng = np.random.default_rng(7)
        old = rng.normal(size=(30, 4))
        new = old + rng.normal(size=old.shape) / 3
        whole = retrieval(3)({"e": new}, {"e": old})
        monkeypatch.setattr("compiler.metrics._QUERIES", 7)
        assert retrieval(3)({"e": new}, {"e": old}).tolist() == whole.tolist()

    @pytest.mark.parametrize(
        ("k", "output", "embeddings", "message"),
        [
            (0, None, {"e": np.eye(3)}, "retrieval: found k = 0; at least 1 was expected."),
            (3, None, {"e": np.eye(3)}, "retrieval: found 3 samples; more than k = 3 were expected."),
            (1, "x", {"e": np.eye(3)}, "retrieval: found no output 'x' among 'e'; embeddings were expected."),
            (
                1,
                None,
                {"e": np.ones((3, 2, 4))},
                "retrieval: output 'e': found [2, 4]; one embedding [D] per sample was expected.",
            ),
            (
                1,
                None,
                {"e": [np.ones(2), np.ones(3), np.ones(2)]},
                "retrieval: output 'e': found [2], [3]; one embedding [D] per sample was expected.",
            ),
        ],
    )
    def test_what_are_no_embeddings_is_refused(self, k: int, output: str | None, embeddings: Any, message: str) -> None:
        with pytest.raises(RecipeError) as refused:
            retrieval(k, output)(embeddings, embeddings)
        assert refused.value.message == message


@pytest.mark.parametrize(
    ("measure", "outputs", "original", "message"),
    [
        (cosine, {"a": LOGITS}, {"b": LOGITS}, "found outputs 'a'; the original's 'b' were expected."),
        (cosine, y(LOGITS[:3]), y(LOGITS), "output 'y': found 3 samples; the original's 4 were expected."),
        (
            sqnr_db,
            {"ids": BEST},
            {"ids": BEST},
            "found no float output among 'ids'; at least one was expected. Use top1_agreement.",
        ),
        (
            max_abs_diff,
            y(LOGITS[:, None]),
            y(LOGITS),
            "output 'y': sample 0: found shape [1, 3]; as many axes as [3] were expected.",
        ),
        (
            top1_agreement,
            y([[1.0]]),
            y([[1.0]]),
            (
                "top1_agreement: found no decision in the outputs 'y'; integers, or at least two floats along the last "
                "axis, were expected. Use cosine, sqnr_db or max_abs_diff."
            ),
        ),
    ],
)
def test_outputs_that_cannot_be_compared_are_refused(measure: Any, outputs: Any, original: Any, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        measure(outputs, original)
    assert refused.value.message == message


NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=32)


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 5)), elements=NUMBERS).flatmap(
        lambda new: st.tuples(st.just(new), hnp.arrays(np.float32, new.shape, elements=NUMBERS))
    )
)
def test_whatever_the_numbers_agreements_stay_in_their_range_and_nan_is_worst(
    pair: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]],
) -> None:
    new, old = pair
    found = distances(y(new, np.float32), y(old, np.float32))
    assert ((found.cosine >= -1) & (found.cosine <= 1)).all()
    assert (np.abs(found.sqnr_db) <= SQNR_CEILING_DB).all()
    assert (found.max_abs_diff >= 0).all()
    broken = (np.isnan(new) & ~np.isnan(old)).any(axis=1)
    assert (found.cosine[broken] == -1).all()
    assert (found.sqnr_db[broken] == -SQNR_CEILING_DB).all()
    assert np.isinf(found.max_abs_diff[broken]).all()


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 5), st.integers(2, 6)),
        elements=st.floats(-1e6, 1e6).filter(lambda x: x == 0 or abs(x) > 1e-3),
    ),
    st.floats(0.01, 100),
    st.permutations(range(5)),
)
def test_agreement_belongs_to_the_sample_and_cosine_ignores_scale(
    old: np.ndarray[Any, Any], scale: float, order: list[int]
) -> None:
    new = old * scale
    assert cosine(y(new), y(old)) == pytest.approx(np.ones(len(old)))
    order = [index for index in order if index < len(old)]
    assert max_abs_diff(y(new[order]), y(old[order])).tolist() == max_abs_diff(y(new), y(old))[order].tolist()
