"""A small world of plain shapes, and a whole SD3 trained on it from nothing, small enough to ship."""

from sd3.common import venv

venv.ensure(["torch", "diffusers"])  # its commands, too, find the project's environment by themselves
