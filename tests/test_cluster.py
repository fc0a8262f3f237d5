"""Jobs on limited networks: links are as asked, ranks are started and ended as they should be, and nothing is left."""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import terncomm
from terncomm.cluster import command, launch, network, verify
from terncomm.cluster.guard import Guard
from terncomm.cluster.interrupts import Interrupts
from terncomm.cluster.launch import Job
from terncomm.cluster.namespaces import Namespace, NotPermitted, address
from terncomm.cluster.probe import Probe, probe
from terncomm.simulator.links import Link

ROOT = Path(terncomm.__file__).parents[1]


@pytest.fixture(autouse=True)
def buffered(monkeypatch):
    """Ranks write whole lines, whatever the environment of the tests says."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


@pytest.fixture
def allowed():
    """Skips where this process may not make namespaces."""
    try:
        Namespace().close()
    except NotPermitted as error:
        pytest.skip(f"no network namespaces here: {error}")


@pytest.fixture
def without_netem(monkeypatch):
    """Delay is the user-space link's, whatever the kernel has."""
    monkeypatch.setattr(network, "_has_netem", lambda where: False)


@pytest.fixture
def script(tmp_path):
    """Writes a script and gives its path."""

    def write(text):
        path = tmp_path / "script.py"
        path.write_text(text)
        return str(path)

    return write


def main(*words):
    """The command in this process."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args([str(word) for word in words]))


def start(*words, prefix=(), python=sys.executable, **environment):
    """The command in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    argv = [*prefix, python, "-m", "terncomm.cluster", *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=ROOT)


def processes(marker):
    """Those that have `marker` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def host_networks():
    """Network namespaces of all processes."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(os.readlink(path))
        except OSError:
            continue
    return found


# ---- links -----------------------------------------------------------------------------------------------------------


def measure(made, link):
    """What a probe finds; again, up to twice, where other work on the machine disturbed it."""
    for _ in range(3):
        found = probe(made.nodes, link)
        if verify.fits(found, link):
            break
    return found


@pytest.mark.root
@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("nodes", [2, 4])
def test_tbf_gives_the_rate(nodes):
    link = Link.parse("100mbit")
    with network.network(nodes, link) as made:
        found = measure(made, link)
    assert made.how == "tbf"
    assert found.bits_per_s == pytest.approx(8 * link.payload_bytes_per_s, rel=0.15)
    assert found.delay_s < 1e-3


@pytest.mark.root
@pytest.mark.usefixtures("allowed", "without_netem")
@pytest.mark.parametrize("text", ["100mbit/5ms", "50mbit/1ms"])
def test_the_user_space_link_gives_rate_and_delay(text):
    link = Link.parse(text)
    with network.network(2, link) as made:
        found = measure(made, link)
        before = sum(sum(host.traffic()) for host in made.nodes)
        time.sleep(0.2)
        assert sum(sum(host.traffic()) for host in made.nodes) - before < 2000, "the probe is over"
    assert made.how == "user-space link"
    assert found.bits_per_s == pytest.approx(8 * link.payload_bytes_per_s, rel=0.15)
    assert found.delay_s == pytest.approx(link.delay_s, rel=0.1, abs=0.3e-3)
    assert made.switch.returncode == 0


@pytest.mark.root
@pytest.mark.usefixtures("allowed")
def test_whatever_delays_here_delays_as_asked():
    link = Link.parse("50mbit/4ms")
    with network.network(2, link) as made:
        found = measure(made, link)
    assert made.how in ("tbf + netem", "user-space link")
    assert verify.fits(found, link)


def datagrams(made, count):
    """Numbered datagrams from host 0 to host 1, a millisecond apart: which came, and when after they were sent, s."""
    with made.nodes[1].inside():
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with made.nodes[0].inside():
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sender, receiver:
        receiver.bind((address(1), 7))
        receiver.settimeout(0.5)
        _until_one_comes(sender, receiver)
        sent, came = [], []

        def send():
            for number in range(count):
                sent.append(time.perf_counter())
                sender.sendto(number.to_bytes(4, "little"), (address(1), 7))
                time.sleep(0.001)

        thread = threading.Thread(target=send)
        thread.start()
        try:
            while True:
                if not (octets := receiver.recv(4)):
                    continue
                number = int.from_bytes(octets, "little")
                came.append((number, time.perf_counter() - sent[number]))
        except TimeoutError:
            thread.join()
    return came


def _until_one_comes(sender, receiver):
    """Send empty datagrams until ARP has found the receiver: its messages may be lost, and are repeated each second."""
    for _ in range(40):
        sender.sendto(b"", (address(1), 7))
        with contextlib.suppress(TimeoutError):
            receiver.recv(4)
            return
    pytest.fail("no datagram came within 20 s")


@pytest.mark.root
@pytest.mark.usefixtures("allowed")
def test_jitter_varies_the_delay_and_keeps_the_order():
    with network.network(2, Link("", float("inf"), delay_s=10e-3), jitter_s=5e-3) as made:
        came = datagrams(made, 300)
    assert made.how == "user-space link"
    numbers, delays = [number for number, _ in came], sorted(seconds for _, seconds in came)
    assert numbers == list(range(300))
    assert delays[0] > 4.5e-3
    assert delays[225] - delays[75] > 1e-3


@pytest.mark.root
@pytest.mark.usefixtures("allowed", "without_netem")
def test_loss_loses_its_share():
    with network.network(2, Link("", float("inf")), loss=0.2) as made:
        came = datagrams(made, 500)
    assert 400 - 50 < len(came) < 400 + 50  # 5.6 standard deviations


def test_what_fits():
    link = Link("", 100e6, delay_s=1e-3)
    assert verify.fits(Probe(94e6, 1e-3), link)
    assert verify.fits(Probe(81e6, 1.39e-3), link)
    assert not verify.fits(Probe(79e6, 1e-3), link), "too slow"
    assert not verify.fits(Probe(120e6, 1e-3), link), "no limit"
    assert not verify.fits(Probe(94e6, 1.41e-3), link), "too late"
    assert not verify.fits(Probe(94e6, 0.5e-3), link), "too early"
    assert verify.fits(Probe(40e6, 1e-3), link, loss=0.01)
    assert verify.fits(Probe(94e6, 1.8e-3), link, jitter_s=0.5e-3)


@pytest.mark.root
@pytest.mark.usefixtures("allowed")
def test_a_rate_that_the_machine_cannot_reach_is_refused_or_labelled(script, tmp_path, capfd, monkeypatch):
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(verify, "ATTEMPTS", 1)
    words = "--ranks", 2, "--rate", "400gbit", "--out", out
    assert main(*words, "--", script("print('ran')")) == 1
    told = capfd.readouterr()
    assert told.out == ""
    assert told.err.startswith("terncomm cluster: refused: tbf on this machine gives asked 400 Gbit/s, measured ")
    assert told.err.count("\n") == 1
    assert main(*words, "--accept-measured", "--", script("print('ran')")) == 0
    told = capfd.readouterr()
    assert "ran\n" in told.out
    record = json.loads(out.read_text())
    label = f"{record['probe']['bits_per_s'] / 1e6:.4g}mbit/"
    assert record["config"]["link"].startswith(label)
    assert record["config"]["link"].endswith("(measured)")
    assert f"labelled {label}" in told.err


# ---- ranks -----------------------------------------------------------------------------------------------------------

TELL = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME",
         "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_P2P_DISABLE", "OMP_NUM_THREADS")
print(json.dumps([sys.argv[1:], os.readlink("/proc/self/ns/net"), int(os.environ["MASTER_PORT"])]
                 + [os.environ[name] for name in names]))
print("an error", file=sys.stderr)
"""


@pytest.mark.root
@pytest.mark.usefixtures("allowed")
def test_ranks_are_told_what_torchrun_tells(script):
    path = script(TELL)
    job = start("--ranks", 4, "--ranks-per-node", 2, "--", path, "--rate", "7", OMP_NUM_THREADS="")
    out, err = job.communicate(timeout=60)
    assert job.returncode == 0, err
    assert "4 ranks, 2 namespaces, no limit" in err
    seen = {}
    for line in out.splitlines():
        prefix, bracket, rest = line.partition("] ")
        rank = int(prefix.removeprefix("[rank ")) if bracket and prefix.startswith("[rank ") else 0
        seen[rank] = json.loads(rest if rank else line)
    for rank in range(4):
        words, _, port, *told = seen[rank]
        assert words == ["--rate", "7"]
        assert port == seen[0][2]
        assert told[:5] == [str(rank), str(rank % 2), str(rank // 2), "4", "2"]
        assert told[5:] == ["10.77.0.1", "e0", "e0", "e0", "1", ""]
        assert ("an error" if rank == 0 else f"[rank {rank}] an error") in err.splitlines()
    networks = [seen[rank][1] for rank in range(4)]
    assert networks[0] == networks[1] != networks[2] == networks[3]
    assert os.readlink("/proc/self/ns/net") not in networks


@pytest.mark.root
@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("words", [["-m", "platform"], ["uname", "-s"]])
def test_modules_and_executables_run_too(words, capfd):
    assert main("--ranks", 1, "--", *words) == 0
    told = capfd.readouterr()
    assert told.out.startswith("Linux")
    assert "one host, so no link is used" in told.err


SEND = """
import json, os, socket, time
rank = int(os.environ["RANK"])
where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
if rank == 0:
    left = 3_000_000
    with socket.create_server(where) as server, server.accept()[0] as end:
        while left:
            left -= len(end.recv(left))
    with open(os.environ["TERNCOMM_METRICS"], "a") as file:
        file.write(json.dumps({"step": 1, "seconds": 0.5}) + chr(10) + "no JSON" + chr(10))
else:
    while True:
        try:
            with socket.create_connection(where) as end:
                end.sendall(bytes(3_000_000))
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
"""


@pytest.mark.root
@pytest.mark.usefixtures("allowed")
def test_bytes_are_counted_and_recorded(script, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(command.tempfile, "tempdir", str(tmp_path))
    out = tmp_path / "out.jsonl"
    path = script(SEND)
    for _ in range(2):
        assert main("--ranks", 2, "--link", "100mbit", "--out", out, "--", path, "-x") == 0
    first, second = map(json.loads, out.read_text().splitlines())
    assert first["config"] == second["config"]
    assert first["config"]["command"] == [path, "-x"]
    assert (first["config"]["ranks"], first["config"]["link"]) == (2, "100mbit")
    for record in (first, second):
        assert record["mode"] == "cluster"
        assert record["how"] == "tbf"
        assert record["status"] == 0
        assert record["probe"]["bits_per_s"] == pytest.approx(94e6, rel=0.15)
        assert record["interface_bytes"][1] == pytest.approx(3_000_000, rel=0.05)
        assert record["interface_bytes_received"][0] == pytest.approx(3_000_000, rel=0.05)
        assert record["interface_bytes"][0] < 300_000
        assert record["seconds"] > 8 * 3_000_000 / 110e6
        assert record["history"] == [{"step": 1, "seconds": 0.5}]
        assert set(record["provenance"]) == {"terncomm", "torch", "python", "commit", "machine", "date"}
    err = capfd.readouterr().err
    assert "MB at each rank's interface, gradients and all else: sent 0.0" in err
    assert "1 lines of TERNCOMM_METRICS are not JSON" in err
    assert not list(tmp_path.glob("terncomm-cluster-*"))


def run(text, ranks=3, **job):
    """A script's ranks in this process: their status."""
    with Interrupts() as interrupts, Guard() as guard, network.network(ranks) as made:
        return launch.run(made, Job([sys.executable, "-c", text], **job), guard, interrupts)


FAIL = """
import os, subprocess, sys, time
print("before", flush=True)
if os.environ["RANK"] == "1":
    sys.stdout.write("no end of line")
    sys.stdout.flush()
    {how}
subprocess.Popen(["sleep", "{marker}"])
time.sleep(60)
"""


@pytest.mark.root
@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize(
    ("how", "status", "words"),
    [
        ("sys.exit(3)", 3, "rank 1 failed with status 3"),
        ("os.kill(os.getpid(), 9)", 137, "rank 1 was killed by SIGKILL"),
    ],
)
def test_a_rank_that_fails_is_named_and_the_others_are_ended(monkeypatch, capfd, how, status, words):
    monkeypatch.setattr(launch, "FAILED_GRACE_S", 0.7)
    marker = f"9000.{time.time_ns()}"
    began = time.monotonic()
    assert run(FAIL.format(how=how, marker=marker)) == status
    assert 0.7 <= time.monotonic() - began < 5
    told = capfd.readouterr()
    assert told.err == f"terncomm cluster: {words}\nterncomm cluster: ranks 0, 2 still run, and are ended\n"
    assert sorted(told.out.splitlines()) == ["[rank 1] before", "[rank 1] no end of line", "[rank 2] before", "before"]
    assert not processes(marker), "a process that a rank had started"


LEAVE = """
import os, subprocess, sys
subprocess.Popen(["sleep", "{marker}"])
subprocess.Popen(["sleep", "9"], start_new_session=True)
sys.stdout.write("no end of line")
"""


@pytest.mark.root
@pytest.mark.usefixtures("allowed")
def test_what_ranks_leave_behind_is_ended_and_not_waited_for(capfd):
    marker = f"9000.{time.time_ns()}"
    began = time.monotonic()
    assert run(LEAVE.format(marker=marker)) == 0
    assert time.monotonic() - began < 8
    assert "[rank 2] no end of line\n" in capfd.readouterr().out, "though another process holds the pipe"
    assert not processes(marker)


@pytest.mark.root
@pytest.mark.usefixtures("allowed")
def test_others_may_end_by_themselves_after_a_failure(capfd):
    text = "import os, sys, time; r = int(os.environ['RANK']); time.sleep(0.2 * r); print(r); sys.exit(4 + r)"
    assert run(text) == 4
    told = capfd.readouterr()
    assert told.out == "0\n[rank 1] 1\n[rank 2] 2\n"
    assert told.err.startswith("terncomm cluster: rank 0 failed with status 4\n")
    assert "still run" not in told.err


@pytest.mark.root
@pytest.mark.usefixtures("allowed")
def test_a_job_over_its_time_is_ended_though_it_refuses(monkeypatch, capfd):
    monkeypatch.setattr(launch, "TERM_GRACE_S", 0.3)
    text = (
        "import signal, time; signal.signal(signal.SIGTERM, lambda *_: print('asked to', flush=True)); time.sleep(60)"
    )
    began = time.monotonic()
    assert run(text, ranks=2, timeout_s=0.7) == launch.TIMED_OUT
    assert time.monotonic() - began < 4
    told = capfd.readouterr()
    assert told.err == "terncomm cluster: not done within 0.7 s: ranks 0, 1 are ended\n"
    assert sorted(told.out.splitlines()) == ["[rank 1] asked to", "asked to"]


@pytest.mark.root
@pytest.mark.usefixtures("allowed")
def test_a_rank_that_fails_in_a_job_with_a_time_limit(monkeypatch):
    monkeypatch.setattr(launch, "FAILED_GRACE_S", 0.3)
    began = time.monotonic()
    assert run("import os, time; os.environ['RANK'] == '1' and os._exit(5); time.sleep(60)", timeout_s=30) == 5
    assert time.monotonic() - began < 5


@pytest.mark.root
@pytest.mark.usefixtures("allowed", "without_netem")
def test_a_user_space_link_that_ends_ends_the_job():
    job = Job([sys.executable, "-c", "import time; time.sleep(60)"])
    link = Link("", float("inf"), delay_s=1e-3)
    with Interrupts() as interrupts, Guard() as guard, network.network(2, link) as made:
        threading.Timer(0.5, made.switch.kill).start()
        with pytest.raises(launch.LinkEnded):
            launch.run(made, job, guard, interrupts)


@pytest.mark.root
@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_nothing(script, tmp_path, number):
    """Of ranks, of what they started, of the network and of files; also where the command itself is killed."""
    before = host_networks()
    marker = f"9000.{time.time_ns()}"
    path = script(f"import subprocess; print('ready', flush=True); subprocess.run(['sleep', '{marker}'])")
    words = "--ranks", 2, "--delay", "2ms", "--", path
    job = start(*words, TMPDIR=str(tmp_path))
    for line in job.stdout:
        if line == "ready\n":
            break
    deadline = time.monotonic() + 10
    while len(processes(marker)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(processes(marker)) == 2
    assert len(host_networks() - before) >= 2
    job.send_signal(number)
    _, err = job.communicate(timeout=20)
    if number == signal.SIGKILL:
        assert job.returncode == -signal.SIGKILL
    else:
        assert job.returncode == 128 + number
        last = err.splitlines()[-1]
        assert last == f"terncomm cluster: {number.name}: every rank is ended, the network is gone"
    deadline = time.monotonic() + 5
    while (processes(marker) or processes(path) or host_networks() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not processes(marker)
    assert not processes(path)
    assert not host_networks() - before
    assert not list(tmp_path.glob("terncomm-cluster-*"))


# ---- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--ranks", "0", "--", "true"], "--ranks must be 1 or more, got 0"),
        (["--ranks", "4", "--ranks-per-node", "3", "--", "true"], "--ranks-per-node must divide --ranks 4, got 3"),
        (["--ranks", "4", "--ranks-per-node", "0", "--", "true"], "--ranks-per-node must divide --ranks 4, got 0"),
        (["--ranks", "2", "--rate=-5mbit", "--", "true"], "--rate: '-5mbit' is not positive"),
        (["--ranks", "2", "--rate", "5furlongs", "--", "true"], "--rate: '5furlongs' is not a rate"),
        (["--ranks", "2", "--link", "carrier-pigeon", "--", "true"], "--link: 'carrier-pigeon' is no link"),
        (["--ranks", "2", "--link", "1gbit", "--rate", "1gbit", "--", "true"], "--link and --rate exclude each other"),
        (["--ranks", "2", "--link", "wan-50ms", "--delay", "1ms", "--", "true"], "wan-50ms has a delay of its own"),
        (["--ranks", "2", "--delay", "5", "--", "true"], "--delay: '5' is not a time"),
        (["--ranks", "2", "--delay", "1ms", "--jitter", "2ms", "--", "true"], "--jitter 2ms must be no more than"),
        (["--ranks", "2", "--loss", "0.1", "--", "true"], "--loss: '0.1' is not a share of frames"),
        (["--ranks", "2", "--loss", "100%", "--", "true"], "--loss: '100%' is not a share of frames"),
        (["--ranks", "2", "--timeout", "0", "--", "true"], "--timeout must be positive and finite, got 0"),
        (["--ranks", "2", "--timeout", "inf", "--", "true"], "--timeout must be positive and finite, got inf"),
        (["--ranks", "2", "--out", "/dev/null/x", "--", "true"], "--out: cannot write a file /dev/null/x"),
        (["--ranks", "2"], "no command"),
        (["--ranks", "2", "--"], "no command"),
        (["--ranks", "2", "--", "no_such.py"], "no script no_such.py"),
        (["--ranks", "2", "--", "-m"], "-m wants a module's name"),
        (["--ranks", "2", "--", "no-such-executable"], "no executable no-such-executable"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(words, told, capsys, monkeypatch):
    monkeypatch.setattr(command, "network", None)  # nothing is made
    monkeypatch.setattr(command, "Namespace", None)
    assert main(*words) == 2
    err = capsys.readouterr().err
    assert err.startswith("terncomm cluster: ")
    assert told in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [["--", "true"], ["--ranks", "many", "--", "true"], ["--ranks", "2", "--no-such"]])
def test_what_argparse_refuses(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(*words)
    assert ended.value.code == 2
    assert "--ranks" in capsys.readouterr().err


def test_where_namespaces_are_not_allowed(monkeypatch, tmp_path, capsys):
    def refuse():
        raise NotPermitted("this process may not make a network namespace (Operation not permitted)")

    unshare = tmp_path / "unshare"
    unshare.write_text("#!/bin/sh\necho unshare: no user namespaces >&2\nexit 1\n")
    unshare.chmod(0o755)
    monkeypatch.setattr(command, "Namespace", refuse)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert main("--ranks", 2, "--", "true") == 1
    err = capsys.readouterr().err
    assert "may not make a network namespace (Operation not permitted); unshare: no user namespaces;" in err
    assert "`terncomm simulate` and `terncomm plan` need no network" in err
    assert err.count("\n") == 1
    unshare.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main("--ranks", 2, "--", sys.executable) == 1
    assert "`unshare` is not installed" in capsys.readouterr().err


@pytest.mark.root
def test_without_root_it_works_or_says_why(tmp_path):
    """As another user, by an interpreter and packages that this user can read."""
    if os.getuid() or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv, to become another user")
    prefix = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    folder = Path("/tmp") / f"terncomm-test-{os.getpid()}"
    shutil.copytree(ROOT / "terncomm", folder / "terncomm", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "hello.py").write_text("import os; print('hello', os.environ['RANK'])\n")
    folder.chmod(0o755)
    paths = os.pathsep.join([str(folder), *(path for path in sys.path if path.endswith("-packages"))])
    python = shutil.which(f"python3.{sys.version_info.minor}", path="/usr/bin:/usr/local/bin") or sys.executable
    environment = {"PYTHONPATH": paths, "HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        words = "--ranks", 2, "--rate", "100mbit", "--delay", "2ms", "--", folder / "hello.py"
        job = start(*words, prefix=prefix, python=python, **environment)
        out, err = job.communicate(timeout=60)
    finally:
        shutil.rmtree(folder)
    if "ImportError" in err or "ModuleNotFoundError" in err or "failed to execute" in err:
        pytest.skip(f"another user cannot import terncomm here: {err.strip().splitlines()[-1]}")
    if job.returncode == 0:
        assert sorted(out.splitlines()) == ["[rank 1] hello 1", "hello 0"]
        assert "asked delay 2 ms, measured" in err
    else:
        assert job.returncode == 1
        assert "may not make a network namespace" in err
        assert err.count("\n") == 1
