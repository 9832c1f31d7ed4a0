"""The descriptor layer: what a section of a migration stream consists of."""
