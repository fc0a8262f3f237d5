"""How ranks average a bucket of gradients, without I/O: paths ask for messages, drivers send them.

| word | meaning |
| --- | --- |
| piece | about a million elements of a bucket; while one piece is sent, others are encoded or decoded (`bucket`) |
| part | the data of one kind in a piece: codes, floats or statistics (`parts`) |
| row | the slice of a part that is sent to one rank: row r goes to rank r |
| total | a row, added up over ranks |
| exchange | the sequence of messages that adds up parts over ranks (`exchanges`) |
| path | a generator that turns one bucket's gradients into their mean, and yields its messages (`reduce`) |
| driver | runs paths and sends their messages (`drivers`, `pipeline`) |
"""
