"""Sessions with owners: transports, offers, received representations."""
