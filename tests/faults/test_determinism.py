"""The same configuration, seed and machine give the same records, in any order of jobs and any number at a time."""

import shutil

import pytest

from tests.study.checkout import STUDY
from tests.study.outcome import differences, numbers


# test_kills, which is not marked slow, also compares one job at a time with two.
@pytest.mark.slow
def test_results_do_not_depend_on_the_order_and_number_of_jobs(finished, new_checkout):
    checkout = new_checkout("in order")
    shutil.copytree(finished.folder / "resources", checkout.folder / "resources", symlinks=True)
    checkout.run("--cores", "1", "results/ablation/arms/ablation_report.html", config=STUDY)
    checkout.run("--cores", "1", "all", "ablation", config=STUDY)
    assert differences(finished.numbers, numbers(checkout.folder)) == []
