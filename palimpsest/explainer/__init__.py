"""The explainer: one page on which the memory can be watched and touched, its numbers from this library.

Nothing here imports torch before it is needed: the page is up first, and torch arrives behind it.
"""
