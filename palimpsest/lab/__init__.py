"""The lab: claims about these memories, measured again, each by one command.

Reading order: tasks/task.py (what is asked), contestants.py (who is asked), training.py (how one learns),
experiment.py (a sweep and its verdict), run.py (running and resuming it), experiments/ (the recipes).
"""
