"""The same configuration, seed and machine give the same records, in whatever order and how many at a time jobs run."""

import shutil

import pytest

from tests.study.checkout import STUDY
from tests.study.outcome import differences, numbers


# In the bounded form test_kills compares one job at a time with two.
@pytest.mark.slow
def test_one_job_at_a_time_in_another_order_finds_what_two_at_a_time_do(finished, new_checkout):
    checkout = new_checkout("in order")
    shutil.copytree(finished.folder / "resources", checkout.folder / "resources", symlinks=True)
    checkout.run("--cores", "1", "results/ablation/arms/ablation_report.html", config=STUDY)
    checkout.run("--cores", "1", "all", "ablation", config=STUDY)
    assert differences(finished.numbers, numbers(checkout.folder)) == []
