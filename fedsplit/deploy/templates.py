"""The commented files that commands write for their users to fill in."""

from __future__ import annotations

NODE = """\
# What this owner's machine connects to.  Nothing in it reaches the server but the owner's name.
# Relative paths are relative to this file.  What may leave is another file's: owner.toml.

superlink = "fed.example.org:9092"
ca = "keys/ca.pem"              # from the model owner, by a way you trust
key = "keys/node.key"           # fedsplit keys node; the model owner registers keys/node.pub
home = "/var/lib/fedsplit"      # noise secret, ledger, bottoms: back it up
# session = "fed.example.org:9093"            # for `fedsplit owner check` alone
# port = 0                                     # loopback port of the SuperNode; 0 = any free one
# client-certificate = "keys/client.pem"      # where the model owner asks for mutual TLS
# client-key = "keys/client.key"

[node]
owner = "hospital"              # public: letters, digits, - and _
data-path = "/srv/data/notes.jsonl"
data-kind = "file"
text-column = "text"
label-column = "label"
"""
