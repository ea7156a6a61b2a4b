"""A small world of plain shapes, and a whole SD3 trained on it from nothing, small enough to ship."""
