"""A store in a PostgreSQL database, which several nodes may have open: see ``store``.

Needs the extra ``postgres``. Not here: what a store promises (``entidb.storage.base``).
"""

from entidb.storage.postgres.store import PostgresStorage

__all__ = ["PostgresStorage"]
