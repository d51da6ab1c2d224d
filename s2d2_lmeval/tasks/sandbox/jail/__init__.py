"""What runs inside the sandbox, before and around a program: standard library only, started by a bare interpreter.

It is a package of its own, since the interpreter that runs it (another one, in a container) need not have s2d2-lmeval.
Its modules import as little as they can: half the time of a run is the start of an interpreter.
"""
