"""The project's jobs: `nox -s parity` is the main one, `nox -l` lists the rest.

All sessions share one virtual environment under `.nox/env`, built from `.ci/constraints.txt`, hash
by hash, and rebuilt when that file or the dependencies change: torch is too big to install four
times. Where torch and Transformer Engine are there already, in a container say,
NEMOTRON_BRIDGE_PYTHON names the interpreter that has them, and nothing is installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "tests", "parity"]
nox.options.stop_on_first_error = True

ROOT = Path(__file__).parent
CI = ROOT / ".ci"
ENVIRONMENT = ROOT / ".nox" / "env"
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")
# Each file's sha256 must be one that the list has, and nothing is built or picked beyond it.
LISTED = (
    *PIP,
    "install",
    "--require-hashes",
    "--only-binary",
    ":all:",
    "--no-deps",
    "--requirement",
)
WANTS_CUDA = (
    "from importlib.metadata import requires;"
    "print(any(one.startswith(('cuda-', 'nvidia-')) for one in requires('torch') or ()))"
)
PEER = (
    *("torch==2.13.0", "megatron-core==0.16.1", "transformers==4.57.6", "hydra-core==1.3.2"),
    *("einops", "omegaconf", "psutil", "pyyaml", "rich", "six", "tensorboard", "triton"),
)
STAMP = ENVIRONMENT / "inputs.sha256"


def install(session: nox.Session, python: str, listed: str, project: tuple[str, ...]) -> None:
    """Fill a virtual environment with a list of `.ci` and the project; nothing may be missing."""
    # Two torches have the version that is pinned. Where pip finds the small one, it is enough.
    session.run(python, *LISTED, str(CI / "cpu.txt"), success_codes=[0, 1], silent=True)
    session.run(python, *LISTED, str(CI / listed))
    if "True" in str(session.run(python, "-c", WANTS_CUDA, silent=True)):
        session.run(python, *LISTED, str(CI / "cuda.txt"))
    session.run(python, *PIP, "install", "--no-deps", "--no-build-isolation", *project)
    session.run(python, *PIP, "check")


def environment(session: nox.Session) -> str:
    """Build or reuse the shared environment; the path of its interpreter."""
    # One thread per process: ranks and xdist workers share the cores.
    session.env["OMP_NUM_THREADS"] = "1"
    given = os.environ.get("NEMOTRON_BRIDGE_PYTHON")
    if given:
        session.env["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        return given
    python = ENVIRONMENT / "bin" / "python"
    inputs = [path.read_bytes() for path in (*sorted(CI.glob("*.txt")), ROOT / "pyproject.toml")]
    wanted = hashlib.sha256(b"\0".join([sys.version.encode(), *inputs])).hexdigest()
    if not (python.exists() and STAMP.exists() and STAMP.read_text() == wanted):
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        session.run(sys.executable, "-m", "venv", str(ENVIRONMENT))
        install(session, str(python), "constraints.txt", ("--editable", str(ROOT)))
        STAMP.write_text(wanted)
    return str(python)


@nox.session
def parity(session: nox.Session) -> None:
    """Convert a toy of every variant, convert it back, and compare with the real Megatron-Core."""
    python = environment(session)
    session.run(python, "-m", "harness", "parity", *session.posargs)


@nox.session
def parity_gpu(session: nox.Session) -> None:
    """Run the checks on GPUs, by Megatron-Core's and by Transformer Engine's layers."""
    python = environment(session)
    session.run(python, "-m", "harness", "parity", "--suite", "parity_gpu", *session.posargs)


@nox.session
def full_size(session: nox.Session) -> None:
    """Synthesize, import and verify at full size on GPUs (default: Nano-4B and Nano-8B)."""
    python = environment(session)
    session.env.pop("OMP_NUM_THREADS")  # the oracle computes with every core
    names = session.posargs or [
        "Llama-3.1-Nemotron-Nano-4B-v1.1",
        "Llama-3.1-Nemotron-Nano-8B-v1",
    ]
    for name in names:
        config, directory = (
            ROOT / "suites" / "variants" / f"{name}.json",
            Path("out/full-size") / name,
        )
        hf, megatron = str(directory / "hf"), str(directory / "megatron")
        main = (python, "-m", "harness")
        session.run(*main, "synthesize", "--config", str(config), "--hf-path", hf, "--overwrite")
        session.run(*main, "import", "--hf-model", hf, "--megatron-path", megatron, "--overwrite")
        session.run(
            *(*main, "verify", "--hf-model", hf, "--megatron-path", megatron, "--device", "cuda"),
            *("--dtype", "bfloat16", "--no-stream", "--layouts", "tp1-pp1"),
            *("--checks", "config,round_trip,rope,logits,blocks,generation"),
            *("--report", str(directory / "report")),
        )


@nox.session
def tests(session: nox.Session) -> None:
    """Run every test that needs no GPU."""
    python = environment(session)
    session.run(python, "-m", "pytest", "-n", "2", "--dist", "loadfile", *session.posargs)


@nox.session
def cluster(session: nox.Session) -> None:
    """Run the tests of several machines that take minutes: whole suites and lost processes."""
    python = environment(session)
    session.run(python, "-m", "pytest", "-n", "2", "-m", "cluster", *session.posargs)


@nox.session
def peer(session: nox.Session) -> None:
    """Let the real Megatron-Bridge read imports and write checkpoints for exports."""
    python = environment(session)
    peers = ROOT / ".nox" / "peer"
    if not (peers / "installed").exists():
        shutil.rmtree(peers, ignore_errors=True)
        session.run(sys.executable, "-m", "venv", str(peers))
        install = (str(peers / "bin" / "python"), "-m", "pip", "install", "--quiet")
        session.run(*install, *PEER)
        # Its other requirements want a GPU, or to be compiled for one: see the script's stand-ins.
        session.run(*install, "--no-deps", "megatron-bridge==0.3.1")
        (peers / "installed").touch()
    session.env["NEMOTRON_BRIDGE_PEER_PYTHON"] = str(peers / "bin" / "python")
    session.run(python, "-m", "pytest", "-m", "peer", "tests/peer", *session.posargs)


@nox.session
def faults(session: nox.Session) -> None:
    """Break the bridge in every known way on several toys; any survivor fails."""
    python = environment(session)
    session.run(python, "-m", "harness", "faults", *session.posargs)


@nox.session
def alarms(session: nox.Session) -> None:
    """Run 200 healthy random models through every check (1,000: `-- --count 1000`)."""
    python = environment(session)
    session.run(python, "-m", "harness", "alarms", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Mutate the bytes of 100,000 inputs of every kind; each is read, or refused with a code."""
    python = environment(session)
    session.run(python, "-m", "harness", "fuzz", *session.posargs)


@nox.session
def torture(session: nox.Session) -> None:
    """Kill and fail conversions at chosen calls of the system: 200 kills, 200 errors, a soak."""
    python = environment(session)
    session.run(python, "-m", "harness", "torture", *session.posargs)


@nox.session
def golden(session: nox.Session) -> None:
    """Hold configurations, plans, weights and logits to those on record."""
    python = environment(session)
    session.run(python, "-m", "harness", "golden", "check", *session.posargs)


@nox.session(name="property")
def property_(session: nox.Session) -> None:
    """Run the property-based tests; the profile comes from HYPOTHESIS_PROFILE (default ci)."""
    python = environment(session)
    session.env.setdefault("HYPOTHESIS_PROFILE", os.environ.get("HYPOTHESIS_PROFILE", "ci"))
    session.run(python, "-m", "pytest", "-n", "2", "tests/property", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure time and memory beside `cp` (everything, up to 8 GB: `-- --full`)."""
    python = environment(session)
    session.env.pop("OMP_NUM_THREADS")  # commands choose their threads as they do for a user
    session.run(python, "-m", "harness", "bench", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into out/docs; a warning fails."""
    python = environment(session)
    session.run(
        *(python, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"),
        *("--builder", "html", "docs", "out/docs"),
    )
    session.log(f"file://{ROOT / 'out' / 'docs' / 'index.html'}")


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it where nothing else is, and convert and verify with it."""
    python = environment(session)
    out = (ROOT / "out" / "wheel").absolute()
    shutil.rmtree(out, ignore_errors=True)
    built_by = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out))
    session.run(python, *PIP, *built_by, str(ROOT))
    (built,) = out.glob("*.whl")
    session.run(sys.executable, "-m", "venv", str(out / "env"))
    tools = out / "env" / "bin"
    install(session, str(tools / "python"), "wheel.txt", (str(built),))
    command = str(tools / "nemotron-bridge")
    session.chdir(out)  # nothing of the clone may be found by accident
    session.env["PYTHONPATH"] = ""
    session.run(command, "toy", "super-49b-v1", "--hf-path", "hf")
    session.run(command, "import", "--hf-model", "hf", "--megatron-path", "megatron")
    session.run(command, "verify", "--hf-model", "hf", "--megatron-path", "megatron")
    session.run(command, "golden", "check", "--select", "toy-nano-4b*")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, types, spelling and import contracts."""
    python = environment(session)
    session.run(python, "-m", "ruff", "check")
    session.run(python, "-m", "ruff", "format", "--check")
    session.run(python, "-m", "mypy")
    tools = Path(python).parent
    session.run(str(tools / "lint-imports"))
    session.run(
        str(tools / "codespell"),
        *("bridge", "harness", "tests", "suites", "golden", "docs", ".github"),
        *("README.md", "CHANGELOG.md"),
    )


@nox.session
def constraints(session: nox.Session) -> None:
    """Write what CI installs, with hashes (the newest versions that fit: `-- --upgrade`)."""
    python = environment(session)
    session.run(python, str(CI / "lock.py"), *session.posargs)
    session.notify("licences")


@nox.session
def licences(session: nox.Session) -> None:
    """Write docs/licences.md, of what is pinned."""
    python = environment(session)
    session.run(python, str(CI / "licences.py"))


@nox.session
def sbom(session: nox.Session) -> None:
    """Write out/sbom.json: a CycloneDX list of what the wheel needs, by hash."""
    tools = ROOT / ".nox" / "sbom"
    session.run(sys.executable, "-m", "venv", "--clear", str(tools))
    session.run(str(tools / "bin" / "python"), *LISTED, str(CI / "sbom.txt"))
    out = ROOT / "out"
    out.mkdir(exist_ok=True)
    session.run(
        *(str(tools / "bin" / "cyclonedx-py"), "requirements", str(CI / "wheel.txt")),
        *("--pyproject", str(ROOT / "pyproject.toml"), "--output-reproducible"),
        *("--output-file", str(out / "sbom.json")),
    )
