"""Telemetry of the server: status page, metrics, event files."""
