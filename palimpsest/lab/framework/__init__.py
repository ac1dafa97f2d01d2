"""What a sweep is, how it runs and what it leaves: experiment, sweep, worker, results, report."""
