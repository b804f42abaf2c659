"""Thousands of simulated owners in a few processes: a host runs the ClientApp of many owners.

| module | what it holds |
| --- | --- |
| ``owner_host`` | one process's owners, their messages answered by its threads |
| ``host_grid`` | a Flower grid over hosts: a batch of messages for each, not one call per owner |
| ``ray_hosts`` | hosts as Ray actors, on this machine or on a cluster |
| ``launch`` | starts a run of this kind and waits for its end |
| ``server`` | the process of a run: the strategy, and the hosts that it started |
"""
