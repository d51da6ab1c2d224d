"""An endpoint with OpenAI's interface: one model, one running batch that requests join and leave.

``protocol``  what clients say, and what they are told
``service``   the queue, and the thread that decodes
``app``       routes, streaming, keys
``metrics``   counts in Prometheus' format
"""
