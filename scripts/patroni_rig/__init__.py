"""Failover, tried: PostgreSQL under Patroni, nodes and devices of EntiDB, and what fails below them
(``scripts/failover``)."""
