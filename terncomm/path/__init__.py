"""The path that gradients take between ranks, sans I/O.

| word | is |
| --- | --- |
| part | what a bucket holds of one kind: codes, floats, statistics (`parts`) |
| exchange | how parts travel between ranks (`exchanges`) |
| path | the way of one bucket from gradients to their mean: a generator of messages (`reduce`) |
| driver | who moves the messages (`drivers`, `pipeline`) |
"""
