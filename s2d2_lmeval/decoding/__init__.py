"""From logits to tokens: configuration, sampling, acceptance, routing, remasking, the decoders and the batch loop.

A decoder knows logits, tokens and randomness. It never touches a model, a cache or attention.
"""
