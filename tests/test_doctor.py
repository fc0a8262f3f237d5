"""terncomm doctor, under torchrun."""

import os
import re
import subprocess
import sys
import time

from jobs import ended, torchrun


def test_it_measures_and_advises():
    began = time.monotonic()
    said = ended(torchrun("-m", "terncomm", "doctor", "--params", "2M", "--compute-ms", "50", "--seconds", "4"))
    assert time.monotonic() - began < 150
    assert "MODE: measured. 2 ranks over gloo" in said
    assert re.search(r"^ +0  \S+ +lo +127\.0\.0\.1", said, re.MULTILINE), said
    for codec in ("none", "fp16", "int8", "terngrad"):
        found = re.search(rf"^{codec} +([\d.]+) +([\d.]+) ms +50\.0 ms", said, re.MULTILINE)
        assert found, said
        assert float(found[2]) >= 50
    assert re.search(r"^none +8\.00", said, re.MULTILINE)  # 2 (W - 1) / W times 4 bytes
    assert "Verdict: " in said


def test_an_interface_that_is_not_there_is_told_at_once():
    began = time.monotonic()
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = "nope0"
    try:
        job = torchrun("-m", "terncomm", "doctor")
    finally:
        os.environ.pop("GLOO_SOCKET_IFNAME") if before is None else os.environ.update(GLOO_SOCKET_IFNAME=before)
    said, _ = job.communicate(timeout=60)
    assert job.returncode != 0
    assert time.monotonic() - began < 60
    assert "there is no interface nope0; there are: " in said
    assert "lo (127.0.0.1)" in said


def test_a_store_that_nobody_serves_is_told():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment |= {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "terncomm", "doctor", "--join", "2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 1
    assert "the ranks do not reach each other (store 127.0.0.1:1)" in done.stderr
