"""The owner's policy: rules that no run config can weaken."""
