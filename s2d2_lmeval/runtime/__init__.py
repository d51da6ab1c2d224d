"""How a forward runs: passes, visibility, attention, the key-value cache and the trace.

The runtime knows passes, but not decoders.
"""
