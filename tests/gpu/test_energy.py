"""Joules, on a clock that goes on when it is told to."""

from __future__ import annotations

import pytest

from scripts.gpu import energy, missing, nvml
from tests.gpu.fakes import Clock, Nvml, polled, readings_of, timed


class TestEnergy:
    def test_the_counter_s_own_steps_give_the_power_that_the_window_s_ends_do_not(self) -> None:
        readings = readings_of(Clock(), 4.0)
        start, end = 1.01, 3.49
        power = energy.counter_power(readings, start, end)
        assert power["watts"] == pytest.approx(300, rel=1e-6)
        assert power["source"] == "energy counter"
        assert power["error_share"] == pytest.approx(2 * 0.02 / 2.3, rel=0.05)
        inside = [one for one in readings if start <= one["at_s"] <= end]
        naive = (inside[-1]["energy_j"] - inside[0]["energy_j"]) / (end - start)
        assert abs(naive - 300) / 300 > 0.02

    def test_a_window_in_which_the_counter_hardly_moves_is_refused(self) -> None:
        with pytest.raises(missing.MissingError) as refused:
            energy.counter_power(readings_of(Clock(), 4.0), 1.0, 1.5)
        assert str(refused.value) == (
            "the window of 0.50 s is too short for the energy counter: it moved 5 times, and 10 are needed"
        )

    def test_a_counter_that_is_read_too_seldom_is_refused(self) -> None:
        with pytest.raises(missing.MissingError) as refused:
            energy.counter_power(readings_of(Clock(), 4.0, every_s=0.2), 1.0, 3.6)
        assert str(refused.value) == (
            "the window of 2.60 s is too short for how often the energy counter was read: its ends are unsure by 17%, and "
            "5% is allowed"
        )

    def test_a_window_may_hold_no_reading_of_the_counter(self) -> None:
        with pytest.raises(missing.MissingError) as refused:
            energy.counter_power(readings_of(Clock(), 4.0, energy_j=True), 1.0, 3.5)
        assert str(refused.value) == "the energy counter was not read"

    def test_readings_of_power_are_integrated_by_the_trapezoid_rule(self) -> None:
        ramp = Clock(power_w=lambda at: 100 + 50 * at)
        power = energy.sampled_power(readings_of(ramp, 4.0), 1.011, 3.013)
        assert power["watts"] == pytest.approx(100 + 50 * (1.011 + 3.013) / 2, rel=1e-9)
        assert power["source"] == "power readings"
        assert power["error_share"] == pytest.approx(2 * 0.02 / 2.002)

    def test_too_few_readings_of_power_are_refused(self) -> None:
        with pytest.raises(missing.MissingError) as refused:
            energy.sampled_power(readings_of(Clock(), 4.0), 1.001, 1.1)
        assert str(refused.value) == "the window of 0.10 s holds 4 readings of power, and 10 are needed"

    def test_power_is_taken_where_there_is_no_counter(self) -> None:
        found = energy.mean_power(readings_of(Clock(), 4.0, energy_j=True), 1.0, 3.5)
        assert found["source"] == "power readings"
        assert found["watts"] == pytest.approx(300)

    def test_both_reasons_are_given_where_there_is_neither(self) -> None:
        with pytest.raises(missing.MissingError) as refused:
            energy.mean_power([{"at_s": 1.0}], 0.0, 2.5)
        assert str(refused.value) == (
            "the energy counter was not read; the window of 2.50 s holds 0 readings of power, and 10 are needed"
        )

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def gauge(self, clock: Clock) -> nvml.Gauge:
        return nvml.Gauge(Nvml(clock), "handle", clock)

    def test_joules_are_per_inference_and_idle_power_is_taken_off(self, gauge: nvml.Gauge, clock: Clock) -> None:
        found = energy.measure_energy(timed(clock, 0.001), 8, gauge, {"watts": 100.0}, clock=clock, sampler=polled)
        assert found["joules_per_inference"] == pytest.approx(300 * 0.001 / 8, rel=0.01)
        assert found["joules_per_inference_above_idle"] == pytest.approx(200 * 0.001 / 8, rel=0.01)
        assert found["ms_per_call"] == pytest.approx(1.0)
        assert found["inside_calls_share"] == pytest.approx(1.0)
        assert found["window_s"] >= energy.WINDOW_S
        assert found["inferences"] == round(found["window_s"] / 0.001) * 8
        assert found["conditions"]["sm_mhz"] == {"min": 1980, "median": 1980, "max": 1980}
        assert found["conditions"]["throttle"] == ["software power cap"]

    def test_a_window_is_one_request_as_a_runner_may_warm_up_at_each(self, gauge: nvml.Gauge, clock: Clock) -> None:
        asked: list[int] = []

        def call(repeats: int) -> list[float]:
            asked.append(repeats)
            clock.sleep(0.002 * (repeats + 3))  # three untimed calls
            return [0.002] * repeats

        found = energy.measure_energy(call, 1, gauge, {"watts": 0.0}, clock=clock, sampler=polled)
        (at_once,) = [repeats for repeats in asked if repeats > 100]
        assert asked[-1] == at_once == pytest.approx(1.1 * 2.5 / (0.002 * 53 / 50), rel=0.01)
        # A call and its share of the three untimed ones. The clock is made up, so that this is exact.
        assert found["joules_per_inference"] == pytest.approx(300 * 0.002 * (at_once + 3) / at_once, rel=1e-9)
        assert found["inside_calls_share"] == pytest.approx(at_once / (at_once + 3), rel=1e-9)

    def test_joules_are_told_without_idle_power_too(self, gauge: nvml.Gauge, clock: Clock) -> None:
        call = timed(clock, 0.01)
        found = energy.measure_energy(call, 1, gauge, {"missing": "no NVML"}, clock=clock, sampler=polled)
        assert found["joules_per_inference"] == pytest.approx(3.0, rel=0.01)
        assert found["joules_per_inference_above_idle"] == {"missing": "idle power: no NVML"}

    def test_idle_power_is_measured_over_a_window_of_nothing(self, gauge: nvml.Gauge, clock: Clock) -> None:
        found = energy.measure_idle(gauge, sleep=lambda seconds: clock.sleep(seconds), clock=clock, sampler=polled)
        assert (found["watts"], found["source"]) == (pytest.approx(300), "energy counter")
