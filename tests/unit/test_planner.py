"""Plans: what a target and a project decide before any model is loaded."""

import itertools
import json
from pathlib import Path

import pytest

from deploy.planner import Plan, make_plan
from deploy.project import Project, check
from targets.catalog import find
from targets.errors import UsageError

BASE = {
    "model": {"source": "model.py:build"},
    "inputs": {"image": {"shape": ["batch", 1, 8, 8]}},
    "calibration": {"source": "c.npz"},
    "evaluate": {"source": "e.npz"},
}


def project(**tables: object) -> Project:
    return Project(
        file=Path("deploy.toml").absolute(), tables=check({**BASE, **tables}, origin="deploy.toml")
    )


def planned(target: str = "galaxy-s22", *, ladder: bool = True, **tables: object) -> Plan:
    return make_plan(project(**tables), find(target), ladder=ladder)


def names(plan: Plan) -> list[str]:
    return [rung.name for rung in plan.rungs]


def test_a_phone_plan_climbs_dense_and_pruned_in_float_and_int8() -> None:
    assert names(planned()) == ["dense-float", "dense-int8", "pruned-float", "pruned-int8"]


def test_without_real_evaluation_data_nothing_is_pruned_unless_a_sparsity_is_asked_for() -> None:
    synthetic = {"evaluate": {"source": "synthetic"}}
    plan = planned(**synthetic)
    assert names(plan) == ["dense-float", "dense-int8"]
    assert any("nothing is pruned" in note for note in plan.notes)
    assert "pruned-int8" in names(planned(**synthetic, prune={"sparsity": 0.4}))


def test_integer_inputs_add_the_dynamic_int8_rung() -> None:
    tokens = {"inputs": {"tokens": {"shape": ["batch", 8], "dtype": "int64"}}}
    assert "dense-int8-dynamic" in names(planned(**tokens))


def test_no_ladder_plans_one_rung() -> None:
    assert names(planned(ladder=False)) == ["pruned-int8"]
    assert names(planned(ladder=False, prune={"pattern": "none"})) == ["dense-int8"]


def test_a_phone_with_two_chips_gets_widths_that_fit_both() -> None:
    plan = planned()
    assert plan.record().chip == "sm8450, exynos-2200"
    assert plan.pruning is not None
    assert all(plan.pruning.multiple % chip.runtimes[0].channel_multiple == 0 for chip in plan.target.chips)


def test_neighbouring_steps_fit() -> None:
    steps = planned(recover={"source": "t.npz"}).steps
    assert all(before.produces == after.accepts for before, after in itertools.pairwise(steps))
    assert [step.name for step in steps] == ["prune", "recover", "capture", "quantize", "export", "validate"]


def test_useless_sparsity_is_refused_and_objective_size_allows_it() -> None:
    sparse = project(prune={"pattern": "unstructured", "sparsity": 0.5})
    with pytest.raises(UsageError, match="objective size"):
        make_plan(sparse, find("galaxy-s22"))
    assert make_plan(sparse, find("galaxy-s22"), objective="size").pattern == "unstructured"


def test_a_runtime_that_this_machine_lacks_gives_way_and_the_plan_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deploy.planner.at_hand", lambda name: name != "openvino")
    plan = planned("host")
    assert plan.runtime.name == "onnxruntime"
    assert plan.fallback is not None
    assert any("lacks it" in refusal.reason for refusal in plan.refused)


def test_runtimes_compete_on_a_server_and_each_brings_its_own_rungs() -> None:
    plan = planned("host", evaluate={"source": "e.npz"})
    names = [rung.name for rung in plan.rungs]
    assert [runtime.name for runtime in plan.runtimes] == ["openvino", "onnxruntime"]
    assert len(names) == len(set(names)) >= 9
    assert {"openvino/dense-int8-qdq", "onnxruntime/pruned-int8"} <= {*names}
    assert not any("executorch" in name for name in names)
    assert plan.pruning is not None
    assert all(plan.pruning.multiple % runtime.channel_multiple == 0 for runtime in plan.runtimes)


def test_a_phone_has_one_runtime_and_a_named_one_is_alone() -> None:
    assert len(planned("galaxy-s22").runtimes) == 1
    plan = make_plan(project(), find("host"), runtimes=["onnxruntime"])
    assert names(plan) == ["dense-float", "dense-int8", "pruned-float", "pruned-int8"]


def test_dynamic_int8_is_a_rung_where_inputs_are_integers() -> None:
    tokens = project(inputs={"ids": {"shape": ["batch", 8], "dtype": "int64"}})
    found = {rung.name for rung in make_plan(tokens, find("host")).rungs}
    assert "onnxruntime/dense-int8-dynamic" in found
    assert "openvino/dense-int8-dynamic" not in found


def test_int4_is_made_by_those_that_can_when_it_is_asked_for() -> None:
    asked = project(quantize={"precision": "int4"})
    plan = make_plan(asked, find("host"))
    assert plan.runtime.name == "onnxruntime"
    assert names(plan) == ["dense-int4", "pruned-int4"]
    assert not any(rung.precision == "int4" for rung in planned("host").rungs)


def test_weights_keep_a_bit_where_sums_of_products_overflow() -> None:
    assert make_plan(project(), find("laptop")).saturates
    assert not make_plan(project(), find("xeon")).saturates
    assert make_plan(project(), find("graviton4")).signed_activations


def test_a_table_for_the_target_lies_over_the_general_one() -> None:
    base = project(prune={"sparsity": 0.4}, target={"galaxy-s22": {"prune": {"sparsity": 0.5}}})
    plan = make_plan(base.for_target("galaxy-s22"), find("galaxy-s22"))
    assert plan.pruning is not None
    assert plan.pruning.sparsity == 0.5


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"prune": {"criterion": "l3"}}, "Did you mean 'l"),
        ({"quantize": {"precision": "int9"}}, "Did you mean 'int8'"),
        ({"prune": {"method": "chanels"}}, "Did you mean 'channels'"),
    ],
)
def test_unknown_words_name_the_nearest(tables: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        planned(**tables)


def test_the_plan_as_json_has_the_keys_of_the_contract() -> None:
    from deploy.manifest import encode

    content = json.loads(encode(planned().record()))
    assert {"target", "chip", "runtime", "pattern", "precision", "steps", "refused"} <= content.keys()
    assert {"name", "accepts", "produces", "reason"} == content["steps"][0].keys()
    assert {"what", "reason", "instead"} == content["refused"][0].keys()


def test_keys_that_nothing_acts_on_yet_are_told_and_not_ignored_in_silence() -> None:
    notes = planned(budget={"speedup": 2.0}).notes
    assert any("budget.speedup" in note and "not read" in note for note in notes)
    assert not any("not read" in note for note in planned().notes)


def test_each_runtime_is_pruned_by_the_pattern_that_it_gains_from() -> None:
    plan = make_plan(project(), find("xeon"), accepted_licences=["deepsparse"])
    assert (plan.runtime.name, plan.pattern, plan.licences) == ("deepsparse", "unstructured", ("deepsparse",))
    patterns = {(rung.runtime, rung.pattern) for rung in plan.rungs if rung.pruned}
    assert patterns == {
        ("deepsparse", "unstructured"), ("openvino", "structured"), ("onnxruntime", "structured")
    }  # fmt: skip
    assert plan.prunings["structured"].multiple == 16
    assert (plan.prunings["unstructured"].of, plan.prunings["unstructured"].sparsity) == ("weights", 0.8)
    assert any("not production" in note for note in plan.notes)


def test_a_sparsity_that_was_asked_for_is_the_planned_patterns_alone() -> None:
    asked = project(prune={"sparsity": 0.9})
    plan = make_plan(asked, find("xeon"), accepted_licences=["deepsparse"])
    assert {rung.runtime for rung in plan.rungs if rung.pruned} == {"deepsparse"}
    declined = make_plan(asked, find("xeon"))
    assert {rung.pattern for rung in declined.rungs} == {"dense", "structured"}
    little = make_plan(project(prune={"sparsity": 0.3}), find("xeon"), accepted_licences=["deepsparse"])
    assert any("[target.xeon.prune] sparsity" in note for note in little.notes)


def test_a_runtime_with_terms_is_not_named_without_accepting_them() -> None:
    with pytest.raises(UsageError, match="--accept-license deepsparse"):
        make_plan(project(), find("xeon"), runtimes=["deepsparse"])
    asked = project(prune={"method": "channels"})
    with pytest.raises(UsageError, match="unstructured sparsity"):
        make_plan(asked, find("xeon"), accepted_licences=["deepsparse"])


@pytest.mark.parametrize("precision", ["int4", "int8-dynamic", "bfloat16"])
def test_a_precision_that_the_sparse_engine_lacks_takes_its_pattern_along(precision: str) -> None:
    asked = project(quantize={"precision": precision}, evaluate={"source": "e.npz"})
    plan = make_plan(asked, find("xeon"), accepted_licences=["deepsparse"])
    assert {rung.runtime for rung in plan.rungs} <= {"openvino", "onnxruntime"}
    assert {rung.pattern for rung in plan.rungs} == {"dense", "structured"}
    assert (plan.pattern, plan.licences) == ("structured", ())
