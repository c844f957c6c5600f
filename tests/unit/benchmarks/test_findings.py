from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from suite_worlds import YEAR, made_up_suite, returns, small, walked

from benchmarks.comparison import Walked
from benchmarks.findings import LEAK_FACTOR, SHUFFLED_MARGIN, Findings, _checks, size_findings, suite_findings
from benchmarks.suite import plan_suite
from evaluation.statistics import deflated_sharpe, sharpe_by_path

SIZES = ("evaluation.suite.train_bars=[300, 400]", "evaluation.suite.primary_train_bars=400")
CONFIG = small(*SIZES, "evaluation.suite.trials={mbpo: 12}")
ALTERED = {"leak": 20.0, "shuffled": 0.5, "no_signal": 0.4}
WRONG = ALTERED | {"leak": 0.1}


@cache
def findings() -> Findings:
    plan = plan_suite(CONFIG)
    return suite_findings(CONFIG, made_up_suite(plan, altered=ALTERED), plan)


def checks_of(**altered: float) -> dict[str, bool]:
    plan = plan_suite(CONFIG)
    found = suite_findings(CONFIG, made_up_suite(plan, altered=ALTERED | altered), plan)
    return {check.variant: check.passed for check in found.checks}


def policies(**made: np.ndarray) -> dict[str, Walked]:
    families = {"mbpo": "model_based", "mbpo_planner": "model_based", "sac": "model_free"}
    base = {"buy_and_hold": returns(0.0, runs=1), "sac": returns(0.0, noise=1e-3), "mbpo": returns(1e-3, noise=1e-3)}
    return {name: walked(name, families.get(name, "reference"), one, score=1.0) for name, one in (base | made).items()}


# --- sizes -------------------------------------------------------------------------------------------------------


def test_every_training_length_has_its_own_policies_and_the_references():
    found = findings()
    assert list(found.sizes) == [300, 400]
    assert found.main is found.sizes[400]
    for bars, size in found.sizes.items():
        assert size.train_bars == bars
        assert {one.train_bars for one in size.policies.values()} == {0, bars}
        assert {name for name, one in size.policies.items() if one.train_bars == 0} == {
            *("flat", "buy_and_hold", "random_valid", "vol_target", "oracle", "belief_filter")
        }
        assert len(size.policies) == 14
    assert found.sizes[300].policies["flat"] is found.sizes[400].policies["flat"]


def test_runs_become_seeds_and_references_have_one():
    size = findings().main.policies
    assert size["mbpo"].returns.shape == (2, 6, 120)
    assert size["planner"].returns.shape == (2, 2, 120)
    assert size["oracle"].returns.shape == (1, 6, 120)


def test_cells_that_do_not_match_their_results_are_refused():
    plan = plan_suite(CONFIG)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        suite_findings(CONFIG, made_up_suite(plan[1:], altered=ALTERED), plan)


def test_the_claim_is_against_the_model_free_policy_that_was_best_on_validation():
    main = findings().main
    assert (main.claim.challenger, main.claim.baseline) == ("mbpo", "sac")
    pairs = [(one.challenger, one.baseline) for one in main.others]
    assert {baseline for challenger, baseline in pairs if challenger == "mbpo"} == set(main.policies) - {
        *("mbpo", "sac", "oracle")
    }
    assert [pair for pair in pairs if pair[0] != "mbpo"] == [("planner", "sac"), ("mbpo_planner", "sac")]


def test_the_same_results_give_the_same_findings():
    plan = plan_suite(CONFIG)
    again = suite_findings(CONFIG, made_up_suite(plan, altered=ALTERED), plan)
    assert again.main.claim.gain == findings().main.claim.gain
    assert again.main.deflated == findings().main.deflated
    assert again.main.superior == findings().main.superior


def test_what_policies_did_on_the_first_path_is_that_of_the_first_run_and_primary_length():
    found = findings()
    assert set(found.first_path) == set(found.main.policies)
    for name in ("mbpo", "sac", "flat"):
        assert np.array_equal(found.first_path[name]["returns"], found.main.policies[name].returns[0])


def test_stress_is_kept_by_run():
    found = findings().stress
    assert "oracle" not in found
    assert "planner" not in found
    assert found["mbpo"]["sharpe"].tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert found["flat"]["killed"].shape == (1, 2)


# --- checks of the instrument ------------------------------------------------------------------------------------


def test_checks_pass_at_their_thresholds_and_fail_beyond():
    oracle = float(findings().main.policies["oracle"].metrics["sharpe"].mean())
    by_variant = {check.variant: check for check in findings().checks}
    assert set(by_variant) == {"leak", "shuffled"}
    assert by_variant["leak"].threshold == pytest.approx(LEAK_FACTOR * oracle)
    assert by_variant["leak"].sharpe == 20.0
    assert by_variant["shuffled"].threshold == pytest.approx(0.4 + SHUFFLED_MARGIN)
    assert checks_of(leak=LEAK_FACTOR * oracle + 1e-9, shuffled=0.5) == {"leak": True, "shuffled": True}
    assert checks_of(leak=LEAK_FACTOR * oracle - 1e-6) == {"leak": False, "shuffled": True}
    assert checks_of(shuffled=0.4 + SHUFFLED_MARGIN + 1e-6) == {"leak": True, "shuffled": False}


def test_a_failed_check_forbids_go_at_every_length():
    plan = plan_suite(CONFIG)
    wrong = suite_findings(CONFIG, made_up_suite(plan, altered=WRONG), plan)
    for found, passed in ((findings(), True), (wrong, False)):
        for size in found.sizes.values():
            for one in (size.claim, *size.others):
                assert one.verdict.criterion("instrument").passed is passed
    (failed,) = [check for check in wrong.checks if not check.passed]
    assert failed.failure == f"ridge with tomorrow's return as a feature has Sharpe 0.10, below {failed.threshold:.2f}"
    assert failed.failure in wrong.main.claim.verdict.criterion("instrument").reason


def test_learners_are_checked_on_their_own_paths_and_planners_are_not():
    config = small(*SIZES, "evaluation.suite.check_learners=[ridge, mbpo]")
    plan = plan_suite(config)
    made = made_up_suite(plan, altered=ALTERED)
    checks = suite_findings(config, made, plan).checks
    assert {(check.variant, check.policy) for check in checks} == {
        (variant, policy) for variant in ("leak", "shuffled") for policy in ("ridge", "mbpo")
    }
    oracle = findings().main.policies["oracle"].metrics["sharpe"]
    one = {("leak", "ridge"): np.array([20.0, 20.0])}
    (check,) = _checks(one, oracle[0])
    assert check.threshold == pytest.approx(LEAK_FACTOR * oracle[0, :2].mean())
    # An oracle that is worth nothing is no yardstick.
    assert not _checks(one, np.zeros(6))[0].passed


def test_the_best_without_signal_is_the_yardstick_of_all():
    ratios = {("no_signal", "ridge"): 0.9, ("no_signal", "mbpo"): 0.0, ("shuffled", "mbpo"): 0.95}
    (check,) = _checks({key: np.full(4, value) for key, value in ratios.items()}, np.ones(4))
    assert (check.policy, check.passed) == ("mbpo", True)
    assert check.threshold == pytest.approx(0.9 + SHUFFLED_MARGIN)


def test_a_suite_without_checks_is_undecided():
    config = small(*SIZES, "evaluation.suite.check_learners=[]")
    plan = plan_suite(config)
    found = suite_findings(config, made_up_suite(plan), plan)
    assert found.main.claim.verdict.criterion("instrument").passed is None


def test_a_check_without_a_number_does_not_pass():
    assert checks_of(leak=float("nan"), shuffled=float("nan")) == {"leak": False, "shuffled": False}


# --- many policies, many trials ----------------------------------------------------------------------------------


def test_policies_that_beat_buy_and_hold_are_named_and_those_told_the_truth_are_not_asked():
    made = policies(oracle=returns(5e-3, runs=1), flat=returns(0.0, runs=1) * 0.0, planner=returns(9e-3)[:, :2])
    found = size_findings(CONFIG, made, 400, YEAR).superior
    assert found.superior == ("mbpo",)
    assert found.tested == ("sac", "mbpo")
    assert found.p_value < 0.05
    assert size_findings(CONFIG, policies(mbpo=returns(-1e-3, noise=1e-3)), 400, YEAR).superior.superior == ()


def test_too_few_bars_leave_the_superior_open():
    short = {name: returns(0.0, bars=25) for name in ("buy_and_hold", "sac", "mbpo")}
    found = size_findings(CONFIG, policies(**short), 400, YEAR)
    assert found.superior is None
    assert found.deflated is None
    assert found.claim.sharpe is None


def test_runs_are_tested_one_by_one_and_not_as_an_ensemble():
    """Ten runs that are each as good as buy and hold, with noise of their own that an ensemble would not have."""
    base, runs = returns(3e-3, runs=1), returns(3e-3 * 2**0.5, runs=10, noise=0.01)
    ensemble = runs.mean(axis=0, keepdims=True)
    for made, superior in ((runs, ()), (ensemble, ("mbpo",))):
        found = size_findings(CONFIG, policies(buy_and_hold=base, sac=base, mbpo=made), 400, YEAR)
        assert found.superior.superior == superior


def test_all_trials_of_the_learner_are_counted_whichever_of_its_policies_challenges():
    assert findings().main.deflated.trials == 12
    planning = CONFIG.evaluation.model_copy(
        update={"verdict": CONFIG.evaluation.verdict.model_copy(update={"challenger": "mbpo_planner"})}
    )
    config = CONFIG.model_copy(update={"evaluation": planning})
    made = policies(mbpo_planner=returns(1e-3, noise=2e-3))
    assert size_findings(config, made, 400, YEAR).deflated.trials == 12


def test_the_deflated_ratio_is_that_of_a_middling_run_and_path():
    made = policies()
    found = size_findings(CONFIG, made, 400, YEAR).deflated
    ratios = made["mbpo"].metrics["sharpe"]
    assert found.sharpe == pytest.approx(np.sort(ratios.ravel())[6], rel=1e-6)
    run, path = np.argwhere(ratios == np.sort(ratios.ravel())[6])[0]
    # Between runs on one path, as the ratio is: means over paths scatter less and would hardly deflate.
    spread = math.sqrt(np.mean([np.var(ratios[:, one], ddof=1) for one in range(ratios.shape[1])]))
    assert spread > ratios.mean(axis=1).std(ddof=1)
    assert found == deflated_sharpe(made["mbpo"].returns[run, path].astype(np.float64), 12, spread, YEAR)
    assert found.probability < found.undeflated


def test_nothing_is_deflated_for_a_policy_that_never_trades_or_a_single_run_of_many_trials():
    still = policies(mbpo=np.zeros((2, 6, 120), np.float32))
    assert size_findings(CONFIG, still, 400, YEAR).deflated is None
    alone = policies(mbpo=returns(1e-3, runs=1))
    assert size_findings(CONFIG, alone, 400, YEAR).deflated is None
    assert size_findings(small("evaluation.suite.trials={mbpo: 1}"), alone, 400, YEAR).deflated.trials == 1


def test_nothing_is_deflated_where_nobody_counted_the_trials():
    assert size_findings(small("evaluation.suite.trials={}"), policies(), 400, YEAR).deflated is None
    assert size_findings(small("evaluation.suite.trials={sac: 9}"), policies(), 400, YEAR).deflated is None


def test_of_a_single_series_the_run_with_the_median_ratio_is_deflated():
    made = np.concatenate([returns(mean, runs=1, paths=1, noise=1e-3) for mean in (1e-3, 3e-3, 2e-3)])
    one = walked("mbpo", "model_based", made)
    policies = {"mbpo": one, "buy_and_hold": walked("buy_and_hold", "reference", returns(0.0, runs=1, paths=1))}
    policies["sac"] = walked("sac", "model_free", returns(0.0, runs=1, paths=1))
    for name, each in policies.items():
        metrics = {key: np.repeat(values, 2, axis=1) for key, values in each.metrics.items()}
        policies[name] = replace(each, metrics=metrics, train_bars=0)
    # Fold by fold the order is another one: the first run looks middling there.
    policies["mbpo"].metrics["sharpe"][:] = [[5.0], [1.0], [9.0]]
    found = size_findings(CONFIG, policies, 0, YEAR).deflated
    spread = float(sharpe_by_path(made[:, 0], YEAR).std(ddof=1))
    assert found == deflated_sharpe(made[2, 0].astype(np.float64), 12, spread, YEAR)
