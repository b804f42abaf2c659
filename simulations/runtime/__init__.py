"""Starting and stopping Flower's processes; use it through :mod:`.flower_runtime`."""
