"""An interrupted calibration continues where it stopped, and gives the same bits."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploycli.exporters.precision import calibrate as module
from deploycli.exporters.precision.calibrate import Calibration, calibrate
from deploycli.exporters.precision.calibration_state import load_state
from deploycli.exporters.precision.histogram import Histogram
from deploycli.exporters.precision.methods import Method
from deploycli.models.errors import EnvironmentUnsuitable, UsageError
from tests.exporters.precision.samples_in_memory import InMemory
from tests.exporters.precision.test_calibrate import BATCH, FIXED, ROWS, mlp, saved
from tests.exporters.precision.test_histogram import facts

TENSORS = ("x", "hidden", "active", "y")
SIZE = 4
STARTS = range(0, len(ROWS), SIZE)
ENTROPY = Method.of("entropy")
ROOT = Path(__file__).parents[3]


class StopError(Exception):
    """What ends a run."""


def run(
    model: Path, state: Path | None, samples: InMemory | None = None, key: str = "key", **changed: Any
) -> Calibration:
    arguments: dict[str, Any] = {"tensors": TENSORS, "method": ENTROPY, "batch_size": SIZE} | changed
    return calibrate(model, samples=samples or InMemory(ROWS), state=state, key=key, **arguments)


def result(calibration: Calibration) -> Any:
    histograms = {name: facts(h) for name, h in calibration.histograms.items()}
    return histograms, calibration.ranges, calibration.count, calibration.skipped


def stopped(model: Path, state: Path, at: int, error: type[BaseException] = StopError, **changed: Any) -> None:
    """Run until the batch that begins at sample ``at``."""

    def before(start: int) -> None:
        if start == at:
            raise error

    with pytest.raises(error):
        run(model, state, InMemory(ROWS, before=before), **changed)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(tmp_path, mlp())


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "made" / "calibration.npz"


@pytest.mark.parametrize("batch", [BATCH, FIXED])
@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("at", STARTS)
def test_it_continues_from_every_batch(tmp_path: Path, state: Path, at: int, error: Any, batch: str) -> None:
    model = saved(tmp_path, mlp(batch))
    expected = run(model, None)
    stopped(model, state, at, error)
    assert state.exists() == (at > 0)
    samples = InMemory(ROWS)
    found = run(model, state, samples)
    assert result(found) == result(expected)
    assert samples.started_at == [at]
    assert not state.exists()
    assert found.notes == ((f"{state}: continued after {at} samples",) if at else ())


def test_it_continues_after_stopping_again_and_again(model: Path, state: Path) -> None:
    for at in STARTS:
        stopped(model, state, at)
    assert result(run(model, state)) == result(run(model, None))


def test_half_a_batch_leaves_no_trace(model: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(model, None)
    of, calls = Histogram.of, 0

    def interrupted(values: Any) -> Histogram:
        nonlocal calls
        calls += 1
        if calls == len(TENSORS) + 2:  # the second tensor of the second batch
            raise KeyboardInterrupt
        return of(values)

    with monkeypatch.context() as patch:
        patch.setattr(Histogram, "of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model, state)
    samples = InMemory(ROWS)
    assert result(run(model, state, samples)) == result(expected)
    assert samples.started_at == [SIZE]


def test_a_killed_process_loses_what_was_not_saved(model: Path, state: Path) -> None:
    script = f"""
        import os, signal
        from pathlib import Path
        from deploycli.exporters.precision import calibrate
        from tests.exporters.precision.test_calibration_state import InMemory, ROWS, run

        def before(start):
            if start == {STARTS[-1]}:
                os.kill(os.getpid(), signal.SIGKILL)

        calibrate._SAVE_EVERY = 0
        run(Path({str(model)!r}), Path({str(state)!r}), InMemory(ROWS, before=before))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    samples = InMemory(ROWS)
    assert result(run(model, state, samples)) == result(run(model, None))
    assert samples.started_at == [STARTS[-1]]


def test_it_saves_now_and_then(model: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    run(model, state, InMemory(ROWS, before=lambda start: seen.append(state.exists())))
    assert seen == [False, False, False]
    monkeypatch.setattr(module, "_SAVE_EVERY", 0)
    run(model, state, InMemory(ROWS, before=lambda start: seen.append(state.exists())))
    assert seen[3:] == [False, True, True]


@pytest.mark.parametrize(
    "changed",
    [{"key": "another"}, {"batch_size": 3}, {"tensors": TENSORS[:3]}, {"samples": InMemory(ROWS[:9])}],
    ids=lambda changed: next(iter(changed)),
)
def test_the_state_of_another_calibration_is_ignored_and_replaced(
    model: Path, state: Path, changed: dict[str, Any]
) -> None:
    stopped(model, state, 8)
    found = run(model, state, **changed)
    assert result(found) == result(run(model, None, **changed))
    assert found.notes == (f"{state} is of another calibration: begun anew",)
    assert not state.exists()


def test_another_calibration_replaces_the_state(model: Path, state: Path) -> None:
    stopped(model, state, 4)
    stopped(model, state, 8, key="another")
    samples = InMemory(ROWS)
    run(model, state, samples, key="another")
    assert samples.started_at == [8]


def test_another_method_may_continue(model: Path, state: Path) -> None:
    stopped(model, state, 8)
    samples = InMemory(ROWS)
    found = run(model, state, samples, method=Method.of("mse"))
    assert samples.started_at == [8]
    assert result(found) == result(run(model, None, method=Method.of("mse")))


def test_a_damaged_state_is_ignored_with_a_note(model: Path, state: Path) -> None:
    stopped(model, state, 8)
    expected = result(run(model, None))
    whole = state.read_bytes()
    for damage in (b"", b"PK", b"no archive", whole[: len(whole) // 2], whole[:-1]):
        state.write_bytes(damage)
        found = run(model, state)
        assert result(found) == expected
        assert "is damaged" in found.notes[0]


def test_no_wrong_bit_is_believed(model: Path, state: Path) -> None:
    stopped(model, state, 8)
    whole = state.read_bytes()
    binding = {"key": "key", "tensors": TENSORS, "batch": SIZE, "samples": len(ROWS)}

    def loaded() -> Any:
        measured, note = load_state(state, binding, TENSORS)
        return note, measured.stop, {name: facts(h) for name, h in measured.histograms.items()}

    good = loaded()
    assert "continued" in good[0]
    for place in sorted({*range(0, len(whole), 997), *range(1200), *range(len(whole) - 300, len(whole))}):
        state.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        found = loaded()
        assert found == good or "is damaged" in found[0], place


def test_no_pickle_is_loaded(model: Path, state: Path) -> None:
    stopped(model, state, 8)
    with np.load(state) as file:
        arrays = dict(file)
    np.savez(state, **{**arrays, "header": np.array({"version": 1}, object)})
    (note,) = run(model, state).notes
    assert "is damaged" in note
    assert "allow_pickle=False" in note


def test_skipped_samples_are_remembered_and_counted(model: Path, state: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((100, 6)).astype(np.float32)

    def before(start: int) -> None:
        if start == 8:
            raise StopError

    with pytest.raises(StopError):
        run(model, state, InMemory(rows, unreadable=(2,), before=before))
    kept = state.read_bytes()
    found = run(model, state, InMemory(rows, unreadable=(2,)))
    assert (found.skipped, found.count) == (("row2",), 99)
    state.write_bytes(kept)
    with pytest.raises(UsageError, match="2 of 100 samples cannot be read: row2, row50"):
        run(model, state, InMemory(rows, unreadable=(2, 50)))


def test_a_state_that_cannot_be_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = tmp_path / "file" / "state.npz"
    nowhere.parent.write_text("not a folder")
    stopped(model, nowhere, 8)  # what stopped it is told, not that the state is lost
    monkeypatch.setattr(module, "_SAVE_EVERY", 0)
    with pytest.raises(EnvironmentUnsuitable, match="cannot write"):
        run(model, nowhere)
