"""Monitors: how an operator speaks with a running machine."""
