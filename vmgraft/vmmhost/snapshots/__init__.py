"""A kept guest as a file: the machine, the states of its extensions, and what all of it belongs to.

A snapshot is the host's own state, as the memory of a running guest is: whoever can write the file decides what the
guest does from there on. It is therefore believed only where nobody else can have written it. See docs/operator.md.
"""
