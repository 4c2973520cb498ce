from __future__ import annotations

import pytest

from tests.tensorrt_api import child, clients
from tests.tensorrt_api.bindings import VERSIONS

each_version = pytest.mark.parametrize("version", VERSIONS)


@each_version
def test_a_build_is_recorded(version: str) -> None:
    *calls, plan = child.call(version, clients.build)
    assert plan == "a plan"
    by_target = {target: arguments for target, arguments, _ in calls}
    assert by_target["Builder.create_network"] == {"flags": 2 if version.startswith("10.") else 1}
    assert by_target["OnnxParser.parse_from_file"] == {"model": "model.onnx"}
    assert by_target["IBuilderConfig.clear_flag"] == {"flag": "TF32"}
    assert by_target["IBuilderConfig.profiling_verbosity"] == {"value": "DETAILED"}
    assert by_target["IBuilderConfig.set_memory_pool_limit"] == {"pool": "WORKSPACE", "pool_size": 1 << 20}
    assert by_target["IOptimizationProfile.set_shape"] == {
        "input": "images",
        "min": [1, 3, 224, 224],
        "opt": [8, 3, 224, 224],
        "max": [16, 3, 224, 224],
    }
    assert calls[-1] == [
        "Builder.build_serialized_network",
        {"network": "INetworkDefinition", "config": "IBuilderConfig"},
        {"bytes": 6},
    ]
    targets = [target for target, _, _ in calls]
    assert targets.index("OnnxParser.parse_from_file") < targets.index("Builder.build_serialized_network")


@each_version
def test_a_build_can_fail(version: str) -> None:
    *calls, plan = child.call(version, clients.build_nothing)
    assert plan is None
    assert calls[-1][2] is None
    assert child.call(version, clients.build_refused) == [["no such operator", "attention"]]


@each_version
def test_an_engine_is_opened_and_run(version: str) -> None:
    assert child.call(version, clients.run) == {
        "name": "tiny",
        "modes": ["INPUT", "OUTPUT"],
        "dtypes": ["FLOAT", "HALF"],
        "profiles": 2,
        "largest": [4, 3],
        "before": ["left"],
        "refused": False,
        "out": [4, 7],
        "layers": '{"Layers": ["one"]}',
        "run": [["IExecutionContext.execute_async_v3", {"stream_handle": 7}, True]],
    }


@each_version
def test_what_is_set_is_there(version: str) -> None:
    assert child.call(version, clients.memory) == {
        "tf32": [True, False],
        "refit": [False, True],
        "flags": True,
        "workspace": 4096,
        "level": [3, 5],
        "timings": "known",
        "profile": [[1, 2], [3, 4], [5, 6]],
        "profiles": [0, 1, 2],
        "same cache": True,
        "addresses": [8, 0],
        "typed": True,
        "unknown tensor": ["NONE", []],
    }


@each_version
def test_every_mistake_is_refused(version: str) -> None:
    outcomes = child.call(version, clients.mistakes)
    assert set(outcomes) == set(clients.MISTAKES)
    assert [name for name, outcome in outcomes.items() if outcome not in ("AttributeError", "TypeError")] == []


@each_version
def test_removed_names_are_not_there(version: str) -> None:
    old = version.startswith("10.")
    assert child.call(version, clients.removed) == [old, old, old, True]


@each_version
def test_the_behaviour_is_of_members_that_exist(version: str) -> None:
    assert child.call(version, clients.unknown_behaviour) == []


@each_version
def test_the_doubles_accept_what_the_real_values_accept(version: str) -> None:
    assert child.call(version, clients.conversions) == {}


def test_a_scenario_cannot_answer_for_what_is_not_there() -> None:
    assert "Builder.build_cuda_engine" in child.call(VERSIONS[-1], clients.impossible_answer)


def test_an_answer_may_be_a_function_or_an_exception() -> None:
    assert child.call(VERSIONS[-1], clients.raising_answer) == "none left"


def test_a_callback_hears_what_the_scenario_says() -> None:
    assert child.call(VERSIONS[-1], clients.callbacks) == [["phase", 3], "ERROR: out of memory"]


def test_a_warning_is_an_error_there() -> None:
    with pytest.raises(AssertionError, match="DeprecationWarning: old"):
        child.call(VERSIONS[-1], clients.warning)


def test_a_failure_carries_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"(?s)exit 1.*line \d+, in failing.*ZeroDivisionError"):
        child.call(VERSIONS[-1], clients.failing, 0)
