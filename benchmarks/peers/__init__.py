"""Other databases with their own live replication, for those who compare: RxDB and PouchDB.

They are no dependency of anything else, and no part of ``python -m benchmarks``: see
``python -m benchmarks.peers``.
"""
