"""Remedies against overfitting that act within the step; see ft/anchor/__init__.py."""
