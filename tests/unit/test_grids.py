"""The check of a grid to which each of its points belongs."""

import pytest

from coppice.core import records
from coppice.planning.grid_checks import Checks

GRID = {"depth-0.25": {"method": "depth", "ratio": 0.25}, "mine": {"method": "width", "ratio": 0.5}}
MORE = {"depth-0.1": {"method": "depth", "ratio": 0.1}}


@pytest.fixture
def plan_grid(tmp_path):
    """Return a function that plans the last of the given grids and returns {point: path of its check's record}."""

    def plan(*grids, keep=True):
        checks = Checks(tmp_path / "checks.json", grids)
        if keep:
            checks.keep()
        return {name: checks.record(f"{tmp_path}/{{check}}.json", name, point) for name, point in grids[-1].items()}

    return plan


def write_checks(found, *names):
    """Write the records of a plan's checks, as the checks would, with the candidates `names`."""
    for path in set(found.values()):
        records.write(path, {"plans": {name: {} for name in names}})


def test_points_added_together_share_a_check_and_later_ones_get_another(plan_grid):
    first = plan_grid(GRID)
    write_checks(first, *GRID)
    grown = plan_grid(MORE | GRID)
    assert len(set(first.values())) == 1 and len(set(grown.values())) == 2
    assert first.items() <= grown.items() and plan_grid(GRID) == first


def test_models_with_the_same_grid_share_its_checks_and_one_more_point_gets_its_own(plan_grid):
    assert len(set(plan_grid(GRID, GRID | MORE).values())) == 2


def test_a_point_with_an_old_name_and_new_settings_gets_a_new_check(plan_grid):
    first = plan_grid(GRID)
    write_checks(first, *GRID)
    now = plan_grid(GRID | {"mine": {"method": "width", "ratio": 0.4}})
    assert now["depth-0.25"] == first["depth-0.25"] and now["mine"] != first["mine"]


def test_a_rejected_point_that_returns_gets_its_own_check(plan_grid):
    """It was in no grid when the check of the other points was made."""
    whole = plan_grid(GRID | MORE)
    assert len(set(whole.values())) == 1
    rest = plan_grid(GRID)
    write_checks(rest, *GRID)
    back = plan_grid(GRID | MORE)
    assert rest.items() <= back.items() and back["depth-0.1"] != whole["depth-0.1"]
    write_checks({"depth-0.1": back["depth-0.1"]}, *GRID, *MORE)
    write_checks(rest, *GRID, *MORE)  # for another configuration of the model
    assert plan_grid(GRID | MORE) == back


def test_planning_without_saving_gives_the_same_checks(plan_grid, tmp_path):
    unsaved = plan_grid(GRID, keep=False)
    assert not list(tmp_path.iterdir())
    assert plan_grid(GRID) == unsaved and plan_grid(GRID | MORE, keep=False) == plan_grid(GRID | MORE)


def test_rejects_a_damaged_file_of_checks(plan_grid, tmp_path):
    """Without this file, the whole grid would be pruned again after a point was added."""
    plan_grid(GRID)
    grown = plan_grid(GRID | MORE)
    checks_file = tmp_path / "checks.json"
    kept = checks_file.read_text()
    checks_file.write_text("{")
    with pytest.raises(records.RecordError, match=r"checks\.json.*restore a copy"):
        plan_grid(GRID | MORE)
    checks_file.write_text(kept)
    assert plan_grid(GRID | MORE) == grown
