from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from suite_worlds import BARS, PATHS, YEAR, compute, same, small

import benchmarks.suite
from benchmarks.contenders import Fitted, walk_panel
from benchmarks.folds import FoldResult, run_folds
from benchmarks.machine import library_versions
from benchmarks.suite import (
    NOT_IN_CELLS,
    SOURCES,
    STRESS_SEED,
    TEST_SEED,
    VALIDATION_SEED,
    Cell,
    judge,
    judged_market,
    lesson_of,
    plan_suite,
    source_hash,
    suite_tasks,
    time_decisions,
    work_on_cell,
)
from benchmarks.tuning import TUNING_RUNS
from configs import ConfigError, DetentConfig, load_config
from configs.evaluation import SuiteConfig
from envs import TradingDynamics
from envs.synthetic import simulate_panel
from evaluation import metrics_by_path

CONFIG = small()
CELLS = (
    Cell("references"),
    Cell("truth"),
    *(Cell(learner, 300) for learner in ("linear_signal", "ridge", "model_free", "sac", "masked_dqn", "mbpo")),
)


@cache
def result(cell: Cell) -> FoldResult:
    return compute(CONFIG, cell)


@cache
def dynamics() -> TradingDynamics:
    return TradingDynamics.from_config(judged_market(CONFIG).features.names, CONFIG)


class Replay:
    """Plays recorded actions [n]."""

    name = "replay"

    def __init__(self, actions: np.ndarray) -> None:
        self._actions = iter(actions.tolist())

    def act(self, state: np.ndarray, action_masks: np.ndarray) -> np.ndarray:
        return np.full(len(state), next(self._actions))


class Counter:
    """Holds, and counts the rows it decides on."""

    name = "counter"

    def __init__(self) -> None:
        self.rows: list[int] = []

    def act(self, state: np.ndarray, action_masks: np.ndarray) -> np.ndarray:
        self.rows.append(len(state))
        return np.zeros(len(state), np.int64)


def key_of(config: DetentConfig) -> dict[str, str]:
    return {task.label: task.key for task in suite_tasks(config)}


# --- markets -----------------------------------------------------------------------------------------------------


def test_seeds_never_coincide_at_any_allowed_number_of_runs():
    most = next(entry.le for entry in SuiteConfig.model_fields["num_seeds"].metadata if hasattr(entry, "le"))
    training = {1 + run for run in range(most)}
    tuning = {1 + TUNING_RUNS + run for run in range(most)}
    held_out = {VALIDATION_SEED, TEST_SEED, STRESS_SEED}
    assert len(training | tuning | held_out) == 2 * most + 3


def test_training_paths_have_seeds_of_their_own_and_no_row_in_common():
    lessons = [lesson_of(CONFIG, Cell("ridge", 300, run)) for run in (0, 1, TUNING_RUNS)]
    base = CONFIG.evaluation.suite.base_seed
    assert [one.config.seed for one in lessons] == [base + 1, base + 2, base + 1 + TUNING_RUNS]
    rows = [one.train.values for one in lessons]
    rows += [*lessons[0].validation.values, *judged_market(CONFIG).features.values]
    joined = np.concatenate(rows)[:, 0]
    assert len(np.unique(joined)) == len(joined) == 3 * 300 + 2 * BARS + PATHS * BARS


def test_markets_are_those_of_their_seeds():
    suite, market = CONFIG.evaluation.suite, CONFIG.evaluation.market
    expected = simulate_panel(market, paths=PATHS, bars=BARS, seed=suite.base_seed + 200_000)
    assert np.array_equal(judged_market(CONFIG).features.values, expected.features.values)
    expected = simulate_panel(market, paths=2, bars=BARS, seed=suite.base_seed + 100_000)
    assert np.array_equal(lesson_of(CONFIG, Cell("sac", 300)).validation.values, expected.features.values)


def test_a_longer_training_path_begins_with_rows_of_its_own_and_validation_stays():
    short, long = (lesson_of(CONFIG, Cell("ridge", bars)) for bars in (300, 400))
    assert (len(short.train), len(long.train)) == (300, 400)
    assert short.config == long.config
    assert np.array_equal(short.validation.values, long.validation.values)


# --- equal terms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.learner)
def test_what_a_policy_did_earns_the_same_on_the_market_everybody_walks(cell):
    """The recorded actions, replayed under the plain dynamics, give the recorded returns and masks: same bars, costs
    and rules, whatever else a policy was shown."""
    market = judged_market(CONFIG).features.first_paths(1)
    arrays = result(cell).arrays
    for name in result(cell).values["facts"]:
        again = walk_panel(dynamics(), market, Replay(arrays[f"{name}.actions"]))
        assert np.array_equal(arrays[f"{name}.returns"][0], np.expm1(again.log_returns[:, 0]).astype(np.float32))
        assert np.array_equal(arrays[f"{name}.position"], again.position[:, 0].astype(np.float32))
        assert np.array_equal(arrays[f"{name}.rule_states"], again.rule_states[:, 0])
        assert arrays[f"{name}.invalid_actions"].tolist() == [0]


@pytest.mark.parametrize("learner", ["references", "ridge", "sac", "masked_dqn", "mbpo"])
def test_a_cell_is_the_same_to_the_last_bit_whatever_was_computed_before(learner):
    cell = next(one for one in CELLS if one.learner == learner)
    first = result(cell).arrays
    compute(CONFIG, Cell("masked_dqn", 300, 1))
    benchmarks.suite._simulated.cache_clear()
    assert same(first, compute(CONFIG, cell).arrays)


def test_stored_cells_come_back_as_they_were_computed(tmp_path):
    tasks = [task for task in suite_tasks(CONFIG) if task.label in {"plain-ridge-300-0", "plain-references"}]
    stored = run_folds(tasks, work_on_cell, tmp_path, engine="serial")
    assert same(stored[0].arrays, result(Cell("ridge", 300)).arrays)
    assert same(stored[1].arrays, result(Cell("references")).arrays)
    assert all(one.resumed for one in run_folds(tasks, work_on_cell, tmp_path, engine="serial"))


# --- what a cell keeps -------------------------------------------------------------------------------------------


def test_judging_keeps_returns_metrics_and_the_first_market():
    cell = Cell("references")
    policy = benchmarks.suite.LEARNERS["references"](lesson_of(CONFIG, cell), lambda *_: None)["buy_and_hold"]
    panel = judged_market(CONFIG).features
    kept = judge(CONFIG, policy, dynamics(), panel, bars_per_year=YEAR)
    direct = walk_panel(dynamics(), panel, policy.policy)
    assert np.array_equal(kept["returns"], np.expm1(direct.log_returns).T.astype(np.float32))
    for name, values in metrics_by_path(direct, YEAR).items():
        assert np.array_equal(kept[name], values, equal_nan=True), name
        assert values.shape == (PATHS,)
    assert np.array_equal(kept["actions"], direct.actions[:, 0])
    shapes = {name: kept[name].shape for name in ("returns", "position", "actions", "rule_states", "decision_ms")}
    fields = len(dynamics().rule_set.fields)
    assert shapes == {
        "returns": (PATHS, BARS - 1),
        "position": (BARS,),
        "actions": (BARS - 1,),
        "rule_states": (BARS - 1, fields),
        "decision_ms": (20,),
    }


def test_a_slow_policy_walks_the_first_markets_only():
    panel = judged_market(CONFIG).features
    every = judge(CONFIG, Fitted(Counter(), "rule"), dynamics(), panel, bars_per_year=YEAR)
    slow = Counter()
    few = judge(CONFIG, Fitted(slow, "rule", max_paths=2), dynamics(), panel, bars_per_year=YEAR)
    assert few["returns"].shape == (2, BARS - 1)
    assert np.array_equal(few["returns"], every["returns"][:2])
    assert slow.rows == [2] * (BARS - 1) + [1] * 20


def test_decisions_are_timed_one_by_one_with_the_disagreement_a_policy_waits_for():
    asked: list[tuple[int, ...]] = []

    def disagreement(features: np.ndarray) -> np.ndarray:
        asked.append(features.shape)
        return np.zeros(features.shape[:-1])

    panel = judged_market(CONFIG).features
    policy = Counter()
    taken = time_decisions(dynamics(), panel, Fitted(policy, "rule", disagreement), 25)
    assert taken.shape == (25,)
    assert (taken >= 0.0).all()
    assert policy.rows == [1] * 25
    assert asked == [(1, 26, 10), *[(1, 10)] * 25]


def test_waiting_for_the_processor_is_no_part_of_a_decision(monkeypatch):
    clock = {"process_time": 0.0}

    class Busy(Counter):
        def act(self, state: np.ndarray, action_masks: np.ndarray) -> np.ndarray:
            clock["process_time"] += 0.003
            return super().act(state, action_masks)

    monkeypatch.setattr(benchmarks.suite.time, "process_time", lambda: clock["process_time"])
    taken = time_decisions(dynamics(), judged_market(CONFIG).features, Fitted(Busy(), "rule"), 25)
    assert taken.tolist() == pytest.approx([3.0] * 25)


def test_no_more_decisions_are_timed_than_there_are_bars():
    assert len(time_decisions(dynamics(), judged_market(CONFIG).features, Fitted(Counter(), "rule"), 500)) == BARS - 1


def test_evidence_stands_beside_what_was_measured_and_facts_name_the_cell():
    mbpo = result(Cell("mbpo", 300))
    assert "mbpo.pit" in mbpo.arrays
    assert "planner.pit" not in mbpo.arrays
    assert mbpo.arrays["planner.returns"].shape[0] == 2
    facts = mbpo.values["facts"]["planner"]
    assert {key: facts[key] for key in ("family", "learner", "train_bars", "run", "variant")} == {
        "family": "model_based",
        "learner": "mbpo",
        "train_bars": 300,
        "run": 0,
        "variant": "plain",
    }


def test_policies_of_the_longest_length_walk_the_garch_markets_too():
    stressed = {name for cell in CELLS for name in result(cell).arrays if "stress_sharpe" in name}
    families = {name: facts for cell in CELLS for name, facts in result(cell).values["facts"].items()}
    assert stressed == {f"{name}.stress_sharpe" for name in families} - {
        f"{name}.stress_sharpe" for name in ("oracle", "belief_filter", "planner", "mbpo_planner")
    }
    shorter = compute(small("evaluation.suite.train_bars=[300, 400]"), Cell("ridge", 300))
    assert "ridge.stress_sharpe" not in shorter.arrays
    assert "ridge.stress_sharpe" not in compute(small("evaluation.suite.stress_paths=0"), Cell("ridge", 300)).arrays


def test_the_oracle_is_told_more_and_pays_the_same():
    facts = result(Cell("truth")).values["facts"]
    assert {name: one["family"] for name, one in facts.items()} == {"oracle": "reference", "belief_filter": "reference"}


# --- the plan ----------------------------------------------------------------------------------------------------


def test_the_plan_has_every_learner_length_and_run_once_slow_ones_first():
    config = load_config("suite-smoke")
    plan = plan_suite(config)
    suite = config.evaluation.suite
    assert len(plan) == len(set(plan)) == len(suite.learners) * 2 * 2 + 3 + 2
    assert plan[0] == Cell("mbpo", 400, 0)
    assert [cell for cell in plan if cell.variant != "plain"] == [
        Cell("ridge", 400, 0, "leak"),
        Cell("ridge", 400, 0, "shuffled"),
        Cell("ridge", 400, 0, "no_signal"),
    ]
    assert plan[-2:] == [Cell("truth"), Cell("references")]
    tasks = suite_tasks(config)
    assert len({task.key for task in tasks}) == len({task.label for task in tasks}) == len(plan)


def test_a_plan_that_cannot_end_in_a_verdict_is_refused_before_anything_is_computed():
    with pytest.raises(ConfigError, match=r"evaluation\.suite\.learners: expected names of"):
        plan_suite(small("evaluation.suite.learners=[mbpo, ppo]"))
    with pytest.raises(ConfigError, match=r"evaluation\.suite\.check_learners: expected names of .*'references'"):
        plan_suite(small("evaluation.suite.check_learners=[references]"))
    with pytest.raises(ConfigError, match="to compare with"):
        plan_suite(small("evaluation.suite.learners=[ridge, mbpo]"))
    with pytest.raises(ConfigError, match=r"evaluation\.verdict\.challenger"):
        plan_suite(small("evaluation.verdict.challenger=ridge"))


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("model_free.gamma=0.5", {"plain-model_free-300-0"}),
        ("evaluation.sac.gamma=0.5", {"plain-sac-300-0"}),
        ("evaluation.dqn.gamma=0.5", {"plain-masked_dqn-300-0"}),
        ("planner.scenarios=3", {"plain-mbpo-300-0"}),
        ("mbpo.ppo.gamma=0.5", {"plain-mbpo-300-0"}),
        ("world_model.batch_size=64", {"plain-mbpo-300-0"}),
        (
            "evaluation.ridge.horizons=[3]",
            {"plain-ridge-300-0", *(f"{one}-ridge-300-0" for one in ("leak", "shuffled", "no_signal"))},
        ),
        ("seed=5", set()),
        ("evaluation.verdict.confidence=0.9", set()),
        ("evaluation.suite.num_seeds=2", set()),
        ("evaluation.suite.trials={mbpo: 12}", set()),
        ("evaluation.suite.check_learners=[]", set()),
        ("evaluation.suite.learners=[mbpo, sac]", set()),
        ("tracking.experiment=other", set()),
    ],
)
def test_a_setting_computes_anew_only_the_cells_that_read_it(override, changed):
    before, after = (
        key_of(small("evaluation.suite.num_seeds=1")),
        key_of(small("evaluation.suite.num_seeds=1", override)),
    )
    assert {label for label in before.keys() & after.keys() if before[label] != after[label]} == changed


@pytest.mark.parametrize(
    "override",
    [
        "account.commission_bps=2",
        "limits.max_exposure=1",
        "reward.profit_weight=2",
        "env.episode_bars=100",
        "evaluation.market.signal_noise=1",
        "evaluation.garch.alpha=0.05",
        "evaluation.verdict.min_exposure=0.1",
        "evaluation.suite.base_seed=1",
        "evaluation.suite.test_paths=2",
        "evaluation.suite.test_bars=90",
        "evaluation.suite.validation_paths=1",
        "evaluation.suite.validation_bars=90",
        "evaluation.suite.stress_paths=1",
        "evaluation.suite.timed_decisions=21",
    ],
)
def test_what_everybody_shares_computes_every_cell_anew(override):
    before, after = key_of(CONFIG), key_of(small(override))
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())


def test_a_cell_that_becomes_the_longest_is_computed_anew_since_it_now_walks_the_garch_markets():
    both = key_of(small("evaluation.suite.train_bars=[300, 400]", "evaluation.suite.primary_train_bars=300"))
    alone = key_of(CONFIG)
    assert both["plain-ridge-300-0"] != alone["plain-ridge-300-0"]
    assert both["plain-references"] == alone["plain-references"]


def test_every_setting_of_the_suite_is_either_part_of_a_cell_or_said_not_to_be():
    assert set(NOT_IN_CELLS) < set(SuiteConfig.model_fields)
    in_cells = suite_tasks(CONFIG)[0].identity["settings"]["suite"]
    assert set(in_cells) == set(SuiteConfig.model_fields) - set(NOT_IN_CELLS)


def test_the_code_hash_covers_what_the_suite_imports():
    """Every module of ours that `contenders` and `suite` import, and those that they import in `evaluation`."""
    root = Path(benchmarks.suite.__file__).parent.parent
    covered = {path for pattern in SOURCES for path in root.glob(pattern)}
    assert all(list(root.glob(pattern)) for pattern in SOURCES)
    free = {"configs", "benchmarks.folds", "evaluation"}  # settings are in the identity; runner; a list of names
    missing = set()
    for path in [one for one in covered if one.parent.name in {"benchmarks", "evaluation"}]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in {
                "benchmarks",
                "evaluation",
                "configs",
            }:
                file = root / f"{node.module.replace('.', '/')}.py"
                if file not in covered and node.module not in free and not node.module.startswith("configs."):
                    missing.add(node.module)
    assert missing == set()
    assert source_hash() == source_hash()
    assert source_hash("benchmarks/tuning.py") != source_hash()
    assert source_hash("benchmarks/suite.py") == source_hash()


def test_a_cell_of_other_library_versions_is_another_one(monkeypatch):
    here = source_hash()
    monkeypatch.setattr(benchmarks.suite, "library_versions", lambda names: {**library_versions(names), "torch": "0"})
    assert source_hash() != here


# --- the instrument ----------------------------------------------------------------------------------------------

TRUE = small(
    "evaluation.suite.train_bars=[1500]",
    "evaluation.suite.primary_train_bars=1500",
    "evaluation.suite.test_paths=10",
    "evaluation.suite.test_bars=1000",
    "evaluation.suite.validation_bars=500",
    "evaluation.suite.stress_paths=0",
    "evaluation.ridge.horizons=[1, 5]",
)


def sharpe_of(variant: str) -> np.ndarray:
    return compute(TRUE, Cell("ridge", 1500, 0, variant)).arrays["ridge.sharpe"]


def test_with_tomorrow_among_its_features_a_learner_beats_itself_on_every_market_and_by_far():
    leaked, plain = sharpe_of("leak"), sharpe_of("plain")
    assert (leaked > plain).all()
    assert leaked.mean() > 2.0 * plain.mean()


def test_signals_of_another_time_are_worth_no_more_than_none():
    shuffled, none, plain = sharpe_of("shuffled"), sharpe_of("no_signal"), sharpe_of("plain")
    assert abs(shuffled.mean() - none.mean()) < 0.3
    assert plain.mean() > max(shuffled.mean(), none.mean()) + 0.3


def test_altered_markets_differ_in_training_validation_and_test_alike():
    for variant, width in (("leak", 11), ("shuffled", 10), ("no_signal", 10)):
        plain, altered = lesson_of(CONFIG, Cell("ridge", 300)), lesson_of(CONFIG, Cell("ridge", 300, 0, variant))
        assert altered.train.values.shape == (300, width)
        assert altered.validation.values.shape == (2, BARS, width)
        for before, after in ((plain.train, altered.train), (plain.validation, altered.validation)):
            assert np.array_equal(before.values[..., :5], after.values[..., :5])
            assert not np.array_equal(before.values, after.values)
