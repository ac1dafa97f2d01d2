"""The recipes, an experiment a file. To add one, copy the nearest; a recipe outside works the same: `lab run mine.py`."""
