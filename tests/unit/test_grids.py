"""Which check of a grid its points are in."""

import pytest

from coppice.core import records
from coppice.planning.grid_checks import Checks

GRID = {"depth-0.25": {"method": "depth", "ratio": 0.25}, "mine": {"method": "width", "ratio": 0.5}}
MORE = {"depth-0.1": {"method": "depth", "ratio": 0.1}}


@pytest.fixture
def planned(tmp_path):
    """A function that plans a grid, the last of those given, and returns the record of the check of each point."""

    def plan(*grids, keep=True):
        checks = Checks(tmp_path / "checks.json", grids)
        if keep:
            checks.keep()
        return {name: checks.record(f"{tmp_path}/{{check}}.json", name, point) for name, point in grids[-1].items()}

    return plan


def made(found, *names):
    """The records of a plan as the checks would leave them, of the candidates `names`."""
    for path in set(found.values()):
        records.write(path, {"plans": {name: {} for name in names}})


def test_points_that_are_new_together_share_a_check_and_later_ones_have_another(planned):
    first = planned(GRID)
    made(first, *GRID)
    grown = planned(MORE | GRID)
    assert len(set(first.values())) == 1 and len(set(grown.values())) == 2
    assert first.items() <= grown.items() and planned(GRID) == first


def test_models_with_one_grid_share_its_checks_and_a_point_more_has_its_own(planned):
    assert len(set(planned(GRID, GRID | MORE).values())) == 2


def test_a_point_of_the_same_name_that_says_another_thing_is_new(planned):
    first = planned(GRID)
    made(first, *GRID)
    now = planned(GRID | {"mine": {"method": "width", "ratio": 0.4}})
    assert now["depth-0.25"] == first["depth-0.25"] and now["mine"] != first["mine"]


def test_a_point_that_was_refused_and_is_back_is_checked_then(planned):
    """It was in no grid when the others' check was made."""
    whole = planned(GRID | MORE)
    assert len(set(whole.values())) == 1
    rest = planned(GRID)
    made(rest, *GRID)
    back = planned(GRID | MORE)
    assert rest.items() <= back.items() and back["depth-0.1"] != whole["depth-0.1"]
    made({"depth-0.1": back["depth-0.1"]}, *GRID, *MORE)
    made(rest, *GRID, *MORE)  # of another configuration of the model
    assert planned(GRID | MORE) == back


def test_what_is_not_noted_comes_out_the_same_by_itself(planned, tmp_path):
    unnoted = planned(GRID, keep=False)
    assert not list(tmp_path.iterdir())
    assert planned(GRID) == unnoted and planned(GRID | MORE, keep=False) == planned(GRID | MORE)


def test_a_damaged_note_is_told_since_without_it_a_grown_grid_would_be_pruned_anew(planned, tmp_path):
    planned(GRID)
    grown = planned(GRID | MORE)
    note = tmp_path / "checks.json"
    kept = note.read_text()
    note.write_text("{")
    with pytest.raises(records.RecordError, match=r"checks\.json.*restore a copy"):
        planned(GRID | MORE)
    note.write_text(kept)
    assert planned(GRID | MORE) == grown
