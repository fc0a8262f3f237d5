"""What the command line does, a file for each command: `add_arguments(parser)` and `main(args)`, the exit status."""
