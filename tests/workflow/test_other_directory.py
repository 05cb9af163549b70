"""A study may lie in another folder than the workflow: `snakemake -s CHECKOUT/Snakefile --directory STUDY`."""

import pytest

from tests.study.checkout import planned_jobs

OVERLAY = "only: {models: [Llama], configs: [best_acc]}\n"


@pytest.fixture(scope="module")
def checkout(new_checkout):
    return new_checkout("workflow")


@pytest.fixture
def planned(checkout, tmp_path):
    (tmp_path / "study.yaml").write_text(OVERLAY)

    def run(*arguments):
        return checkout.run(
            "-n", "-s", f"{checkout.folder}/Snakefile", "--configfile", "study.yaml", *arguments, cwd=tmp_path
        )

    return run


def test_the_configuration_of_the_checkout_is_read_first_in_a_folder_without_one(checkout, planned, tmp_path):
    done = planned("--directory", str(tmp_path))
    (checkout.folder / "study.yaml").write_text(OVERLAY)
    here = checkout.run("-n", "--configfile", "study.yaml")
    assert planned_jobs(done) == planned_jobs(here) != {}
    said = next(line for line in done.stdout.splitlines() if line.startswith("Config file "))
    assert f"{checkout.folder}/config/config.yaml is extended" in said


def test_the_first_line_names_the_configuration_of_the_folder_itself(checkout, planned, tmp_path):
    (tmp_path / "config").mkdir()
    own = (checkout.folder / "config/config.yaml").read_text()
    (tmp_path / "config/config.yaml").write_text(own)
    assert "Config file config/config.yaml is extended" in planned().stdout
