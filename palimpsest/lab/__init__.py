"""The lab: claims about these memories, measured again, each by one command.

Reading order: tasks/task.py (what is asked), model_variants.py (who is asked), training.py (how one learns),
framework/experiment.py (a sweep and its verdict), framework/sweep.py (running and resuming it), compare/ (statistics
over seeds, judges, plots), measure/ (points that measure rather than train), experiments/ (the recipes).
"""
