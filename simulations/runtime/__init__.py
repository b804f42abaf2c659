"""Starting and stopping Flower's processes; use it through :mod:`simulations.flower_runtime`."""
