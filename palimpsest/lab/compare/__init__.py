"""Results side by side: statistics over seeds, judges and plots that experiments share."""
