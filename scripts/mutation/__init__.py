"""Mutation testing: small changes to the code that decides, each of which a test has to notice.

``operators`` makes the mutants, ``settings`` reads which and what is known of them, ``running``
tries them, ``report`` counts. ``scripts/mutate`` is the command, docs/testing.md says how to read
what comes out.
"""
