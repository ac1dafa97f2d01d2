"""Palimpsest inside other people's tools. Each tool has its own room, so that its churn stays there."""
