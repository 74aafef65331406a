"""A server whose nodes have no directory in common: what they share is where the databases are, in
PostgreSQL. Needs the extra ``postgres``, which is imported when the first thing is asked.
"""
