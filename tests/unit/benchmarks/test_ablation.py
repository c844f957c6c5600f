from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from suite_worlds import small

from benchmarks.ablation import ABLATION_RUNS, IN_FORCE, VARIANTS, Variant, measure_ablation
from benchmarks.contenders import Fitted, Lesson
from benchmarks.suite import Cell, judged_market, lesson_of
from benchmarks.tuning import TUNING_RUNS, with_settings
from configs import load_config
from evaluation import BuyAndHold, Flat

CONFIG = small()


def flat(lesson: Lesson) -> Fitted:
    return Fitted(Flat(lesson.dynamics), "reference")


def held(lesson: Lesson) -> Fitted:
    return Fitted(BuyAndHold(lesson.dynamics), "reference")


def test_only_imagination_without_masks_takes_forbidden_actions(tmp_path: Path) -> None:
    names = (IN_FORCE, "real ratio 1", "no mask in imagination", "no structure")
    report = measure_ablation(CONFIG, tmp_path, runs=1, variants={name: VARIANTS[name] for name in names}, paths=2)
    assert [row.variant for row in report.rows] == list(names)
    assert all(np.isfinite(row.mean) for row in report.rows)
    shares = [row.forbidden_share for row in report.rows]
    assert shares[2] is not None
    assert 0.0 < shares[2] < 1.0
    assert shares[0] is shares[1] is shares[3] is None
    json.dumps(report.to_dict())


def test_variants_change_what_they_name_and_are_allowed() -> None:
    frozen = load_config("suite")
    for name, variant in VARIANTS.items():
        changed = with_settings(frozen, variant.settings)
        assert (changed == frozen) == (name in (IN_FORCE, "no mask in imagination", "no structure")), name
    for bars in (1, 5, 10):
        mbpo = with_settings(frozen, VARIANTS[f"H = {bars}"].settings).mbpo
        assert mbpo.rollout_length * mbpo.ppo.num_envs == pytest.approx(
            frozen.mbpo.rollout_length * frozen.mbpo.ppo.num_envs, rel=0.01
        )


def test_differences_are_paired_by_run_and_finished_fits_are_kept(tmp_path: Path) -> None:
    variants = {IN_FORCE: Variant(fit=flat), "held": Variant(fit=held)}
    report = measure_ablation(CONFIG, tmp_path, runs=2, variants=variants, paths=3)
    force, other = report.rows
    assert force.sharpe == (0.0, 0.0)
    assert force.difference is None
    assert other.difference is not None
    assert other.difference.estimate == pytest.approx(np.mean(other.sharpe))
    told: list[int] = []
    again = measure_ablation(
        CONFIG, tmp_path, runs=2, variants=variants, paths=3, progress=lambda done, *_: told.append(done)
    )
    assert again.rows == report.rows
    assert told == [1, 2, 3, 4]


def test_ablation_learns_on_paths_of_its_own() -> None:
    paths = [lesson_of(CONFIG, Cell("mbpo", 300, run)).train.values for run in (0, TUNING_RUNS, ABLATION_RUNS)]
    assert not any(np.array_equal(paths[2], other) for other in paths[:2])
    assert judged_market(CONFIG).features.values.shape[0] >= 2


@pytest.mark.parametrize(("change", "message"), [({"runs": 0}, "at least 1"), ({"variants": {}}, "'in force'")])
def test_impossible_ablations_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_ablation(CONFIG, tmp_path, **change)  # type: ignore[arg-type]
