"""The whole bench: against fakes of known behaviour, then with real models."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deploykit.errors import InputError, UsageError
from deploykit.measure import (
    Candidate,
    bench,
    compare_speed,
    noise_floor,
    read_result,
    write_result,
)
from deploykit.measure.lane import Lane
from deploykit.measure.run import _drifts
from deploykit.measure.statistics import throughput_together

from .conftest import FAKE_WORKER, FAST

FATES = {
    "negated": "output 'y' is wrong: its cosine with the baseline's is -1.000",
    "nan": "output 'y' has NaN or infinite values",
    "renamed": "the outputs are ['z'], the baseline's ['y']",
    "cut": "output 'y' has shape (1, 15), the baseline's (1, 16)",
    "forgetful": "output 'y' changed between the first run and the last",
    "crash": "the process ended with signal 11 (Segmentation fault): about to crash",
    "exit": "the process ended with exit code 3",
    "raise": "ArithmeticError: no luck",
    "missing": "fakert cannot run here: it is not installed",
    "fallen": "asked for fake, ran 60% on cpu",
    "halved": "the model is fp32, but no operator ran in it (ran: fp16 1)",
}
GOOD = ("steady", "rounded", "talk", "stall", "slow-load", "hungry", "leaning", "brain")


@pytest.fixture(scope="module")
def result(fake, vectors):
    """One run with all kinds of candidates beside each other."""
    candidates = [fake(kind) for kind in (*GOOD, *FATES)]
    candidates.append(fake("steady:0.6", name="slow"))
    # Blocks longer than the scheduler's time slice: a busy machine must not decide this test.
    options = FAST.model_copy(update={"block_ms": 15})
    return bench(candidates, options, data=vectors, worker=FAKE_WORKER)


@pytest.fixture
def started(monkeypatch) -> list[subprocess.Popen]:
    """The processes that a run starts, in order."""
    found = []
    popen = subprocess.Popen

    def spy(*arguments, **named):
        found.append(popen(*arguments, **named))
        return found[-1]

    monkeypatch.setattr("deploykit.measure.child.subprocess.Popen", spy)
    return found


@pytest.mark.parametrize("kind", FATES)
def test_what_went_wrong_is_the_reason_that_voids_a_measurement(result, kind):
    assert result.of(kind, 1).invalid.startswith(FATES[kind])


@pytest.mark.parametrize("kind", [*GOOD, "slow", "steady (again)"])
def test_the_others_are_measured_in_full(result, kind):
    measurement = result.of(kind, 1)
    assert measurement.invalid is None
    assert len(measurement.blocks_ns) == 15
    assert measurement.warmup_runs >= 5
    assert measurement.placement.provider == "fake"
    assert measurement.peak_rss_bytes > 10 << 20
    assert measurement.cosines["y"] > 0.9


def test_a_planted_difference_is_claimed_and_its_absence_is_not(result):
    assert compare_speed(result, "slow", 1).claim == "slower"
    assert 0.2 < compare_speed(result, "slow", 1).speedup.value < 0.6
    noise = noise_floor(result, 1)
    assert noise.low < 1.15
    assert noise.high > 1 / 1.15
    control = compare_speed(result, "steady (again)", 1)
    assert (control.claim, control.speedup) == ("no difference", noise)


def test_no_call_is_shorter_than_the_truth(result):
    for kind in GOOD:
        assert min(min(block) for block in result.of(kind, 1).blocks_ns) >= 200_000


def test_what_a_runtime_did_with_part_of_the_work_is_told(result):
    assert "leaning (batch 1): asked for fake, ran 20% on cpu" in result.notes
    assert "brain (batch 1): the file is fp32, the runtime ran bf16 1" in result.notes
    assert [k.provider for k in result.of("leaning", 1).kernels] == ["fake", "cpu"]


def test_a_trend_over_the_run_is_a_disturbance_and_named(measured):
    rising = measured([[1e6 * (1 + 0.02 * i)] * 3 for i in range(30)], name="rising")
    flat = measured([[1e6] * 3] * 30)
    assert _drifts([rising, flat, rising.model_copy(update={"invalid": "gone"})]) == [
        "rising (batch 1): a call went from 1.09 to 1.49 ms over the run"
    ]


def test_one_feed_for_every_call_is_told(fake, vectors):
    options = FAST.model_copy(update={"batch_sizes": (64,)})  # of 100 samples
    result = bench([fake("steady")], options, data=vectors, worker=FAKE_WORKER)
    assert "every call at batch 64 ran on the same input, and no other" in result.notes


def test_stalls_stay_in_the_raw_times(result):
    longest = [max(block) for block in result.of("stall", 1).blocks_ns]
    assert sum(time >= 50e6 for time in longest) >= 3


def test_loading_is_timed_and_the_start_of_the_interpreter_is_not(result):
    assert result.of("slow-load", 1).load_ns >= 0.3e9
    assert result.of("steady", 1).load_ns < 0.25e9


def test_the_account_of_placement_is_not_in_the_memory(result):
    assert result.of("hungry", 1).peak_rss_bytes < result.of("steady", 1).peak_rss_bytes + (
        99 << 20
    )


def test_a_run_says_where_its_numbers_come_from(result, vectors, tmp_path):
    assert (result.inputs, result.data_digest) == ("real", vectors.digest)
    assert (result.baseline, result.control) == ("steady", "steady (again)")
    assert result.environment.cores >= len(result.of("steady", 1).affinity) == 1
    write_result(result, tmp_path / "bench.json")
    assert read_result(tmp_path / "bench.json") == result


def test_a_hang_is_stopped_at_once_and_costs_the_others_nothing(fake, vectors, started):
    alive = []

    def watch(what: str, done: int, steps: int) -> None:
        if what.startswith("timing"):
            alive.append([process.poll() is None for process in started])

    options = FAST.model_copy(update={"max_seconds": 5})
    result = bench(
        [fake("steady"), fake("hang")], options, data=vectors, worker=FAKE_WORKER, progress=watch
    )
    assert result.of("hang", 1).invalid == "no answer in 5.2 s"
    assert alive == [[True, False, True]] * 15
    assert len(result.of("steady", 1).blocks_ns) == 15


def test_without_a_valid_baseline_nothing_is_claimed(fake, vectors):
    result = bench([fake("missing"), fake("steady")], FAST, data=vectors, worker=FAKE_WORKER)
    assert result.of("steady", 1).invalid is None
    assert "missing (batch 1) is invalid: there is nothing to compare with" in result.notes
    with pytest.raises(InputError, match="fakert cannot run here"):
        compare_speed(result, "steady", 1)


def test_outputs_are_held_against_the_first_of_the_family(fake, vectors):
    def student(kind: str, name: str) -> Candidate:
        return fake(kind, name).model_copy(update={"family": "student"})

    candidates = [fake("steady"), student("negated", "student"), student("steady", "broken")]
    result = bench(candidates, FAST, data=vectors, worker=FAKE_WORKER)
    assert result.of("student", 1).invalid is None
    assert "'y' is wrong" in result.of("broken", 1).invalid
    assert result.of("steady (again)", 1).invalid is None


def test_random_inputs_and_quick_mark_the_result(fake):
    options = FAST.model_copy(update={"preset": "quick", "batch_sizes": (2, 3)})
    seen = []
    result = bench(
        [fake("steady")],
        options,
        data=None,
        worker=FAKE_WORKER,
        progress=lambda *step: seen.append(step),
    )
    assert (result.inputs, result.data_digest) == ("random", None)
    assert "inputs are random" in " ".join(result.notes)
    assert "NOT COMPARABLE" in " ".join(result.notes)
    assert [m.batch_size for m in result.measurements] == [2, 2, 3, 3]
    assert [done for _, done, _ in seen] == list(range(2 * (4 + 15)))
    assert {steps for *_, steps in seen} == {2 * (4 + 15)}


def test_long_calls_shorten_the_run(fake, vectors):
    options = FAST.model_copy(update={"blocks": 60, "block_ms": 1})
    result = bench([fake("steady:12")], options, data=vectors, worker=FAKE_WORKER)
    assert len(result.of("steady", 1).blocks_ns) == 15
    assert "15 blocks a process instead of 60: calls are long" in result.notes


def test_the_order_of_blocks_is_random_and_seeded(fake, vectors, monkeypatch):
    turns = []
    time = Lane.time
    monkeypatch.setattr(
        Lane, "time", lambda lane, i: (turns.append((i, lane.candidate.name)), time(lane, i))
    )
    for _ in range(2):
        bench([fake("steady")], FAST, data=vectors, worker=FAKE_WORKER)
    assert turns[:30] == turns[30:]
    rounds = [turns[i : i + 2] for i in range(0, 30, 2)]
    assert all({name for _, name in pair} == {"steady", "steady (again)"} for pair in rounds)
    assert len({pair[0][1] for pair in rounds}) == 2


def test_ctrl_c_ends_the_run_and_every_process(fake, vectors, started):
    def interrupt(what: str, done: int, steps: int) -> None:
        if what.startswith("timing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench([fake("steady")], FAST, data=vectors, worker=FAKE_WORKER, progress=interrupt)
    assert [process.poll() for process in started] == [-9, -9]


def test_what_does_not_fit_together_is_refused_before_anything_runs(fake, vectors):
    def refused(candidates, **changes):
        return bench(
            candidates, FAST.model_copy(update=changes), data=vectors, worker=("no-such-program",)
        )

    with pytest.raises(UsageError, match="no model"):
        refused([])
    with pytest.raises(UsageError, match="two models are called 'a'"):
        refused([fake("steady", "a"), fake("steady", "a")])
    with pytest.raises(UsageError, match=r"two models are called 'a \(again\)'"):
        refused([fake("steady", "a"), fake("steady", "a (again)")])
    with pytest.raises(UsageError, match="is fixed, asked for 4"):
        refused([fake("steady", batch=1)], batch_sizes=(1, 4))
    with pytest.raises(UsageError, match="5000 threads"):
        refused([fake("steady")], threads=5000)


def test_the_worker_leaves_stdin_and_stdout_to_nobody():
    """It ends with its stdin, and imports no heavy library before it is asked to."""
    code = (
        "import sys, deploykit.measure, deploykit.measure.worker\n"
        "print({'torch', 'onnx', 'onnxruntime', 'openvino', 'scipy'} & set(sys.modules))"
    )
    light = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert light.stdout.strip() == "set()"
    command = [sys.executable, "-m", "deploykit.measure.worker"]
    ended = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_instances_at_once_are_added_up_and_a_broken_engine_is_left_out(fake, vectors):
    options = FAST.model_copy(update={"instances": (1, 2)})
    result = bench([fake("steady:0.4"), fake("missing")], options, data=vectors, worker=FAKE_WORKER)
    assert [(i.name, len(i.blocks_ns)) for i in result.instances] == [("steady", 1), ("steady", 2)]
    one, two = result.instances
    assert not one.shared
    assert two.shared == (len(os.sched_getaffinity(0)) < 2)
    assert all(len(blocks) == 15 for blocks in two.blocks_ns)
    assert throughput_together(two).value <= 2 / 0.4e-3


def test_several_processes_give_the_blocks_between_them(fake, vectors, started, monkeypatch):
    monkeypatch.setattr("deploykit.measure.run.PATIENCE", 1e9)  # a busy machine decides nothing
    options = FAST.model_copy(update={"processes": 3, "blocks": 16})
    result = bench([fake("steady"), fake("crash")], options, data=vectors, worker=FAKE_WORKER)
    steady = result.of("steady", 1)
    assert steady.process_blocks == (6, 6, 6)
    assert len(steady.blocks_ns) == 18
    assert len(steady.loads_ns) == len(steady.first_runs_ns) == 3
    assert "signal 11" in result.of("crash", 1).invalid
    assert len(started) == 3 * 2 + 1  # what crashed is not started again


def test_many_processes_end_early_where_loading_is_long(fake, vectors, monkeypatch):
    monkeypatch.setattr("deploykit.measure.run.LONG", 0)
    monkeypatch.setattr("deploykit.measure.run.PATIENCE", 1e9)
    for blocks, each in ((25, (5, 5, 5)), (15, (3, 3, 3, 3, 3))):  # fewer than 15 tell nothing
        options = FAST.model_copy(update={"processes": 5, "blocks": blocks})
        result = bench([fake("steady")], options, data=vectors, worker=FAKE_WORKER)
        assert result.of("steady", 1).process_blocks == each
        told = "3 processes instead of 5: loading is long" in result.notes
        assert told == (len(each) == 3)
