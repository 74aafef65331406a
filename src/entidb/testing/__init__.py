"""What proves an EntiDB: contract suites, fakes and the simulator, for our tests and for users'.

Nothing in the rest of the package imports this one, and importing it does not import pytest.
"""
