"""Administration of a running server: what an operator may do, with whose right, and what is
written down of it.

    routes     the table of everything that can be asked: address, what it takes and answers
    openapi    the same as a document for programs
    http       asked over the network, with a token that says so
    local      asked over a socket in the data directory, by its owner
    office     what all of it shares: the server, the audit log, the tasks
    callers    who asks, and for which databases
    audit      the log of changes and of refused logins
    databases  list, create, freeze, rename, delete
    access     devices, revocations, keys
    erase      what conditions find, taken from the bytes of the files too
    tasks      what takes long: one at a time, with progress, to be cancelled

Functions take the office, the caller and plain values, and answer structures that become JSON.
"""
