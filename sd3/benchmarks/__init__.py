"""Paired runs that measure what this project costs."""
