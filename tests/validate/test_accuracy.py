"""Engines made of arithmetic, good ones and broken ones, scored on stored samples against a stored original."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compiler import metrics
from compiler.data import SampleWriter
from compiler.errors import ArtifactError, BuildError, CalibrationError, RecipeError
from compiler.recipe import GateSection
from compiler.spec import Array, DimRange, Engine, Feeds, Outcome, Outputs, Score, Scores, TensorSpec, ValidationSet
from compiler.validate import accuracy, judge

Make = Callable[..., Any]
N = 300
RNG = np.random.default_rng(11)
WEIGHTS = RNG.normal(size=(4, 3)).astype(np.float32)
X = RNG.normal(size=(N, 4)).astype(np.float32)
LOGITS = X @ WEIGHTS
LABELS = np.where(RNG.random(N) < 0.9, LOGITS.argmax(axis=1), RNG.integers(0, 3, N))


def outputs_of(feeds: Feeds) -> dict[str, Array]:
    """The original: logits, and the embedding they were made from."""
    return {"logits": feeds["x"] @ WEIGHTS, "embedding": feeds["x"] * np.float32(3)}


class FakeRunner:
    """An engine that computes what ``function`` says; remembers the batch sizes it saw."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, function: Callable[[Feeds], dict[str, Array]]) -> None:
        self.function = function
        self.batches: list[int] = []

    def run(self, feeds: Feeds) -> dict[str, Array]:
        self.batches.append(len(next(iter(feeds.values()))))
        return self.function(feeds)

    def time(self, feeds: Feeds, repeats: int) -> list[float]:
        raise NotImplementedError

    def close(self) -> None:
        pass


OUTPUTS = (
    TensorSpec(name="logits", dtype="float32", shape=("batch", 3)),
    TensorSpec(name="embedding", dtype="float32", shape=("batch", 4)),
)


class Bench:
    """A validation set and the original's outputs on disk, and `score` on them."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.folder, self.engine = folder, engine
        self.runner = FakeRunner(outputs_of)

    def store(
        self,
        feeds: Sequence[Feeds],
        labels: Sequence[Any] | None,
        original: Callable[[Feeds], dict[str, Array]] = outputs_of,
    ) -> None:
        with SampleWriter(self.folder / "data") as data, SampleWriter(self.folder / "original") as outputs:
            for index, sample in enumerate(feeds):
                data.append(sample, labels[index] if labels is not None else None)
                outputs.append(original(sample))
        self.data = ValidationSet(
            path=self.folder / "data", samples=len(feeds), sha256=data.close(), labelled=labels is not None
        )
        self.original = Outputs(
            path=self.folder / "original", sha256=outputs.close(), data_sha256=self.data.sha256, samples=len(feeds)
        )

    def score(self, function: Callable[[Feeds], dict[str, Array]] = outputs_of, **measures: Any) -> Scores:
        self.runner = FakeRunner(function)
        given = {"metrics": {}, "losses": {}, "agreements": {}, **measures}
        return accuracy.score(self.engine, self.runner, self.data, self.original, **given)


@pytest.fixture
def bench(tmp_path: Path, engine: Make) -> Bench:
    made = Bench(tmp_path, engine(outputs=OUTPUTS))
    made.store([{"x": row[None]} for row in X], list(LABELS))
    return made


def named(scores: Scores, metric: str) -> Score:
    return next(score for score in scores.scores if score.metric == metric)


class TestPairing:
    def test_the_original_against_itself_loses_nothing(self, bench: Bench) -> None:
        scores = bench.score(metrics={"top1": metrics.top1}, losses={"nll": metrics.nll})
        assert (scores.engine, scores.engine_sha256) == ("int8", "sha-of-int8")
        assert (scores.data_sha256, scores.bad_samples) == (bench.data.sha256, ())
        top1 = named(scores, "top1")
        right = float((LOGITS.argmax(axis=1) == LABELS).mean())
        assert (top1.value, top1.original, top1.change) == (right, right, 0.0)
        assert (top1.lost, top1.gained, top1.samples, top1.binary, top1.worst) == (0, 0, N, True, ())
        nll = named(scores, "nll")
        # Batches of four may be summed in another order than single samples.
        assert [nll.change, nll.change_sd] == pytest.approx([0.0, 0.0], abs=1e-6)
        assert (nll.binary, nll.higher_is_better) == (False, False)
        assert [score.metric for score in scores.scores] == [
            "top1",
            "nll",
            "cosine",
            "sqnr_db",
            "max_abs_diff",
            "top1_agreement",
        ]

    def test_lost_and_gained_samples_are_counted_by_hand(self, bench: Bench) -> None:
        answers = LOGITS.argmax(axis=1)
        right, wrong = np.flatnonzero(answers == LABELS), np.flatnonzero(answers != LABELS)
        spoilt, mended = set(right[[3, 10, 50]]), set(wrong[[1, 4]])
        index = {tuple(row): i for i, row in enumerate(X)}

        def engine(feeds: Feeds) -> dict[str, Array]:
            found = outputs_of(feeds)
            for row, sample in enumerate(feeds["x"]):
                i = index[tuple(sample)]
                if i in spoilt | mended:
                    found["logits"][row] = np.eye(3)[LABELS[i] if i in mended else (LABELS[i] + 1) % 3]
            return found

        top1 = named(bench.score(engine, metrics={"top1": metrics.top1}), "top1")
        assert (top1.lost, top1.gained) == (3, 2)
        assert top1.change == pytest.approx(-1 / N)
        assert top1.worst == tuple(sorted(int(i) for i in spoilt))

    def test_a_continuous_loss_has_its_mean_and_spread_by_hand(self, bench: Bench) -> None:
        score = named(
            bench.score(
                lambda feeds: {**outputs_of(feeds), "logits": outputs_of(feeds)["logits"] / 2},
                losses={"nll": metrics.nll},
            ),
            "nll",
        )
        after, before = (metrics.nll({"y": y}, LABELS) for y in (LOGITS / 2, LOGITS))
        assert score.value == pytest.approx(after.mean())
        assert score.original == pytest.approx(before.mean())
        assert score.change == pytest.approx((after - before).mean())
        assert score.change_sd == pytest.approx((after - before).std(ddof=1))
        assert score.value_sd == pytest.approx(after.std(ddof=1))
        assert score.worst == tuple(np.argsort(before - after, kind="stable")[:20])

    def test_zeros_and_ones_are_right_or_wrong_whatever_their_dtype(self, bench: Bench) -> None:
        def as_float(outputs: Any, labels: Any) -> Any:
            return (outputs["logits"].argmax(axis=1) == labels).astype(np.float32)

        def as_list(outputs: Any, labels: Any) -> Any:
            return [int(value) for value in as_float(outputs, labels)]

        def same(outputs: Any, original: Any) -> Any:
            return np.arange(N) % 2 * 1.0

        scores = bench.score(metrics={"a": as_float, "b": as_list}, agreements={"c": same})
        assert [named(scores, name).binary for name in "abc"] == [True] * 3

    def test_floats_that_are_all_one_may_be_cosines(self, bench: Bench) -> None:
        scores = bench.score(agreements={"mine": lambda outputs, original: np.ones(N)})
        assert (named(scores, "mine").binary, named(scores, "mine").value_sd) == (False, 0.0)

    def test_generic_scores_equal_the_measures_on_the_whole_set(self, bench: Bench) -> None:
        def engine(feeds: Feeds) -> dict[str, Array]:
            return {name: value + np.float32(0.1) * np.sin(17 * value) for name, value in outputs_of(feeds).items()}

        scores = bench.score(engine)
        original = {name: np.asarray(value) for name, value in outputs_of({"x": X}).items()}
        new = engine({"x": X})
        for name in ("cosine", "sqnr_db", "max_abs_diff", "top1_agreement"):
            expected = getattr(metrics, name)(new, original)
            found = named(scores, name)
            assert found.value == pytest.approx(expected.mean(), rel=1e-6)
            assert (found.original, found.change, found.samples) == (None, None, N)
            assert found.binary == (name == "top1_agreement")
        worst = metrics.cosine(new, original).argsort(kind="stable")[:20]
        assert set(named(scores, "cosine").worst) == set(worst.tolist())
        assert named(scores, "top1_agreement").worst == tuple(
            np.flatnonzero(~metrics.top1_agreement(new, original))[:20]
        )

    def test_a_measure_sees_all_samples_at_once_in_their_order(self, bench: Bench) -> None:
        seen: list[Any] = []

        def look(outputs: Any, labels: Any) -> Any:
            seen.append((outputs["embedding"], labels))
            return np.arange(N) / N

        bench.score(metrics={"look": look})
        for embedding, labels in seen:
            assert np.array_equal(embedding, X * np.float32(3))
            assert labels.tolist() == LABELS.tolist()

    def test_a_measure_cannot_spoil_what_the_next_one_sees(self, bench: Bench) -> None:
        def greedy(outputs: Any, labels: Any) -> Any:
            outputs["logits"][:] = 0
            return np.zeros(N)

        with pytest.raises(RecipeError, match="raised ValueError: assignment destination is read-only"):
            bench.score(metrics={"greedy": greedy})

    def test_skewed_differences_are_noted(self, bench: Bench) -> None:
        def rare(outputs: Any, original: Any) -> Any:
            return 1.0 - 0.5 * (np.arange(N) == 9) - 1e-3 * np.sin(np.arange(N))

        (note,) = named(bench.score(agreements={"rare": rare}), "rare").notes
        assert note.startswith("a few samples weigh much: skewness moves the bounds by ")


class TestBatches:
    def test_samples_run_at_the_optimum_of_the_batch_axis(self, bench: Bench) -> None:
        bench.score()
        assert bench.runner.batches == [4] * (N // 4)

    def test_the_last_batch_is_filled_up_to_the_minimum_and_the_filling_dropped(
        self, tmp_path: Path, engine: Make
    ) -> None:
        bench = Bench(tmp_path, engine(outputs=OUTPUTS, axes={"batch": DimRange(min=3, opt=4, max=8)}))
        bench.store([{"x": row[None]} for row in X[:9]], list(LABELS[:9]))
        scores = bench.score(metrics={"top1": metrics.top1})
        assert bench.runner.batches == [4, 4, 3]
        assert [score.samples for score in scores.scores] == [9] * 5

    def test_samples_of_equal_shape_share_a_batch_and_keep_their_order(self, tmp_path: Path, engine: Make) -> None:
        """Token counts 2, 5, 2, 5, ...: outputs [batch, tokens, 3]."""
        shape = ("batch", "tokens", 3)
        bench = Bench(
            tmp_path,
            engine(
                outputs=(TensorSpec(name="y", dtype="float32", shape=shape),),
                axes={"batch": DimRange(min=1, opt=4, max=8), "tokens": DimRange(min=1, opt=4, max=8)},
            ),
        )
        rng = np.random.default_rng(0)
        feeds = [{"x": rng.normal(size=(1, 2 if i % 2 else 5, 3)).astype(np.float32)} for i in range(20)]
        bench.store(feeds, None, lambda sample: {"y": sample["x"]})
        seen: list[Any] = []

        def look(outputs: Any, original: Any) -> Any:
            seen.append(outputs["y"])
            return np.array([float(np.abs(a - b).max()) for a, b in zip(outputs["y"], original["y"], strict=True)])

        scores = bench.score(lambda sample: {"y": sample["x"]}, agreements={"look": look})
        assert sorted(bench.runner.batches) == [2, 2, 4, 4, 4, 4]
        assert [row.shape for row in seen[0]] == [feed["x"].shape[1:] for feed in feeds]
        assert named(scores, "look").value == 0.0
        assert named(scores, "top1_agreement").value == 1.0
        assert not named(scores, "top1_agreement").binary

    def test_a_model_without_a_batch_axis_runs_sample_by_sample(self, tmp_path: Path, engine: Make) -> None:
        bench = Bench(
            tmp_path,
            engine(
                inputs=(TensorSpec(name="x", dtype="float32", shape=(1, 4)),),
                outputs=(
                    TensorSpec(name="logits", dtype="float32", shape=(1, 3)),
                    TensorSpec(name="embedding", dtype="float32", shape=(1, 4)),
                ),
                axes={},
            ),
        )
        bench.store([{"x": row[None]} for row in X[:40]], list(LABELS[:40]))
        scores = bench.score(metrics={"top1": metrics.top1})
        assert bench.runner.batches == [1] * 40
        assert named(scores, "top1").samples == 40

    def test_an_output_without_the_batch_axis_runs_sample_by_sample(self, tmp_path: Path, engine: Make) -> None:
        bench = Bench(tmp_path, engine(outputs=(TensorSpec(name="boxes", dtype="float32", shape=("found", 4)),)))

        def boxes(sample: Feeds) -> dict[str, Array]:
            return {"boxes": np.repeat(sample["x"], 1 + int(sample["x"][0, 0] > 0), axis=0)}

        bench.store([{"x": row[None]} for row in X[:40]], None, boxes)
        scores = bench.score(boxes)
        assert bench.runner.batches == [1] * 40
        assert named(scores, "cosine").value == pytest.approx(1.0)

    def test_a_batch_axis_that_is_not_the_first_is_found(self, tmp_path: Path, engine: Make) -> None:
        bench = Bench(tmp_path, engine(outputs=(TensorSpec(name="h", dtype="float32", shape=(1, "batch", 4)),)))
        bench.store([{"x": row[None]} for row in X[:8]], None, lambda sample: {"h": sample["x"][None]})
        scores = bench.score(lambda sample: {"h": sample["x"][None]})
        assert bench.runner.batches == [4, 4]
        assert named(scores, "max_abs_diff").value == 0.0

    def test_progress_counts_samples(self, bench: Bench) -> None:
        seen: list[tuple[int, int]] = []
        bench.score(progress=lambda done, total: seen.append((done, total)))
        assert seen == [(4 * batch, N) for batch in range(1, N // 4 + 1)]


class TestBrokenEngines:
    """Each of these ran somewhere in production; a gate must catch every one."""

    GATES = (
        GateSection(metric="top1", max_drop=0.05),
        GateSection(metric="cosine", min=0.99),
        GateSection(metric="sqnr_db", min=20.0),
    )

    @staticmethod
    def changed(function: Callable[[dict[str, Array]], dict[str, Array]]) -> Callable[[Feeds], dict[str, Array]]:
        return lambda feeds: function(outputs_of(feeds))

    @pytest.fixture
    def verdict(self, bench: Bench) -> Callable[..., dict[str, Outcome]]:
        def run(function: Callable[[Feeds], dict[str, Array]]) -> dict[str, Outcome]:
            scores = bench.score(function, metrics={"top1": metrics.top1})
            (found,) = judge.judge(self.GATES, (bench.engine,), {"int8": scores}, None, 1)
            return {"": found.outcome, **{gate.metric: gate.outcome for gate in found.gates}}

        return run

    def test_a_good_engine_passes(self, verdict: Make) -> None:
        noise = np.float32(1e-3)
        found = verdict(self.changed(lambda y: {name: value * (1 + noise) for name, value in y.items()}))
        assert set(found.values()) == {Outcome.PASS}

    def test_swapped_outputs_fail(self, tmp_path: Path, engine: Make) -> None:
        bench = Bench(
            tmp_path / "swapped",
            engine(outputs=tuple(TensorSpec(name=n, dtype="float32", shape=("batch", 4)) for n in "ab")),
        )
        bench.store([{"x": row[None]} for row in X], None, lambda feeds: {"a": feeds["x"], "b": feeds["x"][:, ::-1]})
        scores = bench.score(lambda feeds: {"a": feeds["x"][:, ::-1], "b": feeds["x"]})
        (found,) = judge.judge(self.GATES[1:], (bench.engine,), {"int8": scores}, None, 1)
        assert [gate.outcome for gate in found.gates[1:]] == [Outcome.FAIL, Outcome.FAIL]

    def test_a_constant_output_fails(self, verdict: Make) -> None:
        found = verdict(self.changed(lambda y: {name: np.ones_like(value) for name, value in y.items()}))
        assert (found["top1"], found["cosine"], found["sqnr_db"]) == (Outcome.FAIL,) * 3

    def test_an_output_twice_too_large_fails_by_sqnr_and_by_nothing_else(self, verdict: Make) -> None:
        found = verdict(self.changed(lambda y: {name: 2 * value for name, value in y.items()}))
        assert found[""] is Outcome.FAIL
        assert (found["top1"], found["cosine"], found["sqnr_db"]) == (Outcome.PASS, Outcome.PASS, Outcome.FAIL)

    def test_an_engine_that_returns_another_samples_answer_fails(self, verdict: Make) -> None:
        found = verdict(self.changed(lambda y: {name: np.roll(value, 1, axis=0) for name, value in y.items()}))
        assert (found["top1"], found["cosine"], found["sqnr_db"]) == (Outcome.FAIL,) * 3

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_nan_or_inf_in_one_sample_fails_and_is_named(self, bench: Bench, verdict: Make, bad: float) -> None:
        def engine(feeds: Feeds) -> dict[str, Array]:
            found = outputs_of(feeds)
            found["embedding"][(feeds["x"] == X[123]).all(axis=1), 2] = bad
            return found

        assert verdict(engine)[""] is Outcome.FAIL
        scores = bench.score(engine, metrics={"top1": metrics.top1}, losses={"nll": metrics.nll})
        assert scores.bad_samples == (123,)
        assert [score.metric for score in scores.scores] == ["cosine", "sqnr_db", "max_abs_diff", "top1_agreement"]
        assert {score.samples for score in scores.scores} == {N - 1}
        assert all("over the 299 of 300 samples that are finite" in score.notes for score in scores.scores)
        assert all(np.isfinite(score.value) for score in scores.scores)

    def test_a_measure_that_looks_at_pairs_is_not_asked_about_a_set_with_a_bad_sample(self, bench: Bench) -> None:
        def asked(outputs: Any, labels: Any) -> Any:
            raise AssertionError("asked")

        def engine(feeds: Feeds) -> dict[str, Array]:
            found = outputs_of(feeds)
            found["logits"][(feeds["x"] == X[0]).all(axis=1)] = np.nan
            return found

        assert bench.score(engine, metrics={"asked": asked}).bad_samples == (0,)

    def test_an_engine_that_is_nan_everywhere_has_no_scores(self, bench: Bench, verdict: Make) -> None:
        nan = self.changed(lambda y: {name: value * np.nan for name, value in y.items()})
        assert verdict(nan)[""] is Outcome.FAIL
        scores = bench.score(nan, metrics={"top1": metrics.top1})
        assert (scores.scores, scores.bad_samples) == ((), tuple(range(N)))

    def test_a_measure_that_is_nan_for_the_engine_alone_makes_the_sample_bad(self, bench: Bench) -> None:
        def relative(outputs: Any, labels: Any) -> Any:
            with np.errstate(divide="ignore"):
                return 1 / outputs["embedding"][:, 0].astype(np.float64)

        def zero(feeds: Feeds) -> dict[str, Array]:
            found = outputs_of(feeds)
            found["embedding"][(feeds["x"] == X[5]).all(axis=1), 0] = 0
            return found

        scores = bench.score(zero, metrics={"relative": relative}, agreements={"same": lambda a, b: relative(a, b)})
        assert scores.bad_samples == (5,)
        assert (named(scores, "relative").samples, named(scores, "same").samples) == (N - 1, N - 1)

    def test_infinities_that_the_original_has_too_are_no_fault(self, tmp_path: Path, engine: Make) -> None:
        bench = Bench(tmp_path, engine(outputs=OUTPUTS[:1]))

        def masked(feeds: Feeds) -> dict[str, Array]:
            y = feeds["x"] @ WEIGHTS
            y[:, 0] = -np.inf
            return {"logits": y}

        bench.store([{"x": row[None]} for row in X[:40]], None, masked)
        assert bench.score(masked).bad_samples == ()

    def test_a_batch_that_the_engine_ignores_is_an_error(self, bench: Bench) -> None:
        with pytest.raises(BuildError) as refused:
            bench.score(self.changed(lambda y: {name: value[:1] for name, value in y.items()}))
        assert refused.value.message == (
            "engine 'int8': output 'logits' has shape [1, 3] for a batch of 4; [batch, 3] was expected. Build it again."
        )

    def test_outputs_of_other_names_are_an_error(self, bench: Bench) -> None:
        with pytest.raises(BuildError) as refused:
            bench.score(self.changed(lambda y: {"logits": y["logits"], "emb": y["embedding"]}))
        assert refused.value.message == (
            "engine 'int8': found outputs logits, emb; the original's logits, embedding were expected. Build it again."
        )

    def test_outputs_of_another_rank_are_an_error(self, bench: Bench) -> None:
        with pytest.raises(BuildError) as refused:
            bench.score(self.changed(lambda y: {**y, "embedding": y["embedding"][:, None]}))
        assert refused.value.message == (
            "engine 'int8': output 'embedding' of validation sample 0 has shape [1, 4]; the original's has [4]. "
            "Build it again."
        )


def raises(outputs: Any, labels: Any) -> Any:
    return outputs["logitz"]


def mean_of_all(outputs: Any, labels: Any) -> Any:
    return np.mean(outputs["logits"])


def words(outputs: Any, labels: Any) -> Any:
    return ["right"] * len(labels)


def nan_for_one(outputs: Any, labels: Any) -> Any:
    return np.where(np.arange(N) == 7, np.nan, 1.0)


class TestUsersMistakes:
    @pytest.fixture
    def refused(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
        monkeypatch.chdir(Path(__file__).parent)

        def run(**measures: Any) -> str:
            with pytest.raises(RecipeError) as refused:
                bench.score(**measures)
            return refused.value.message

        return run

    @staticmethod
    def line(function: Callable[..., Any], offset: int = 0) -> str:
        return f"test_accuracy.py:{function.__code__.co_firstlineno + offset}"

    def test_a_measure_that_raises_is_named_with_its_line(self, refused: Make) -> None:
        assert refused(metrics={"m": raises}) == (
            f"{self.line(raises, 1)}: metric 'm' on the original's outputs raised KeyError: 'logitz'. Fix the file; the "
            "full traceback is in the log."
        )

    def test_a_measure_of_this_package_that_does_not_fit_says_for_what(self, refused: Make) -> None:
        assert refused(agreements={"near": metrics.retrieval(500)}) == (
            "agreement 'near' on the outputs of engine 'int8' and the original's: retrieval: found 300 samples; more than "
            "k = 500 were expected."
        )

    def test_a_wrong_shape_is_named_with_the_functions_line(self, refused: Make) -> None:
        assert refused(losses={"m": mean_of_all}) == (
            f"{self.line(mean_of_all)}: loss 'm' on the original's outputs gave float32 []; one number per sample, [300], "
            "was expected. Leave the mean to the report."
        )

    def test_words_are_no_numbers(self, refused: Make) -> None:
        assert refused(metrics={"m": functools.partial(words)}) == (
            f"{self.line(words)}: metric 'm' on the original's outputs gave <U5 [300]; one number per sample, [300], was "
            "expected. Leave the mean to the report."
        )

    def test_nan_on_the_original_is_the_measures_fault(self, refused: Make) -> None:
        assert refused(metrics={"m": nan_for_one}) == (
            f"{self.line(nan_for_one)}: metric 'm' on the original's outputs gave NaN or Inf for 1 of 300 samples, the "
            "first is 7; finite numbers were expected. Correct the measure, or leave the samples out."
        )

    def test_what_is_no_function_is_refused(self, refused: Make) -> None:
        assert refused(metrics={"m": 3}) == "metrics['m']: found int; a function (outputs, labels) was expected."
        assert refused(agreements={"m": "top1"}) == (
            "agreements['m']: found str; a function (outputs, original) was expected."
        )

    def test_names_that_are_taken_are_refused(self, refused: Make) -> None:
        assert refused(agreements={"cosine": words}) == (
            f"{self.line(words)}: agreements['cosine']: the name is taken by this program; a name of its own was expected. "
            "Rename it."
        )
        assert refused(metrics={"m": words}, losses={"m": words}) == (
            f"{self.line(words)}: losses['m']: the name is taken by metrics; a name of its own was expected. Rename it."
        )

    def test_a_metric_without_labels_is_refused(self, tmp_path: Path, engine: Make) -> None:
        bench = Bench(tmp_path / "unlabelled", engine(outputs=OUTPUTS))
        bench.store([{"x": row[None]} for row in X], None)
        with pytest.raises(RecipeError) as refused:
            bench.score(metrics={"top1": metrics.top1})
        assert refused.value.message == (
            "metrics['top1']: validation() yields no labels; a label for every sample was expected. "
            "Yield (feeds, labels), or remove the measure."
        )

    def test_tensors_are_taken_as_numbers(self, bench: Bench) -> None:
        class Tensor:
            """Stands for a torch.Tensor: what has ``detach`` is turned into an array."""

            def detach(self) -> Tensor:
                return self

            def cpu(self) -> Tensor:
                return self

            def numpy(self) -> Array:
                return np.arange(N) / 2

        score = named(bench.score(metrics={"m": lambda outputs, labels: Tensor()}), "m")
        assert (score.value, score.binary) == ((N - 1) / 4, False)


def test_an_original_without_a_finite_number_cannot_judge(tmp_path: Path, engine: Make) -> None:
    bench = Bench(tmp_path, engine(outputs=OUTPUTS[:1]))

    def broken(feeds: Feeds) -> dict[str, Array]:
        return {"logits": feeds["x"] @ WEIGHTS * (np.nan if (feeds["x"] == X[3]).all() else 1)}

    bench.store([{"x": row[None]} for row in X[:8]], None, broken)
    with pytest.raises(CalibrationError) as refused:
        bench.score(lambda feeds: {"logits": feeds["x"] @ WEIGHTS})
    assert refused.value.message == (
        "validation sample 3: an output of the original holds no finite number; numbers were expected. "
        "Repair the model, or leave out the sample (1 of 8 are like this)."
    )


def test_outputs_of_another_set_are_refused(bench: Bench) -> None:
    bench.original = Outputs(
        path=bench.original.path, sha256=bench.original.sha256, data_sha256="another-set-entirely", samples=N
    )
    with pytest.raises(ArtifactError) as refused:
        bench.score()
    assert refused.value.message == (
        f"{bench.original.path}: 300 outputs for data another-set- were found; 300 for data {bench.data.sha256[:12]} were "
        "expected. Run again without the cache: --no-cache."
    )


def test_a_model_of_integers_is_judged_by_equality_alone(tmp_path: Path, engine: Make) -> None:
    bench = Bench(tmp_path, engine(outputs=(TensorSpec(name="id", dtype="int64", shape=("batch",)),)))
    bench.store([{"x": row[None]} for row in X[:40]], None, lambda feeds: {"id": (feeds["x"] @ WEIGHTS).argmax(axis=1)})
    scores = bench.score(lambda feeds: {"id": np.zeros(len(feeds["x"]), np.int64)})
    assert [score.metric for score in scores.scores] == ["top1_agreement"]
    assert scores.scores[0].value == pytest.approx((LOGITS[:40].argmax(axis=1) == 0).mean())


def test_a_single_regression_output_has_no_decision(tmp_path: Path, engine: Make) -> None:
    bench = Bench(tmp_path, engine(outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 1)),)))
    bench.store([{"x": row[None]} for row in X[:40]], None, lambda feeds: {"y": feeds["x"][:, :1]})
    scores = bench.score(lambda feeds: {"y": feeds["x"][:, :1]})
    assert [score.metric for score in scores.scores] == ["cosine", "sqnr_db", "max_abs_diff"]
