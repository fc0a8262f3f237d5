"""`python -m terncomm.cluster`: the command of its own."""

import argparse
import sys

from terncomm.cluster.command import add_arguments, main

if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m terncomm.cluster")
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
