"""Attacks that infer a property of a sample: its membership, or an attribute of its author."""
