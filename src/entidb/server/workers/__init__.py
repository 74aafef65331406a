"""Several processes that are one server: who belongs to it, how they ask each other, who does what
only one of them may do, and the parent that starts them. A server of one process knows nothing of
this.
"""
