"""Runs a torchrun script on a limited network that is really there: namespaces and links on one machine.

    terncomm cluster --ranks 4 --rate 100mbit --delay 1ms -- launch/train.py --codec terngrad

`namespaces` makes hosts, `network` the links between them, `probe` measures those, `launch` starts the ranks.
"""
