"""A bundle that was altered does not validate, however well the forger has covered it up."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import harness.cli  # noqa: F401 - it adds the commands
from bridge.cli import app
from harness.errors import EvidenceError
from harness.qualify.audit import audit
from harness.qualify.bundle import sums, texts
from harness.qualify.verdict import report_of
from harness.report.evidence import to_json

Data = dict[str, Any]
pytestmark = pytest.mark.ranks


def load(bundle: Path, name: str) -> Any:  # noqa: ANN401 - JSON
    """A file of a bundle."""
    return json.loads((bundle / name).read_text("utf-8"))


def sum_up(bundle: Path) -> None:
    """Write the sums anew, as a forger does."""
    (bundle / "SHA256SUMS").write_text(sums(bundle), "utf-8")


def forge(bundle: Path, data: Data, matrix: Data | None = None) -> None:
    """Write everything anew that follows from changed evidence, and the sums."""
    matrix = load(bundle, "faults.json") if matrix is None else matrix
    for name, text in texts(data, load(bundle, "twin.json"), matrix).items():
        (bundle / name).write_text(text, "utf-8")
    sum_up(bundle)


def case(data: Data, check: str, model: str = "odd-twin") -> Data:
    """The first case of a check."""
    found: Data = next(
        one for one in data["cases"] if (one["check"], one["model"]) == (check, model)
    )
    return found


def test_the_bundle_validates_and_says_that_it_is_not_whole(finished: Path) -> None:
    """Nothing is wrong with it; its verdict is no pass, since faults were left out."""
    found = audit(finished)
    assert found.problems == ()
    assert (found.verdict, found.exit_code, found.other_code) == ("incomplete", 3, None)
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "evidence.json", "junit.xml", "report.md", "report.html", "faults.json", "config.json",
        "twin.json", "card.yaml", "SHA256SUMS",
    }  # fmt: skip


def test_every_case_of_model_and_twin_passed(finished: Path) -> None:
    """What the command was to run is there, and nothing else."""
    data = load(finished, "evidence.json")
    assert {one["status"] for one in data["cases"]} == {"passed"}
    checks = {model: {one["check"] for one in data["cases"] if one["model"] == model}
              for model in ("odd", "odd-twin")}  # fmt: skip
    assert checks["odd"] == {"config", "logits", "blocks"}
    assert checks["odd-twin"] == {
        "config", "round_trip", "placement", "resharding", "rope", "logits", "blocks",
        "gradients", "generation",
    }  # fmt: skip
    assert data["qualification"]["faults"]["killed"] == data["qualification"]["faults"]["tried"]
    assert data["qualification"]["faults"]["tried"] >= 2


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:  # noqa: ANN401 - JSON
    """Where each value of a document is; of a list, of its first two entries."""
    if isinstance(value, dict):
        return [leaf for key, one in value.items() for leaf in leaves(one, (*path, key))]
    if isinstance(value, list) and value:
        return [leaf for key, one in enumerate(value[:2]) for leaf in leaves(one, (*path, key))]
    return [path]


def other(value: Any) -> Any:  # noqa: ANN401 - JSON
    """A value of the same kind that is another."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return f"{value}x"
        case None:
            return "x"
        case _:
            return [*value, "x"] if isinstance(value, list) else {**value, "x": "x"}


def put(document: Any, path: tuple[Any, ...]) -> None:  # noqa: ANN401 - JSON
    """Change the value at a place."""
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = other(document[path[-1]])


# By their sums alone: one value of each field, of every file. The sums are looked at first, so a
# test of each would be one test many times; what follows without them is worth its own.
@pytest.mark.parametrize("name", ["evidence.json", "faults.json", "config.json", "twin.json"])
def test_any_altered_value_is_noticed(bundle: Path, name: str) -> None:
    """Each field of each document in turn, the file put back afterwards."""
    whole = (bundle / name).read_bytes()
    from harness.qualify.audit import _sum_problems

    places = leaves(json.loads(whole))
    assert len(places) > 15
    for path in places:
        document = json.loads(whole)
        put(document, path)
        (bundle / name).write_text(json.dumps(document), "utf-8")
        assert list(_sum_problems(bundle)) == [f"{name}: not the file that was summed up"], path
    (bundle / name).write_bytes(whole)
    assert not list(_sum_problems(bundle))


@pytest.mark.parametrize(
    "name", ["junit.xml", "report.md", "report.html", "card.yaml", "faults.json", "twin.json"]
)
def test_a_file_that_does_not_follow_from_the_evidence_is_noticed(bundle: Path, name: str) -> None:
    """Though its sum was written anew."""
    text = (bundle / name).read_text("utf-8")
    (bundle / name).write_text(text.replace("odd", "0dd", 1), "utf-8")
    if name in ("faults.json", "twin.json"):
        (bundle / name).write_text(text.rstrip("\n") + " \n", "utf-8")
    sum_up(bundle)
    assert any(one.startswith(f"{name}: not what the evidence") for one in audit(bundle).problems)


@pytest.mark.parametrize("kind", ["missing", "added", "no sum", "twice", "odd"])
def test_a_file_more_or_less_is_noticed(bundle: Path, kind: str) -> None:
    """The sums are of all files and of no other."""
    if kind == "missing":
        (bundle / "report.md").unlink()
        assert "report.md: missing" in audit(bundle).problems
    elif kind == "added":
        (bundle / "ranks").mkdir(exist_ok=True)
        (bundle / "ranks" / "more.log").write_text("x")
        assert "ranks/more.log: not among the sums" in audit(bundle).problems
    elif kind == "twice":
        text = (bundle / "SHA256SUMS").read_text()
        (bundle / "SHA256SUMS").write_text(text + text.splitlines(keepends=True)[0])
        assert "SHA256SUMS: card.yaml is summed up twice" in audit(bundle).problems
    elif kind == "odd":
        (bundle / "report.md").rename(bundle.parent / "report.md")
        (bundle / "report.md").symlink_to(bundle.parent / "report.md")
        os.mkfifo(bundle / "pipe")
        (bundle / "empty").mkdir()
        sum_up(bundle)
        assert sorted(audit(bundle).problems) == [
            "empty: an empty directory, which no sum is of",
            "pipe: no plain file",
            "report.md: a link, and no file of a bundle",
        ]
    else:
        with (bundle / "SHA256SUMS").open("a") as file:
            file.write("words\n")
        assert "SHA256SUMS: 'words' is no sum" in audit(bundle).problems


def _flip(data: Data) -> None:
    case(data, "logits")["status"] = "failed"


def _beyond(data: Data) -> None:
    case(data, "logits")["value"] = 3.0


def _not_a_number(data: Data) -> None:
    case(data, "gradients")["value"] = "nan"


def _raised_limit(data: Data) -> None:
    case(data, "blocks")["limit"] = 4.0  # which is shipped, for blocks that run free


def _raised_threshold(data: Data) -> None:
    data["thresholds"][0]["limit"] *= 2


def _case_gone(data: Data) -> None:
    data["cases"].remove(case(data, "placement"))
    report = report_of(data)
    data["counts"] = report.count_line
    data["totals"]["passed"] -= 1


def _case_renamed(data: Data) -> None:
    case(data, "placement")["id"] = "placement/odd-twin/tp2-pp1/float32"


def _one_bad_block(data: Data) -> None:
    case(data, "blocks")["details"]["blocks"][1]["free_excess"] = 40.0


def _block_gone(data: Data) -> None:
    del case(data, "blocks", "odd")["details"]["blocks"][1]


def _better_value(data: Data) -> None:
    case(data, "blocks", "odd")["value"] = 0.5


def _better_error(data: Data) -> None:
    case(data, "logits", "odd")["details"]["candidate_error"] /= 2


def _broken_reference(data: Data) -> None:
    found = case(data, "logits")["details"]
    found["candidate_error"] *= 1e4
    found["reference_error"] *= 1e4


def _verdict(data: Data) -> None:
    data["verdict"] = "passed"


def _counts(data: Data) -> None:
    data["counts"] = data["counts"].replace("0 failed", "1 failed")


def _totals(data: Data) -> None:
    data["totals"]["passed"] += 1


def _below_zero(data: Data) -> None:
    case(data, "gradients")["value"] = -1.0


def _of_truth(data: Data) -> None:
    case(data, "config")["value"] = False


def _of_another_quantity(data: Data) -> None:
    case(data, "gradients")["limit"] = 32.0  # which is shipped, for the reference's own error


def _other_word(data: Data) -> None:
    found = case(data, "rope")
    found["summary"] = found["summary"].replace("passed", "FAILED")


def _branch(data: Data) -> None:
    data["qualification"]["origin"]["hf_revision"] = "main"


def _left_out(data: Data) -> None:
    data["allowed_not_run"] = ["gpu"]
    found = case(data, "gradients")
    for name in ("value", "limit", "unit", "places", "details"):
        del found[name]
    found |= {"status": "not run", "summary": "gpu"}
    report = report_of(data)
    data["counts"] = report.count_line
    data["totals"] |= {"passed": report.count("passed"), "not run": 1}
    data["qualification"]["scope"]["fault_patterns"] = []
    data["verdict"] = "passed"


def _places(data: Data) -> None:
    case(data, "config")["places"] = ["somewhere"]


def _in_scope(name: str, value: object) -> Callable[[Data], None]:
    def change(data: Data) -> None:
        data["qualification"]["scope"][name] = value

    change.__name__ = f"_scope_{name}"
    return change


def _fault_counts(data: Data) -> None:
    data["qualification"]["faults"]["killed"] += 1


def _input(data: Data) -> None:
    data["inputs"]["odd"]["config_sha256"] = "0" * 64


def _twin_input(data: Data) -> None:
    data["inputs"]["odd-twin"]["config_sha256"] = "0" * 64


def _weights(data: Data) -> None:
    data["inputs"]["odd-twin"]["weight_files"]["model.safetensors.index.json"] = {
        "bytes": 1, "sha256": "0" * 64,
    }  # fmt: skip


def _picture(data: Data) -> None:
    data["inputs"]["odd"]["architecture"]["num_parameters"] += 1


def _twin_picture(data: Data) -> None:
    data["inputs"]["odd-twin"]["architecture"]["facts"] = "hidden size 1"


def _class(data: Data) -> None:
    data["qualification"]["architecture"] = "LlamaForCausalLM"


def _unit(data: Data) -> None:
    case(data, "rope")["unit"] = "parsecs"


def _seconds(data: Data) -> None:
    case(data, "rope")["seconds"] += 1


def _started(data: Data) -> None:
    data["started"] = "2001-01-01T00:00:00+00:00"


def _no_qualification(data: Data) -> None:
    del data["qualification"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_flip, "counts"), (_beyond, "passed with a value"), (_not_a_number, "passed with a value"),
        (_raised_limit, "the limit 4 is not what is shipped"),
        (_raised_threshold, "not the one that is shipped"), (_case_gone, "lacking ['placement/"),
        (_case_renamed, "ids that are not those of their fields"),
        (_one_bad_block, "has free_excess 40"), (_block_gone, "blocks are wanted"),
        (_better_value, "the worst of its blocks"), (_better_error, "its errors make it"),
        (_broken_reference, "the reference itself is beyond"), (_verdict, "verdict: passed"),
        (_counts, "counts: "), (_totals, "totals: "), (_places, "says where it failed"),
        (_below_zero, "passed with a value of -1"), (_of_truth, "False is not valid"),
        (_of_another_quantity, "the limit 32 is not"), (_other_word, "summary says otherwise"),
        (_branch, "origin.hf_revision"), (_other_word, "did not end as the evidence says"),
        (_left_out, "allowed_not_run"), (_left_out, "verdict: passed, cases and faults make it"),
        (_in_scope("weights", "checkpoint"), "cases: not those"),
        (_in_scope("weights", "checkpoint"), "inputs: weights of a checkpoint are wanted"),
        (_in_scope("paired", value=True), "inputs: a Megatron checkpoint is wanted"),
        (_in_scope("num_parameters", 1), "scope.num_parameters"),
        (_in_scope("layouts", ["tp1-pp1", "tp2-pp1"]), "scope.layouts"),
        (_in_scope("traits", [{"trait": "none", "value": 1}]), "scope.traits"),
        (_in_scope("plan_sha256", "0" * 64), "scope.plan_sha256"),
        (_in_scope("blocks", []), "scope.blocks"),
        (_in_scope("fault_patterns", []), "verdict: incomplete, cases and faults make it passed"),
        (_in_scope("nothing_to_spoil", []), "scope.nothing_to_spoil"),
        (_fault_counts, "qualification.faults"), (_input, "the run was of another config.json"),
        (_twin_input, "the run was of another twin"),
        (_weights, "odd-twin is not the input that the evidence names"),
        (_picture, "the picture of odd is"), (_twin_picture, "the picture of odd-twin is"),
        (_class, "qualification.architecture"), (_unit, "did not end as the evidence says"),
        (_seconds, "did not end as the evidence says"), (_started, "begun at another time"),
    ],
    ids=lambda one: one.__name__.strip("_") if callable(one) else "",
)  # fmt: skip
def test_a_contradiction_is_noticed_whatever_was_written_anew(
    bundle: Path, change: Callable[[Data], None], said: str
) -> None:
    """Every report, the card and the sums are those of the changed evidence, and it shows."""
    data = load(bundle, "evidence.json")
    change(data)
    forge(bundle, data)
    found = audit(bundle)
    assert any(said in one for one in found.problems), found.problems
    assert found.exit_code == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda units: units.pop(), "not every fault"),
        (lambda units: units[0].update(killed_by=[], first=""), "verdict: incomplete"),
        (lambda units: units[0].update(first=""), "killed without a word"),
        (lambda units: units[0].update(looked=[]), "killed by a check that did not look"),
        (lambda units: units[0].update(toy="51b"), "not every fault"),
        (lambda units: units[0].update(seconds=9.0), "did not end as the kill matrix says"),
        (lambda units: units[0].update(first="logits/x"), "not its first killer's"),
        (lambda units: units[0].update(seconds_by_check={}), ""),
    ],
    ids=[
        "gone",
        "survived",
        "silent",
        "nobody looked",
        "another model",
        "noted otherwise",
        "another's word",
        "times",
    ],
)
def test_the_kill_matrix_is_made_again_from_its_units(
    bundle: Path, change: Callable[[list[Data]], object], said: str
) -> None:
    """With the matrix as it was, and with one made anew from the changed units."""
    from harness.qualify.audit import _scope
    from harness.qualify.trial import matrix_data

    data, matrix = load(bundle, "evidence.json"), load(bundle, "faults.json")
    change(matrix["units"])
    forge(bundle, data, matrix)
    if said in ("not every fault", "verdict: incomplete", ""):
        assert "faults.json: not what its units make it" in audit(bundle).problems
    if said:
        scope = _scope(bundle, data)
        again = matrix_data(matrix["units"], scope, matrix["seconds"], matrix["alarms"])
        forge(bundle, data, again)
        assert any(said in one for one in audit(bundle).problems), audit(bundle).problems


def test_a_check_that_is_blind_to_a_fault_cannot_have_killed_it(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes in at the ranks alone, the configuration cannot show."""
    monkeypatch.setattr("harness.qualify.audit.seams_of", lambda _fault: frozenset({"rank"}))
    problems = " ".join(audit(finished).problems)
    assert "config, round_trip cannot have looked at rope-theta" in problems


def test_another_configuration_is_another_model(bundle: Path) -> None:
    """Its twin, its size and its plan are not those on record."""
    config = load(bundle, "config.json")
    config["hidden_size"] += 12
    (bundle / "config.json").write_text(json.dumps(config), "utf-8")
    sum_up(bundle)
    problems = " ".join(audit(bundle).problems)
    for said in ("scope.num_parameters", "scope.plan_sha256", "another config.json"):
        assert said in problems


def test_evidence_of_a_mere_run_is_no_bundle(bundle: Path) -> None:
    """Whatever else is in the directory."""
    data = load(bundle, "evidence.json")
    _no_qualification(data)
    (bundle / "evidence.json").write_text(to_json(data), "utf-8")
    sum_up(bundle)
    assert "not of a qualification" in audit(bundle).problems[-1]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"schema_version": 2}', "{", "[" * 200_000], ids=range(5)
)
def test_a_broken_file_is_a_problem_and_no_traceback(bundle: Path, text: str) -> None:
    """Evidence or matrix, empty or torn."""
    for name in ("evidence.json", "faults.json", "config.json"):
        whole = (bundle / name).read_bytes()
        (bundle / name).write_text(text, "utf-8")
        sum_up(bundle)
        found = audit(bundle)
        assert found.problems
        assert found.exit_code == 1
        (bundle / name).write_bytes(whole)


def test_other_code_is_told_from_a_forgery(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it derives is not derived here; verdicts and sums are looked at all the same."""
    monkeypatch.setattr("harness.qualify.audit.code_sha256", lambda: "0" * 64)
    found = audit(bundle)
    assert (found.problems, found.exit_code) == ((), 3)
    assert found.other_code == load(bundle, "evidence.json")["code_sha256"]
    data = load(bundle, "evidence.json")
    _beyond(data)
    forge(bundle, data)
    assert audit(bundle).exit_code == 1


def test_a_directory_without_sums_is_no_bundle(tmp_path: Path) -> None:
    """Nor is one whose run has not ended."""
    with pytest.raises(EvidenceError, match="no bundle"):
        audit(tmp_path)


def test_the_command_says_what_it_found(bundle: Path) -> None:
    """Exit code 3 of a trial, 1 of an altered bundle; JSON on request."""
    done = CliRunner().invoke(app, ["qualify", "--check", str(bundle)])
    assert (done.exit_code, "validates" in done.output) == (3, True)
    (bundle / "report.md").write_text("fine\n")
    done = CliRunner().invoke(app, ["qualify", "--check", str(bundle), "--json"])
    assert done.exit_code == 1
    found = json.loads(done.output)
    assert (found["valid"], found["verdict"]) == (False, "incomplete")
    assert "report.md: not the file that was summed up" in found["problems"]


def test_a_finished_bundle_is_not_written_over(bundle: Path, odd_config: Path) -> None:
    """Not with --resume either: it has ended."""
    before = shutil.copytree(bundle, bundle.parent / "before")
    for more in ([], ["--resume"]):
        arguments = ["qualify", "--config", str(odd_config), "--report", str(bundle), *more]
        done = CliRunner().invoke(app, arguments)
        assert "a finished bundle is there" in str(done.exception)
    assert sums(bundle) == sums(before)


def test_a_file_that_may_not_be_read_is_a_problem_of_the_bundle(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests run as root may read everything."""

    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("harness.qualify.audit.sha256_of", refuse)
    found = audit(finished)
    assert any("Permission denied" in problem for problem in found.problems)
    assert (found.verdict, found.exit_code) == (None, 1)
