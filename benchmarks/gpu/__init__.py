"""What can only be measured on a GPU, in nine minutes: ``make gpu``, or ``python -m benchmarks.gpu``.

It needs a checkout, torch and transformers; the tests also pytest and hypothesis. Every step is a process of its own
under a time limit of its own, writes ``<step>.json`` as it goes, and does not stop the next; a table comes last.
``--rehearse`` runs everything on a CPU, in tiny shapes and where it matters on a pretend GPU.
"""
