"""pytest's way in: hold a checkpoint of your own to the checks, from your own tests.

    @pytest.mark.parity(model="checkpoints/mine", layouts=["tp1-pp1", "tp2-pp1"])
    def test_my_checkpoint(parity_case): ...

Every check on every layout is a test of its own. Loading this imports neither torch nor Megatron:
pytest loads it for every test run of an environment that has nemotron-bridge.
"""

from __future__ import annotations

import base64
import itertools
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from harness.bench import Bench
    from harness.pytest_goldens import Goldens
    from harness.runner import Result, RunReport
    from harness.suite import Case

DEFAULT_LAYOUTS: Final = ("tp1-pp1", "tp2-pp1", "tp1-pp2")
_MARK_FIELDS: Final = ("model", "megatron", "layouts", "checks", "dtype", "probes")
_RESULTS: Final = "nemotron_results"
_GOLDENS: Final = "nemotron_goldens"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of `pytest --help`, under the project's name."""
    group = parser.getgroup("nemotron-bridge")
    group.addoption(
        "--nemotron-device", choices=("cpu", "cuda"), default="cpu", help="Where models run."
    )
    group.addoption(
        "--nemotron-report", type=Path, metavar="DIR", help="Leave evidence and rank logs there."
    )
    group.addoption(
        "--nemotron-golden-update",
        action="store_true",
        help="Write the goldens that tests ask for, and remove those that none does.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker; refuse to write goldens where nobody would review them."""
    config.addinivalue_line(
        "markers",
        "parity(model, megatron, layouts, checks, dtype, probes): hold a checkpoint to the checks "
        "of nemotron-bridge, each on each layout as a test of its own",
    )
    in_ci = os.environ.get("CI", "").lower() not in {"", "0", "false"}
    if in_ci and config.getoption("nemotron_golden_update"):
        raise pytest.UsageError(
            "--nemotron-golden-update under CI: goldens are written by people, and reviewed"
        )
    config.pluginmanager.register(_Session(config), "nemotron-bridge-session")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of each check x layout x probe that a `parity` mark asks for."""
    mark = metafunc.definition.get_closest_marker("parity")
    if mark is None:
        return
    from bridge.errors import BridgeError

    try:
        cases = _cases(mark, metafunc.config.getoption("nemotron_device"))
    except BridgeError as error:
        pytest.fail(f"@pytest.mark.parity: {error}", pytrace=False)
    if "parity_case" not in metafunc.fixturenames:
        metafunc.fixturenames.append("parity_case")
    ids = [case.id.replace("//", "/") for case, _ in cases]
    metafunc.parametrize("parity_case", cases, indirect=True, ids=ids)


def _cases(mark: pytest.Mark, device: str) -> list[tuple[Case, bool]]:
    """Cases of a mark, without their model; with each, whether its layout was asked for."""
    from harness.checks import CHECKS
    from harness.errors import SuiteError
    from harness.layouts import check_layout_name
    from harness.suite import DTYPES, Compute, layers_named
    from harness.verification import CONVERSION_CHECKS

    wanted = mark.kwargs
    unknown = sorted(wanted.keys() - set(_MARK_FIELDS))
    if mark.args or unknown:
        raise SuiteError(
            f"what it takes is {', '.join(_MARK_FIELDS)}, each by name",
            where=[*map(repr, mark.args), *unknown],
        )
    checks = _names(wanted.get("checks"), CONVERSION_CHECKS, "checks")
    layouts = _names(wanted.get("layouts"), DEFAULT_LAYOUTS, "layouts")
    probes = _names(wanted.get("probes"), ("short", "long"), "probes")
    dtype = wanted.get("dtype", "float32")
    wrong = [f"check {name!r}" for name in checks if name not in CHECKS]
    wrong += [f"probe {name!r}" for name in probes if name not in {"short", "long"}]
    wrong += [] if dtype in DTYPES else [f"dtype {dtype!r}"]
    if wrong:
        raise SuiteError(
            "names that mean nothing",
            where=wrong,
            hint=f"checks are {', '.join(CHECKS)}; dtypes {', '.join(DTYPES)}; probes short, long",
        )
    for name in layouts:
        check_layout_name(name)
    found = []
    compute = Compute(dtype=dtype, device=device, layers=layers_named("auto", device))
    for check in checks:
        axes = CHECKS[check].axes
        places: Sequence[str | None] = layouts if "layout" in axes else (None,)
        if check == "round_trip" and "layouts" not in wanted:
            places = layouts[:1]  # it only names the cut of the files
        inputs: Sequence[str | None] = probes if "probe" in axes else (None,)
        for layout, probe in itertools.product(places, inputs):
            case = compute.case(check, "", layout=layout, probe=probe)
            found.append((case, "layouts" in wanted))
    return found


def _names(given: Any, default: tuple[str, ...], what: str) -> tuple[str, ...]:  # noqa: ANN401 - a user's value
    from harness.errors import SuiteError

    if given is None:
        return default
    if isinstance(given, str) or not all(isinstance(one, str) for one in given) or not given:
        raise SuiteError(f"{what} must be a list of names that is not empty", where=repr(given))
    return tuple(dict.fromkeys(given))


@pytest.fixture(scope="session")
def nemotron_bench(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    """The rank processes and conversions that all parity tests of this process share."""
    from harness.bench import Bench

    report = request.config.getoption("nemotron_report")
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    logs = None if report is None else report / "ranks" / worker
    with Bench(tmp_path_factory.mktemp("nemotron-bridge"), log_dir=logs) as bench:
        yield bench


@pytest.fixture
def parity_model() -> str | Path:
    """The checkpoint of a `parity` mark that names none; override it where yours is made."""
    pytest.fail(
        "@pytest.mark.parity has no model: give model=..., or define a fixture `parity_model` that "
        "returns a checkpoint directory",
        pytrace=False,
    )


@pytest.fixture
def parity_case(request: pytest.FixtureRequest) -> Case:
    """The case that this test is; its check is carried out before the test's own body."""
    from dataclasses import replace

    mark = request.node.get_closest_marker("parity")
    if mark is None or not hasattr(request, "param"):
        pytest.fail("parity_case is for tests that @pytest.mark.parity marks", pytrace=False)
    bench: Bench = request.getfixturevalue("nemotron_bench")
    given = mark.kwargs.get("model") or request.getfixturevalue("parity_model")
    name = _subject(bench, given, mark.kwargs.get("megatron"), request.path.parent)
    drawn, layout_asked_for = request.param
    case: Case = replace(drawn, model=name)
    if case.layout is not None and not layout_asked_for:
        from harness.layouts import fits

        if not fits(case.layout, bench.spec(case)):
            pytest.skip(f"the model cannot be cut into {case.layout}")
    request.node.stash[_CASE] = (case, bench)
    return case


_CASE: Final = pytest.StashKey[tuple[Any, Any]]()


def _subject(bench: Bench, hf: str | Path, megatron: str | Path | None, beside: Path) -> str:
    """Make a checkpoint known to the bench; its name there."""
    from bridge.hub import resolve_here
    from harness.bench import Subject

    text = str(hf)
    if text.startswith("toy:"):
        return bench.subject(text.removeprefix("toy:")).name
    near = beside / text  # a relative path is the test file's neighbour, or the working directory's
    path = near if near.is_dir() else resolve_here(text, weights=True)
    twin = None
    if megatron is not None:
        twin = beside / megatron if (beside / megatron).is_dir() else Path(megatron)
    name = path.resolve().name
    wanted = Subject(name=name, hf=path, megatron=twin)
    number = 1
    while name in bench.subjects and bench.subjects[name] != wanted:
        number += 1
        name = f"{path.resolve().name}-{number}"
        wanted = Subject(name=name, hf=path, megatron=twin)
    bench.subjects[name] = wanted
    return name


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Carry the check out where the test is called, so that a difference is a failure."""
    found = pyfuncitem.stash.get(_CASE, None)
    if found is not None:
        from harness.runner import run_case

        case, bench = found
        result = run_case(case, bench)
        _session(pyfuncitem.config).add(result, bench)
        if result.status == "not run":
            pytest.skip(f"no {result.reason}")
        if result.status != "passed":
            pytest.fail(describe(result), pytrace=False)
    return (yield)


@pytest.fixture
def parity(request: pytest.FixtureRequest, nemotron_bench: Bench) -> Callable[..., RunReport]:
    """Hold one checkpoint to several checks inside a test.

    `parity(hf_path, megatron_path=None, layouts=..., checks=..., dtype=..., probes=...)` returns
    the report, or fails the test with every finding and its place.
    """

    def check(
        hf_path: str | Path,
        megatron_path: str | Path | None = None,
        **wanted: Any,  # noqa: ANN401 - the mark's own fields
    ) -> RunReport:
        from dataclasses import replace

        from bridge.errors import BridgeError
        from harness.layouts import fits
        from harness.runner import run_cases

        try:
            device = request.config.getoption("nemotron_device")
            drawn = _cases(pytest.mark.parity(**wanted).mark, device)
            name = _subject(nemotron_bench, hf_path, megatron_path, request.path.parent)
            named = [(replace(case, model=name), asked) for case, asked in drawn]
            cases = [
                case
                for case, asked in named
                if asked or case.layout is None or fits(case.layout, nemotron_bench.spec(case))
            ]
            session = _session(request.config)
            report = run_cases(
                cases, nemotron_bench, on_result=lambda one: session.add(one, nemotron_bench)
            )
        except BridgeError as error:
            pytest.fail(str(error), pytrace=False)
        if report.exit_code:
            bad = [describe(one) for one in report.results if one.status != "passed"]
            pytest.fail("\n".join([*bad, report.count_line]), pytrace=False)
        return report

    return check


@pytest.fixture
def nemotron_golden(request: pytest.FixtureRequest) -> Goldens:
    """Numbers on record beside the test: `nemotron_golden.check(hf_path or logits, "name")`."""
    from harness.pytest_goldens import Goldens

    return Goldens(
        directory=request.path.parent / "goldens",
        owner=f"{request.path.name}::{request.node.nodeid.partition('::')[2]}",
        update=request.config.getoption("nemotron_golden_update"),
        used=_session(request.config).goldens["used"],
    )


def describe(result: Result) -> str:
    """A result as a test failure: the case, what was found, and where."""
    lines = [f"{result.status.upper()} {result.case.id}"]
    if result.finding is None:
        lines += [f"  {line}" for line in (result.traceback or result.reason).splitlines()]
    else:
        lines += [f"  {result.finding.summary}"]
        lines += [f"  --> {place}" for place in result.finding.places]
    return "\n".join(lines)


def _session(config: pytest.Config) -> _Session:
    found = config.pluginmanager.get_plugin("nemotron-bridge-session")
    assert isinstance(found, _Session)  # noqa: S101 - registered by pytest_configure
    return found


class _Session:
    """What a run has gathered; under xdist, workers hand theirs to the controller."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.results: list[Result] = []
        self.inputs: dict[str, Path] = {}
        self.goldens: dict[str, list[str]] = {"used": [], "passed": [], "collected": []}
        self.unused: list[Path] = []

    def add(self, result: Result, bench: Bench) -> None:
        """Remember a result and which checkpoint it is about."""
        self.results.append(result)
        if result.case.model not in self.inputs:
            self.inputs[result.case.model] = bench.checkpoint(result.case)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Note every test there is, before any is deselected."""
        self.goldens["collected"] += [
            f"{one.path}::{one.nodeid.partition('::')[2]}" for one in items
        ]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note which tests have passed: only of those is a golden known to be unused."""
        if report.when == "call" and report.passed:
            module, _, name = report.nodeid.partition("::")
            self.goldens["passed"].append(f"{self.config.rootpath / module}::{name}")

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:  # noqa: ANN401 - xdist is not required
        """Take what a worker has gathered."""
        output = getattr(node, "workeroutput", {})
        if _RESULTS in output:
            results, inputs = pickle.loads(base64.b64decode(output[_RESULTS]))  # noqa: S301 - our own worker
            self.results += results
            self.inputs |= inputs
            for key, found in output[_GOLDENS].items():
                self.goldens[key] += found

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Hand over, or write the report and judge which goldens nobody asked for."""
        output = getattr(self.config, "workeroutput", None)
        if output is not None:
            output[_RESULTS] = base64.b64encode(pickle.dumps((self.results, self.inputs))).decode()
            output[_GOLDENS] = self.goldens
            return
        if self.goldens["collected"] and not self.config.option.collectonly:
            from harness.pytest_goldens import unused

            self.unused = unused(partial=_partial(self.config), **self.goldens)
            if self.unused and self.config.getoption("nemotron_golden_update"):
                for path in self.unused:
                    path.unlink()
            elif self.unused and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
        directory = self.config.getoption("nemotron_report")
        if directory is not None and self.results:
            self._write(directory)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:  # noqa: ANN401 - pytest's, not public
        """One line of counts, and the goldens that no test uses."""
        if self.results:
            terminalreporter.write_line(f"nemotron-bridge: {_report(self.results).count_line}")
        if self.unused:
            removed = self.config.getoption("nemotron_golden_update")
            word = "removed, no test uses it" if removed else "FAILED, no test uses this golden"
            for path in self.unused:
                terminalreporter.write_line(f"nemotron-bridge: {word}: {path}")

    def _write(self, directory: Path) -> None:
        from harness.pytest_report import write_report

        directory.mkdir(parents=True, exist_ok=True)
        write_report(
            _report(self.results), directory, inputs=self.inputs,
            command=["pytest", *self.config.invocation_params.args],
        )  # fmt: skip


def _partial(config: pytest.Config) -> bool:
    return any("::" in str(one) for one in config.args)


def _report(results: Sequence[Result]) -> RunReport:
    from harness.runner import RunReport

    return RunReport(results=results, seconds=sum(one.seconds for one in results))
