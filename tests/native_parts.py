"""What the tests of the native engine share."""

from __future__ import annotations

import argparse

from sd3.native.options import parse

NEEDED = ("--pretrained_model_name_or_path=m", "--instance_prompt=a dog", "--instance_data_dir=d")


def options(*arguments: str, kind: str = "lora") -> argparse.Namespace:
    """Options with what has to be given given; later arguments overrule earlier ones."""
    return parse(kind, [*NEEDED, *arguments])
