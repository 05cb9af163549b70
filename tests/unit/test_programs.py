"""Programs that a model wrote: the sandbox, how an answer becomes a program, pass@k, and evaluations of such rows."""

import itertools
import os
import textwrap

import numpy
import pandas
import pytest

from coppice import data, models
from coppice.core import records
from coppice.core.errors import SettingsError
from coppice.models.causal_lm import KIND
from coppice.stages import evaluate
from coppice.stages.evaluate import programs, sandbox
from coppice.stats import metrics
from coppice.study.settings import evaluation_checks
from coppice.study.settings.sections.evaluate import Evaluate, Programs

LIMITS = sandbox.Limits(seconds=5, memory=512)
PROMPT = 'import math\n\n\ndef double(x):\n    """Return twice x."""\n'
ROW = {"prompt": PROMPT, "entry_point": "double", "canonical_solution": "    return 2 * x\n"}
ROW |= {"test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0) == 0\n"}


# The sandbox


@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        ("import json, math, re, typing, collections\nassert math.pi > 3", "passed"),
        ("raise ValueError('no')", "failed: ValueError: no"),
        ("1 +", "failed: SyntaxError"),
        ("import sys; sys.exit(0)", "failed: SystemExit"),
        ("import os; os._exit(0)", sandbox.ENDED),
        ("x = [0] * 10 ** 9", "failed: MemoryError"),
        ("open('big', 'wb').write(b'x' * 2 ** 25)", "failed: OSError"),
        ("print('x' * 10 ** 7); import sys; sys.stderr.write('y' * 10 ** 7); assert sys.stdin.read() == ''", "passed"),
        ("def f(): f()\nf()", "failed: RecursionError"),
        ("import numpy", "failed: ModuleNotFoundError"),
        ("s = '\\ud800'; raise ValueError(s)", "failed: ValueError"),
    ],
)
def test_says_how_a_program_ends(program, verdict):
    assert sandbox.run(program, LIMITS).startswith(verdict)


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_stops_a_program_that_takes_too_long(program):
    assert sandbox.run(program, sandbox.Limits(seconds=0.5)) == sandbox.TIMED_OUT


def test_a_program_gets_an_empty_folder_and_no_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    program = """
        import os
        assert "HF_TOKEN" not in os.environ and os.listdir(".") == []
        open("file", "w").write("x")
        assert os.path.realpath(os.environ["HOME"]) == os.getcwd()
        raise ValueError(os.getcwd())
    """
    said = sandbox.run(textwrap.dedent(program), LIMITS)
    folder = said.removeprefix("failed: ValueError: ")
    assert folder != said and not os.path.exists(folder)


def test_a_program_reads_and_writes_no_file_of_the_user(tmp_path):
    if not sandbox.has_landlock():
        pytest.skip("the kernel has no Landlock")
    (tmp_path / "secret").write_text("x")
    tries = [f"open({str(tmp_path / 'secret')!r}).read()", f"open({str(tmp_path / 'new')!r}, 'w')"]
    tries += [f"import os; os.unlink({str(tmp_path / 'secret')!r})", f"import os; os.listdir({str(tmp_path)!r})"]
    assert [sandbox.run(one, LIMITS).partition(" [")[0] for one in tries] == ["failed: PermissionError:"] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_a_program_has_no_network_and_sees_no_other_process():
    if not sandbox.has_namespaces():
        pytest.skip("unprivileged namespaces are not allowed")
    send = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))"
    assert sandbox.run(send, LIMITS).startswith("failed: OSError")
    assert sandbox.run(f"import os; os.kill({os.getpid()}, 0)", LIMITS).startswith("failed: ProcessLookupError")


def test_says_what_the_machine_cannot_keep_a_program_from(monkeypatch):
    monkeypatch.setattr(sandbox, "has_landlock", lambda: False)
    monkeypatch.setattr(sandbox, "has_namespaces", lambda: False)
    files, network = sandbox.unprotected()
    assert "files" in files and "network" in network
    assert sandbox.run("x = 1", LIMITS) == sandbox.PASSED


# Programs and pass@k


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("    return x + x\n", "passed"),
        ("    return x + 1\n", "failed: AssertionError"),
        ("def double(x):\n    return math.floor(2 * x)\n", "passed"),
        ("Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\nIt doubles x.", "passed"),
        ("```\n    return 2 * x\n```", "passed"),
        ("    import sys\n    sys.exit(0)\n", "failed: SystemExit"),
        ("", "failed: "),
    ],
)
def test_an_answer_continues_the_prompt_or_defines_the_function_itself(answer, verdict):
    assert sandbox.run(programs.program(ROW, answer), LIMITS).startswith(verdict)


def test_tests_without_an_entry_point_are_assertions():
    row = {"prompt": "def double(x):\n", "test": "assert double(1) == 2"}
    assert sandbox.run(programs.program(row, "    return 2 * x"), LIMITS) == "passed"
    assert sandbox.run(programs.program(row, "    return x"), LIMITS).startswith("failed: AssertionError")


@pytest.mark.parametrize(("total", "correct"), [(1, 0), (1, 1), (5, 0), (5, 2), (5, 5), (20, 3)])
def test_pass_at_k_is_the_estimator_of_the_paper_and_the_mean_over_all_choices(total, correct):
    for k in {1, (total + 1) // 2, total}:
        # as Chen et al. 2021 print it
        product = numpy.prod(1.0 - k / numpy.arange(total - correct + 1, total + 1))
        expected = 1.0 if total - correct < k else 1.0 - product
        assert programs.pass_at(k, total, correct) == pytest.approx(expected, abs=1e-12)
        if total <= 5:
            right = [place < correct for place in range(total)]
            chosen = [any(choice) for choice in itertools.combinations(right, k)]
            assert programs.pass_at(k, total, correct) == pytest.approx(sum(chosen) / len(chosen), abs=1e-12)


# The evaluation


RIGHT, WRONG = "    return 2 * x", "    return x"


def evaluated(folder, tmp_path, **settings):
    """Return (record, samples) of an evaluation of a model on two rows."""
    rows = [ROW | {"prompt": PROMPT.replace("double", f"double{n}"), "entry_point": f"double{n}"} for n in range(2)]
    data.write("code", {"report": rows}, tmp_path / "code")
    datasets = {"code": str(tmp_path / "code/dataset.json")}
    answers = {"datasets": ["code"], "new_tokens": 8, "metrics": ["edit_similarity"]} | settings
    how = {"answers": answers, "perplexity": {"datasets": []}, "zero_shot": {"tasks": []}}
    how |= {"generation": {"prompts": []}, "cost": {"enabled": False}}
    request = evaluate.EvaluationRequest(
        {"model": "M", "config": None, "stage": "dense"},
        models.Source(str(folder)),
        Evaluate.model_validate(how),
        datasets,
        tmp_path / "out",
        seed=3,
        prompt="none",
    )
    evaluate.evaluate(request)
    record = records.read(tmp_path / "out/evaluation_results.json")
    return record, pandas.read_parquet(tmp_path / "out/samples/code.parquet")


def test_programs_are_run_only_if_that_is_asked_for(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "run", lambda *_: pytest.fail("a program ran"))
    record, samples = evaluated(tiny_checkpoint(), tmp_path)
    assert "pass_at_1" not in record and "pass_at_1" not in samples.columns
    assert 0 <= record["edit_similarity"]["code"]["value"] <= 1


def test_the_record_has_pass_at_k_and_the_samples_a_verdict_for_each_program(tiny_checkpoint, tmp_path, monkeypatch):
    asked = []

    def answers(self, model, reader, rows, decoding):
        asked.append((len(rows), decoding.strip, decoding.sample))
        return [RIGHT, WRONG, WRONG, RIGHT, RIGHT, RIGHT]

    monkeypatch.setattr(type(KIND), "answers", answers)
    settings = {"sample": True, "programs": {"run": True, "samples": 3, "k": [1, 2], "timeout": 20}}
    record, samples = evaluated(tiny_checkpoint(), tmp_path, **settings)
    assert asked == [(6, False, True)]
    found = record["pass_at_1"]["code"]
    assert found["value"] == pytest.approx((1 / 3 + 1) / 2) and found["n"] == 2 and found["samples"] == 3
    assert found["pass_at"] == {"1": pytest.approx(2 / 3), "2": pytest.approx((2 / 3 + 1) / 2)}
    assert list(samples["pass_at_1"]) == [pytest.approx(1 / 3), 1]
    assert [list(row) for row in samples["verdicts"]][1] == ["passed"] * 3
    assert samples["verdicts"][0][1].startswith("failed: AssertionError")
    monkeypatch.setattr(sandbox, "run", lambda *_: pytest.fail("a program ran again"))
    again, _ = evaluated(tiny_checkpoint(), tmp_path, **settings)
    assert again["pass_at_1"] == record["pass_at_1"]


def test_limits_under_which_no_program_runs_are_an_error_and_no_score(monkeypatch):
    monkeypatch.setattr(sandbox, "GUARD", sandbox.GUARD.with_name("nowhere.py"))
    with pytest.raises(SettingsError, match="an empty program does not pass on this machine"):
        programs.run([{"answers": [RIGHT]}], [ROW], Programs())


@pytest.mark.parametrize("run", [True, False])
def test_a_criterion_may_choose_by_pass_at_1_if_programs_run(run):
    answers = {"datasets": ["code"], "metrics": ["exact_match"], "programs": {"run": run}}
    keys = [metric.key for metric in metrics.asked_in(Evaluate.model_validate({"answers": answers}))]
    assert ("pass_at_1.code" in keys) == run and "exact_match.code" in keys


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"programs": {"samples": 5}}, "samples: found 5, which needs answers.sample: true"),
        ({"programs": {"k": [1, 10]}}, "pass@10 needs at least 10 samples"),
    ],
)
def test_rejects_pass_at_k_without_enough_different_programs(answers, message):
    section = Evaluate.model_validate({"answers": answers})
    with pytest.raises(SettingsError, match=f"evaluate.answers.programs.*{message}"):
        evaluation_checks.checked(section, "evaluate", ".", [])
