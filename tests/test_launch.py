"""The scripts in launch/ that start jobs on clusters, as far as one machine can tell."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from jobs import ROOT, read

from terncomm.cluster.namespaces import Namespace, NotPermitted

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), *(ROOT / "tests").glob("*.sh")])
TRAIN = str(LAUNCH / "train.py")
PATHS = os.pathsep.join(filter(None, sys.path))


def nodes(*words, **environment):
    return subprocess.run(
        [LAUNCH / "nodes.sh", *map(str, words)],
        env={**os.environ, "DRY_RUN": "1", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, script], check=True)
    # A reader that leaves early ends its writer by SIGPIPE, and with pipefail the script: by chance.
    assert not re.search(r"\|\s*(head|grep -q)\b", script.read_text()), "use sed -n, which reads to the end"


def test_a_command_for_each_node():
    done = nodes(1, 0, "localhost:12345", TRAIN, "--codec", "int8", PROCESSES="2", RESTARTS="3", JOB="mine")
    assert done.returncode == 0, done.stderr
    assert "node 0 of 1 by lo: torchrun --nnodes 1:1 --nproc-per-node 2 --max-restarts 3 --rdzv-id mine" in done.stderr
    assert "--rdzv-endpoint 127.0.0.1:12345 --rdzv-conf is_host=true --local-addr 127.0.0.1" in done.stderr
    assert done.stderr.endswith(f"{TRAIN} --codec int8\n")


def test_ranks_that_start_anew_have_a_new_store(tmp_path):
    (tmp_path / "bin").mkdir()
    torchrun = tmp_path / "bin" / "torchrun"
    torchrun.write_text('#!/bin/sh\necho "own store: $TORCH_DISABLE_SHARE_RDZV_TCP_STORE"\n')
    torchrun.chmod(0o755)
    done = nodes(1, 0, "localhost", TRAIN, VIRTUAL_ENV=str(tmp_path), DRY_RUN="")
    assert done.stdout == "own store: 1\n", done.stderr


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (("two", 0, "localhost", TRAIN), {}, "NODES must be a number, got 'two'"),
        ((1, 0, "localhost", TRAIN), {"MIN_NODES": "few"}, "MIN_NODES must be a number, got 'few'"),
        ((2, 2, "localhost", TRAIN), {}, "NODE must be below NODES=2, got 2"),
        ((1, 0, "localhost", "no.py"), {}, "there is no script no.py"),
        ((1, 0, "nowhere.invalid", TRAIN), {}, "cannot find the address of 'nowhere.invalid'"),
        ((1, 0, "localhost", TRAIN), {"IFNAME": "bogus0"}, "there is no interface 'bogus0'; there are: "),
        ((2, 0, "localhost", TRAIN), {}, "localhost is reached by lo, where other nodes are not"),
        ((1, 0), {}, "launch/nodes.sh NODES NODE MASTER[:PORT] SCRIPT"),
    ],
)
def test_refused_in_one_line(words, environment, said):
    done = nodes(*words, **environment)
    assert done.returncode != 0
    assert said in done.stderr


def test_slurm_starts_one_torchrun_per_node(tmp_path):
    """With stand-ins for srun and scontrol: this machine is the first node of two."""
    (tmp_path / "srun").write_text('#!/bin/sh\necho cpus $SRUN_CPUS_PER_TASK\nshift\nSLURM_NODEID=0 exec "$@"\n')
    addresses = subprocess.run(["ip", "-o", "-4", "address"], capture_output=True, text=True, check=True).stdout
    mine = [words[3].split("/")[0] for words in map(str.split, addresses.splitlines()) if words[1] != "lo"]
    if not mine:
        pytest.skip("this machine has no interface but lo")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\nprintf "%s\\nsecond\\n" {mine[0]}\n')
    for each in tmp_path.iterdir():
        each.chmod(0o755)
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", "launch/train.py", "--codec", "a b"],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "20007",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "16",
            "DRY_RUN": "1",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "node 0 of 2 by " in said
    assert ":20007 --rdzv-conf is_host=true" in said
    assert "--rdzv-id 20007" in said
    assert "--nproc-per-node 4" in said
    assert "cpus 16" in said


def test_slurm_needs_a_script():
    done = subprocess.run(["bash", LAUNCH / "slurm.sbatch"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "which script?" in done.stderr


def test_the_kubernetes_job_runs_what_there_is():
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    launcher, processes, script, *options = container["command"]
    assert (launcher, processes) == ("torchrun", "--nproc-per-node=1")
    words = subprocess.run(
        [sys.executable, ROOT / script, *options, "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert all(each in words for each in options if each.startswith("--"))
    mounted = {each["name"] for each in container["volumeMounts"]}
    assert mounted == {each["name"] for each in worker["template"]["spec"]["volumes"]}
    elastic = job["spec"]["elasticPolicy"]
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]


@pytest.mark.root
def test_two_nodes(tmp_path):
    """Two network namespaces with a cable between them, a node with two processes in each."""
    try:
        Namespace().close()
    except NotPermitted as error:
        pytest.skip(f"no network namespaces here: {error}")
    names = [f"terncomm-{os.getpid()}-{node}" for node in range(2)]
    jobs = []

    def ip(*words):
        subprocess.run(["ip", *words], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for node, name in enumerate(names):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "address", "add", f"10.9.8.{node + 1}/24", "dev", f"cable{node}")
            ip("-n", name, "link", "set", f"cable{node}", "up")
        for node, name in enumerate(names):
            words = [
                node,
                "10.9.8.1",
                TRAIN,
                "--codec=int8",
                "--between-nodes",
                "--epochs=1",
                f"--metrics={tmp_path / 'metrics'}",
            ]
            jobs.append(
                subprocess.Popen(
                    [*map(str, ["ip", "netns", "exec", name, LAUNCH / "nodes.sh", 2, *words])],
                    env={**os.environ, "PROCESSES": "2", "PYTHONPATH": PATHS, "VIRTUAL_ENV": str(Path(sys.prefix))},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        told = [job.communicate(timeout=150)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)
    assert [job.returncode for job in jobs] == [0, 0], told
    assert ["by cable0" in told[0], "by cable1" in told[1]] == [True, True]
    (epoch,) = read(tmp_path / "metrics")
    assert epoch["world_size"] == 4
    assert epoch["wire_bytes"] > epoch["intra_bytes"] > epoch["raw_bytes"], "floats inside nodes"


@pytest.mark.slow
def test_a_job_that_loses_a_worker_goes_on_from_its_checkpoint_in_a_smaller_world(tmp_path):
    metrics, checkpoint, port = tmp_path / "metrics", tmp_path / "checkpoint.pt", free_port()
    words = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=elastic"]
    words += [f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
    quick = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=2"
    job = [TRAIN, "--codec=terngrad", "--epochs=400", f"--metrics={metrics}", f"--checkpoint={checkpoint}"]
    agents = []

    def start(is_host):
        configuration = f"--rdzv-conf=is_host={is_host},{quick}"
        with open(tmp_path / f"said_{is_host}", "w") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *words, configuration, *job],
                env={**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"},
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def wait_for(condition, limit_s):
        end = time.monotonic() + limit_s
        while not condition():
            assert agents[0].poll() is None, (tmp_path / "said_true").read_text()
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.1)

    def worlds():
        try:
            return [(each["epoch"], each["world_size"]) for each in read(metrics)]
        except (FileNotFoundError, ValueError):  # it is being written
            return []

    try:
        agents += [start("true"), start("false")]
        wait_for(lambda: len(worlds()) >= 2, 180)
        assert {world for _, world in worlds()} == {2}
        workers = Path(f"/proc/{agents[1].pid}/task/{agents[1].pid}/children").read_text().split()
        for each in (agents[1].pid, *map(int, workers)):
            os.kill(each, signal.SIGKILL)
        before = len(worlds())
        wait_for(lambda: any(world == 1 for _, world in worlds()), 180)
    finally:
        for agent in agents:
            agent.terminate()
            agent.wait(timeout=60)
    found = worlds()
    assert [epoch for epoch, _ in found] == list(range(1, len(found) + 1)), "no epoch is lost or done twice"
    first = [world for _, world in found].index(1)
    assert first >= before - 1
